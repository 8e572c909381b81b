"""Planned cost and saving of streamed weights: one update at 832x480, 81 frames.

    python -m bench.plans.streaming

The first row of each model keeps all weights on the card, even if the card is too small.
"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from lowmem_drf.config import load_config
from lowmem_drf.planner.cards import card_named
from lowmem_drf.planner.plan import make_plan
from lowmem_drf.planner.stages import Plan

STREAMED = ('memory.stream=["transformer", "critic"]', "memory.text_device=stream")
SMALLEST = (
    *(*STREAMED, 'memory.park=["transformer", "critic", "vae"]', "memory.checkpoint=host"),
    *("memory.token_slices=4", "memory.vae_strips=8", "memory.vae_caches=host"),
)
LARGE = (
    *("model.id=Wan-AI/Wan2.1-T2V-14B-Diffusers", "memory.checkpoint=host"),
    *("memory.keep_attention=none", "memory.token_slices=2"),
)
ROWS = {
    "1.3B, resident": ("RTX 4090", ()),
    "1.3B, streamed": ("RTX 4090", STREAMED),
    "1.3B, streamed, and all else that saves": ("RTX 4090", SMALLEST),
    "1.3B, streamed, over half the link": ("RTX 4060", STREAMED),
    "14B, 16 bit, resident": ("RTX 4090", LARGE),
    "14B, 16 bit, streamed": ("RTX 4090", (*LARGE, *STREAMED)),
    "14B, 8 bit, streamed": ("RTX 4090", (*LARGE, *STREAMED, "model.quant=int8")),
    "14B, 4 bit, resident": ("RTX 4090", (*LARGE, "model.quant=nf4")),
    "2 x 14B (Wan2.2-A14B), 8 bit, streamed": (
        "RTX 4090",
        (*LARGE, *STREAMED, "model.quant=int8", "model.id=Wan-AI/Wan2.2-T2V-A14B-Diffusers"),
    ),
    "14B, 16 bit, streamed, and all else that saves": ("RTX 4090", (*LARGE, *SMALLEST)),
}
"""Name -> card, and changes to the preset rtx4090-20step without records: what waits on the host is weights."""
UNRECORDED = ("memory.record_decode=0", "memory.vae_cache_every=3", "memory.record_rollout=false")


def planned(name: str) -> Plan:
    """The plan of a row."""
    card, overrides = ROWS[name]
    return make_plan(load_config("rtx4090-20step", (*UNRECORDED, *overrides)), card_named(card))


def main() -> None:
    """Prints the table."""
    table = Table("weights", "card", "peak GiB", "host GiB", "s an update", "waiting", "copies hidden")
    for name, (card, _) in ROWS.items():
        plan = planned(name)
        memory = (f"{plan.peak_gib:.1f} ({plan.largest})", f"{plan.host_gib:.1f}")
        time = (f"{plan.update_s:,.0f}", f"{plan.stall_share:.1%}", f"{plan.hidden_share:.0%}")
        table.add_row(name, card, *memory, *time)
    Console(soft_wrap=True, width=140).print(table)


if __name__ == "__main__":
    main()
