"""What ``plan`` sets and advises for ten settings that do not fit their cards, followed: does it then fit, with the
figures that were printed, and is nothing named that is set already?

    python -m bench.plans.advice             # --only 3: the third alone

Exit code 1 if advice is wrong. The seconds are those of the processor that planned, first plan and ladder.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import reduce

from rich.console import Console
from rich.table import Table

from lowmem_drf.assembly.rungs import keeps_gradient
from lowmem_drf.config import change, load_config
from lowmem_drf.planner.cards import Card, card_named
from lowmem_drf.planner.fakes import Fakes
from lowmem_drf.planner.ladder import advise
from lowmem_drf.planner.plan import Seen, make_plan, new_fakes
from lowmem_drf.planner.stages import Plan
from lowmem_drf.preset_files import preset_card, preset_path
from lowmem_drf.schema import Config

SETTINGS: tuple[tuple[str, float, tuple[str, ...]], ...] = (
    ("rtx4090-20step", 8, ()),
    ("rtx4090-20step", 12, ()),
    ("rtx4090-20step", 16, ("memory.fit=as_given",)),
    ("rtx4090-20step", 3, ()),
    ("rtx4090-20step", 16, ("micro_batch=2", "memory.keep_attention=card")),
    ("rtx4060-20step", 8, ("video.width=1280", "video.height=720", "video.frames=81")),
    ("rtx3060", 6, ()),
    ("rtx4090-wan14b", 12, ()),
    ("rtx4090-wan14b", 8, ("model.products=16bit", "model.quant=none")),
    ("rtx4090-wan22-5b", 8, ()),
)
"""Preset, GiB of the card, and overrides."""
NEAR = 0.01
"""Share by which a stage's peak may change with what was planned before it."""


def wrong(config: Config, card: Card, plan: Plan, fakes: Fakes) -> list[str]:
    """What does not hold of the settings and the advice in ``plan``, which ``advise`` returned for ``config``."""
    settings = plan.applied or plan.changes
    changed, keys = change(config, settings), [text.partition("=")[0].split(".") for text in settings]
    same = (key for key in keys if reduce(getattr, key, config) == reduce(getattr, key, changed))
    found = [f"{'.'.join(key)} is set already" for key in same]
    found += [f"{text} changes the gradient" for text in plan.applied if not keeps_gradient(text)]
    if not settings:
        return found
    followed = changed
    if plan.applied:  # the run's settings, as its folder has them
        followed = change(followed, ["memory.fit=as_given"])
    seen = Seen()
    after = advise(
        followed, card, make_plan(followed, card, plan.vram_gib, fakes=fakes, seen=seen), fakes=fakes, seen=seen
    )
    promised = plan.changed or plan
    for name in ("peak_gib", "host_gib", "update_s"):
        now, before = getattr(after, name), getattr(promised, name)
        if abs(now - before) > NEAR * before:
            found.append(f"{name} is {now:.2f}, and {before:.2f} was said")
    return found if after.fits else [*found, "it does not fit"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, choices=range(1, len(SETTINGS) + 1), help="one setting, by its number")
    only = parser.parse_args(arguments).only
    table = Table("setting", "set or advised", "peak GiB", "host GiB", "s an update", "CPU s", "wrong")
    failed = False
    for number, (name, vram_gib, overrides) in enumerate(SETTINGS, 1):
        if only not in (None, number):
            continue
        config, card = load_config(name, overrides), card_named(preset_card(preset_path(name)))
        fakes, seen, began = new_fakes(), Seen(), time.process_time()
        plan = advise(config, card, make_plan(config, card, vram_gib, fakes=fakes, seen=seen), fakes=fakes, seen=seen)
        spent = time.process_time() - began
        errors = wrong(config, card, plan, fakes)
        failed |= bool(errors)
        after, what = plan.changed or plan, f"{name}, {vram_gib:g} GiB {' '.join(overrides)}"
        how = f"set: {' '.join(plan.applied)}" if plan.applied else f"advised: {' '.join(plan.changes) or 'nothing'}"
        figures = (f"{after.peak_gib:.2f}", f"{after.host_gib:.1f}", f"{after.update_s:,.0f}", f"{spent:.0f}")
        table.add_row(what, how, *figures, "; ".join(errors) or "-")
    Console(width=200).print(table)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
