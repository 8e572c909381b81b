"""What the watch says of the study's runs, with the rules as they are now, and what the oracle says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowmem_drf.scoring.alarm import Alarm, Look, bands

RATES = ("all", "physics", "quality")
FALL = 0.05
"""A rate of the oracle that ends so far below its best is a collapse."""
NEAR = 0.03
"""So near to the best all-correct rate a marked update is a good one."""


@dataclass(frozen=True)
class Judged:
    """One run."""

    variant: str
    seed: int
    fallen: tuple[str, ...]
    """Rates of the oracle that collapse."""
    alarm: int | None
    """The update at which the alarm first began."""
    marked: int | None
    """The best update according to the watch, at the end."""
    lost: float
    """All-correct, best of the measured updates, less that of the measured one nearest to the marked one."""

    @property
    def right(self) -> bool:
        """A collapse has an alarm and a good mark; a sound run has no alarm."""
        return (self.alarm is not None and self.lost <= NEAR) if self.fallen else self.alarm is None


def judged(result: Mapping[str, Any]) -> Judged:
    """A run that was watched."""
    alarm = replayed(result["looks"])
    began = next((look.alarm for look in alarm.looks if look.alarm is not None), None)
    rows = [row for row in result["rows"] if row["scale"] == 1 and row["step"]]
    best = {rate: max(row["oracle"][rate] for row in rows) for rate in RATES}
    ends = max(rows, key=lambda row: row["step"])["oracle"]
    fallen = tuple(rate for rate in RATES if ends[rate] < best[rate] - FALL)
    marked = alarm.best
    got = min(rows, key=lambda row: abs(row["step"] - marked))["oracle"]["all"] if marked else 0.0
    return Judged(result["variant"], result["seed"], fallen, began, marked, best["all"] - got)


def replayed(looks: Sequence[Mapping[str, Any]]) -> Alarm:
    """The looks again, with the present rules."""
    base = looks[0]
    alarm = Alarm([Look(0, base["measures"], base["spread"], bands(base["measures"], base["spread"]))])
    for look in looks[1:]:
        alarm.add(look["step"], look["measures"], look["reward"])
    return alarm


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line a run, and the counts."""
    rows = [judged(result) for result in results if result["looks"]]
    lines = ["| run | seed | collapses | alarm | marked | below the best | |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = (f"`{row.variant}`", str(row.seed), ", ".join(row.fallen), str(row.alarm or ""), str(row.marked or ""))
        lines.append(f"| {' | '.join(cells)} | {row.lost:.1%} | {'' if row.right else 'wrong'} |")
    collapsed, sound = [row for row in rows if row.fallen], [row for row in rows if not row.fallen]
    caught, false = (sum(row.alarm is not None for row in some) for some in (collapsed, sound))
    counts = f"Collapses with an alarm: {caught} of {len(collapsed)}. Sound runs with one: {false} of {len(sound)}."
    return "\n".join([*lines, "", counts])
