"""``lowmem-drf bench``: one real update with random weights of true size beside its plan. Nothing is downloaded.

Under DeepSpeed this is one process, whatever the preset says: on one card ZeRO-3 fetches the weights from the host.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from lowmem_drf.assembly.assemble import resolve_device
from lowmem_drf.config import chosen_preset, load_config, preset_card, preset_path
from lowmem_drf.planner.cards import card_named, parse_vram
from lowmem_drf.planner.measure import Measurement, measure
from lowmem_drf.planner.report import planned
from lowmem_drf.planner.shortcuts import one_micro_batch
from lowmem_drf.planner.stages import Plan
from lowmem_drf.terminal import make_console

if TYPE_CHECKING:
    from rich.console import Console


def bench_command(preset: str | None, vram: str | None, overrides: Sequence[str], as_json: bool) -> None:
    """Prints planned and measured figures as a table or JSON."""
    name = preset if preset is not None else chosen_preset()[0]
    config = one_micro_batch(load_config(name, [*overrides, "processes=1"]))
    console = make_console(stderr=as_json, soft_wrap=True)
    cap_gib = parse_vram(vram) if vram else None
    device = resolve_device(config.device)
    card = card_named(torch.cuda.get_device_name(device) if device.type == "cuda" else preset_card(preset_path(name)))
    plan = planned(config, card, cap_gib or card.gib, console, advice=False)
    measured = measure(config, device, cap_gib, console)
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
    return plan.as_json(name) | {"device": measured.device, "measured_peak_gib": measured.peak_gib, "stages": rows}


def _print(plan: Plan, measured: Measurement, name: str, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("stage", title=Text(f"{name}: one micro-batch on {measured.device}"), title_justify="left")
    for heading in ("planned GiB", "measured GiB", "difference", f"estimated s ({plan.card})", "measured s"):
        table.add_column(heading, justify="right")
    for stage, gib in measured.gib.items():
        row = plan.stages[stage]
        memory = (f"{row.peak_gib:.3f}", f"{gib:.3f}", f"{row.peak_gib / gib - 1:+.1%}")
        table.add_row(stage, *memory, f"{row.s:.2f}", f"{measured.s[stage]:.2f}")
    console.print(table)
    planned = f"planned {plan.peak_gib:.3f} GiB with the text encoder's stage"
    console.print(f"peak: {planned}, measured {measured.peak_gib:.3f} GiB", highlight=False)
