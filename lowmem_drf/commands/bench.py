"""``lowmem-drf bench``: real updates with random weights of true size beside their plan. Nothing is downloaded.

Under DeepSpeed this is one process, whatever the preset says: on one card ZeRO-3 fetches the weights from the host.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from lowmem_drf.assembly.assemble import resolve_device
from lowmem_drf.config import change, chosen_preset, load_config, preset_card, preset_path
from lowmem_drf.planner.cards import card_named, parse_vram, room_of
from lowmem_drf.planner.measure import Measurement, measure
from lowmem_drf.planner.report import card_here, planned, set_to_fit
from lowmem_drf.planner.shortcuts import one_micro_batch
from lowmem_drf.planner.stages import Plan
from lowmem_drf.terminal import make_console

if TYPE_CHECKING:
    from rich.console import Console


def bench_command(preset: str | None, vram: str | None, overrides: Sequence[str], as_json: bool, updates: int) -> None:
    """Prints planned and measured figures as a table or JSON."""
    name = preset if preset is not None else chosen_preset()[0]
    config = one_micro_batch(load_config(name, [*overrides, "processes=1"]))
    console = make_console(stderr=as_json, soft_wrap=True)
    cap_gib = parse_vram(vram) if vram else None
    device = resolve_device(config.device)
    card = card_named(torch.cuda.get_device_name(device) if device.type == "cuda" else preset_card(preset_path(name)))
    room = card_here(config) or room_of(card.gib, config.memory.vram_gib)
    if cap_gib:  # as a card of that size would be
        room = room_of(cap_gib, config.memory.vram_gib)
    plan = planned(config, card, room, console, advice=False)
    if plan.applied:
        console.print(set_to_fit(plan), highlight=False, markup=False)
    measured = measure(change(config, plan.applied), device, cap_gib, console, updates)
    if as_json:
        print(json.dumps(_as_json(plan, measured, name), indent=2))
    else:
        _print(plan, measured, name, console)


def _as_json(plan: Plan, measured: Measurement, name: str) -> dict[str, Any]:
    """The JSON of ``plan`` with the measurements of every stage; ``text`` has none, because no encoder is loaded."""
    rows = {
        stage: asdict(row) | {"measured_gib": measured.gib.get(stage), "measured_s": measured.s.get(stage)}
        for stage, row in plan.stages.items()
    }
    seconds = {"updates_s": measured.updates_s, "median_s": median(measured.later_s)}
    allocator = {"reserved_gib": measured.reserved_gib, "retries": measured.retries}
    figures = {"device": measured.device, "measured_peak_gib": measured.peak_gib} | allocator | seconds
    return plan.as_json(name) | figures | {"measured_shares": measured.shares, "stages": rows}


def _print(plan: Plan, measured: Measurement, name: str, console: Console) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    title = Text(f"{name}: one micro-batch on {measured.device}; seconds planned for {plan.card}")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("stage", no_wrap=True)
    for heading in ("plan GiB", "here", "differs", "plan s", "here"):
        table.add_column(heading, justify="right", no_wrap=True)
    for stage, gib in measured.gib.items():
        row = plan.stages[stage]
        memory = (f"{row.peak_gib:.3f}", f"{gib:.3f}", f"{row.peak_gib / gib - 1:+.1%}")
        table.add_row(stage, *memory, f"{row.s:.2f}", f"{measured.s[stage]:.2f}")
    console.print(table)
    peaks = f"planned {plan.peak_gib:.3f} GiB with the text encoder's stage, measured {measured.peak_gib:.3f} GiB"
    console.print(f"peak: {peaks}", highlight=False)
    if measured.reserved_gib is not None:
        held = f"reserved {measured.reserved_gib:.3f} GiB of the card, and found no room {measured.retries} times"
        console.print(f"allocator: {held}", highlight=False)
    console.print(f"seconds: {spread(measured)}", highlight=False)


def spread(measured: Measurement) -> str:
    """Seconds of the updates, in words."""
    first, *later = measured.updates_s
    if not later:
        return f"{first:.2f} for the first update, in which libraries choose their kernels"
    between = f" ({min(later):.2f} to {max(later):.2f})" if later[1:] else ""
    return f"{median(later):.2f} an update, the median of {len(later)}{between}; {first:.2f} for the first, apart"
