"""How the planned peaks scale, and the cost of the exact VAE backward: plans at true size, 832x480.

    python -m bench.plans.scaling

Prints the peak of the transformer's stage for K = 1 and K = 10 graded steps (81 frames), the peak of the VAE's stage
for 17 and 81 frames (exact gradients, caches on the host), the operations of ``exact`` and of ``window:2`` for 8 evenly
spaced kept frames of 81, and the cost of the graded steps with kept attentions and with a recorded rollout. Needs no
card and no weights; takes a few minutes on one core.
"""

from __future__ import annotations

from collections.abc import Iterator

from lowmem_drf.config import load_config
from lowmem_drf.planner.cards import card_named
from lowmem_drf.planner.fakes import Fakes
from lowmem_drf.planner.plan import make_plan
from lowmem_drf.planner.stages import StagePlan

PRESET, CARD = "rtx4090-20step", "24 GB (RTX 4090)"
EIGHT = ("critic.frames=8", "critic.frame_sampling=uniform")


def stage(name: str, *overrides: str, fakes: Fakes | None = None) -> StagePlan:
    """The plan of one stage of the preset with other settings. ``fakes``: see ``make_plan``."""
    return make_plan(load_config(PRESET, overrides), card_named(CARD), only=name, fakes=fakes).stages[name]


KEPT = {
    "block checkpointing": (),
    "attentions kept on the card": ("memory.keep_attention=card",),
    "attentions kept on the host": ("memory.keep_attention=host",),
    "recorded rollout": ("memory.keep_attention=host", "memory.record_rollout=true"),
}


def lines() -> Iterator[str]:
    """One comparison per line."""
    one, ten = (stage("denoise_backward", f"sampler.graded_steps={k}").peak_gib for k in (1, 10))
    yield f"denoise_backward, peak: K = 1 {one:.3f} GiB, K = 10 {ten:.3f} GiB, {100 * (ten / one - 1):+.2f}%"
    frames = ("video.frames=17", "video.frames=81")
    short, long = (stage("vae_backward", n, "memory.vae_caches=host", *EIGHT).peak_gib for n in frames)
    yield f"vae_backward, peak: 17 frames {short:.3f} GiB, 81 frames {long:.3f} GiB, {100 * (long / short - 1):+.2f}%"
    exact, window = (stage("vae_backward", f"memory.vae_backward={how}", *EIGHT).tflop for how in ("exact", "window:2"))
    yield f"vae_backward, operations: exact {exact:.0f} TFLOP, window:2 {window:.0f} TFLOP, {exact / window:.2f} times"
    for ops in ("naive", "fused"):
        for name, overrides in KEPT.items():
            plain = (f"kernels.ops={ops}", "memory.keep_attention=none", "memory.record_rollout=false")
            row = stage("denoise_backward", *plain, *overrides)
            memory = f"{row.peak_gib:.2f} GiB at the peak, {row.host_gib:.1f} GiB on the host"
            yield f"denoise_backward, {ops}, {name}: {memory}, {row.tflop:.0f} TFLOP, about {row.s:.0f} s"


if __name__ == "__main__":
    for line in lines():
        print(line, flush=True)
