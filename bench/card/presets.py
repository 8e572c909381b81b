"""``lowmem-drf bench`` of a preset under the memory of its card: the allocator's peak and the seconds of every stage
beside the plan's."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from bench.card.rows import Row, State, near
from lowmem_drf.errors import LowmemError
from lowmem_drf.planner.cards import GIB, parse_vram

MEMORY = {"rtx4090": "24GB", "rtx3060": "12GB", "rtx4060": "8GB", "rtx4090-wan14b": "24GB"}
"""Of the card that each preset is for."""
LEAST = 0.9
"""Share of the memory that a card of that size may report."""
SAME = 0.05
"""Share by which a peak may differ from its plan."""
PEAK = "peak of these stages"


def memory_row(stage: str) -> str:
    """The row's name of a stage's peak, or of ``PEAK``."""
    return f"{stage}, memory"


def time_row(stage: str) -> str:
    """The row's name of a stage's seconds."""
    return f"{stage}, time"


def preset(name: str) -> Iterator[Row]:
    """Stages of one update. What it compiles is in its seconds."""
    vram = MEMORY[name]
    here = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / GIB
    if here < LEAST * parse_vram(vram):
        yield Row("the preset", f"is for {vram}, and this card has {here:.1f} GiB")
        return
    command = [sys.executable, *f"-m lowmem_drf bench --preset {name} --vram {vram} --updates 1 --json".split()]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise LowmemError(f"{' '.join(command[1:])} ended with exit code {done.returncode}; its message is above")
    yield from rows(json.loads(done.stdout))


def rows(found: Mapping[str, Any]) -> Iterator[Row]:
    """Of the JSON of ``bench``. The text encoder's stage is planned only."""
    stages = {name: stage for name, stage in found["stages"].items() if stage["measured_gib"] is not None}
    planned = max(stage["peak_gib"] for stage in stages.values())
    yield _memory(PEAK, found["measured_peak_gib"], planned)
    for name, stage in stages.items():
        yield _memory(name, stage["measured_gib"], stage["peak_gib"])
    for name, stage in stages.items():
        yield near(time_row(name), stage["measured_s"], "s", stage["s"], f"plan for {found['card']}")


def _memory(what: str, measured: float, planned: float) -> Row:
    state: State = "ok" if abs(measured / planned - 1) <= SAME else "off"
    return Row(memory_row(what), measured, "GiB", planned, state, "plan")
