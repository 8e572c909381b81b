"""Time and memory of a run, beside its plan."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from lowmem_drf.reporting.figures import Figure
from lowmem_drf.reporting.read import Record, as_row, curve, names, number
from lowmem_drf.terminal import clock

SLOW, LARGE, MARGIN_GIB = 1.5, 1.05, 0.5
"""An update or a peak earns a warning from this multiple of its plan, and a peak from this much beyond it."""


@dataclass(frozen=True)
class Stage:
    """A stage of an update: the median of its seconds, and its highest peak."""

    name: str
    s: float | None
    planned_s: float | None
    gib: float | None
    planned_gib: float | None


def stages(record: Record) -> list[Stage]:
    planned, found = as_row(record.plan.get("stages")), []
    for name in names(record.updates, "stage_s"):
        _, seconds = curve(_warm(record), "stage_s", name)
        _, peaks = curve(record.updates, "stage_peak_gib", name)
        plan = as_row(planned.get(name))
        middle = statistics.median(seconds) if seconds else None
        measured = middle, number(plan.get("s")), max(peaks, default=None), number(plan.get("peak_gib"))
        found.append(Stage(name.replace("_", " "), *measured))
    return found


def costs(record: Record) -> list[Figure]:
    """Seconds of an update and its highest peak."""
    rows, found = stages(record), []
    _, seconds = curve(_warm(record), "update_s")
    planned = number(record.plan.get("update_s"))
    if seconds:
        plan = f"{planned:.1f} s planned" if planned else f"{clock(sum(seconds))} in all"
        found.append(Figure("an update", plan, f"{statistics.median(seconds):.1f} s", ""))
    if peaks := [row.gib for row in rows if row.gib]:
        plans = [row.planned_gib for row in rows if row.planned_gib]
        plan = f"{max(plans):.1f} GiB planned" if plans else ""
        found.append(Figure("highest peak", plan, f"{max(peaks):.1f} GiB", ""))
    return found


def beyond_the_plan(record: Record) -> list[str]:
    """What took more than was planned, in words."""
    found = []
    measured = [(row.name, row.gib, row.planned_gib) for row in stages(record) if row.gib and row.planned_gib]
    large = [name for name, gib, planned in measured if gib > max(LARGE * planned, planned + MARGIN_GIB)]
    if large:
        found.append(f"More memory than planned in {', '.join(large)}.")
    _, seconds = curve(_warm(record), "update_s")
    planned_s = number(record.plan.get("update_s"))
    if seconds and planned_s and statistics.median(seconds) > SLOW * planned_s:
        found.append(f"An update took {statistics.median(seconds):.3g} s, planned were {planned_s:.3g} s.")
    return found


def _warm(record: Record) -> list[dict[str, object]]:
    """Without the first update, which warms up."""
    return [dict(row) for row in record.updates[1:] or record.updates]
