"""``lowmem-drf bench`` of a preset under the memory of its card: the allocator's peak and the seconds of every stage
beside the plan's."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from bench.card.rows import Row, State, near
from lowmem_drf.commands.bench import bench_command
from lowmem_drf.errors import LowmemError

SETTINGS = {
    "rtx4090": ("24GB", 3, 2),
    "rtx3060": ("12GB", 3, 2),
    "rtx4060": ("8GB", 3, 2),
    "rtx4090-wan14b": ("24GB", 2, 1),
}
"""Memory, steps, graded steps. Memory does not grow with more steps than these, only time does."""
SAME = 0.05
"""Share by which a peak may differ from its plan."""


def preset(name: str) -> Iterator[Row]:
    """Stages of one update. What the first update compiles is in its seconds where ``bench`` runs no other."""
    vram, steps, graded = SETTINGS[name]
    command = [sys.executable, "-m", "lowmem_drf", "bench", "--preset", name, "--vram", vram, "--json"]
    command += ["-s", f"sampler.steps={steps}", "-s", f"sampler.graded_steps={graded}"]
    if "updates" in inspect.signature(bench_command).parameters:
        command += ["--updates", "1"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise LowmemError(f"{' '.join(command[1:])} ended with exit code {done.returncode}; its message is above")
    yield from rows(json.loads(done.stdout))


def rows(found: Mapping[str, Any]) -> Iterator[Row]:
    """Of the JSON of ``bench``."""
    whole = [found["measured_peak_gib"], found["peak_gib"]]
    for stage, row in [("peak", None), *found["stages"].items()]:
        measured, planned = whole if row is None else (row["measured_gib"], row["peak_gib"])
        if measured is None:  # the text encoder's stage is planned only
            continue
        state: State = "ok" if abs(measured / planned - 1) <= SAME else "off"
        yield Row(f"{stage}, memory", measured, "GiB", planned, state, "plan")
    for stage, row in found["stages"].items():
        if row["measured_s"] is not None:
            yield near(f"{stage}, time", row["measured_s"], "s", row["s"], f"plan for {found['card']}")
