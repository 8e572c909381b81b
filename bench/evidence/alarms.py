"""What the watch says of the study's runs, with the rules as they are now, and what the oracle says of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowmem_drf.scoring.alarm import Alarm, Look, bands

RATES = ("all", "physics", "quality")
FALL = 0.05
"""A rate of the oracle that ends so far below its best is a collapse; a run in which none ever is so far below its best
until then is sound. A run that fell and came back is neither: an alarm is no mistake there, and none is no miss."""
ALIKE = 0.5
"""Diversity that ends below so much of the base's is a collapse too: a prompt's clips are all alike, however right."""
NEAR = 0.03
"""So near to the best all-correct rate a marked update is a good one."""


@dataclass(frozen=True)
class Judged:
    """One run."""

    variant: str
    seed: int
    fallen: tuple[str, ...]
    """Rates of the oracle that collapse, and diversity."""
    deepest: float
    """The most that a rate ever was below its best until then, the base's among them."""
    drift: float | None
    """At the end; ``None`` if no clip shows a shape."""
    alarm: int | None
    """The update at which the alarm first began."""
    marked: int | None
    """The best update according to the watch, at the end."""
    lost: float
    """All-correct, best of the measured updates with diversity, less that of the one nearest to the marked one."""
    alike: bool
    """Whether that one has no diversity, although others have."""

    @property
    def sound(self) -> bool:
        return self.deepest <= FALL and not self.fallen

    @property
    def right(self) -> bool:
        """A collapse has an alarm and a good mark; a sound run has no alarm."""
        if self.fallen:
            return self.alarm is not None and self.lost <= NEAR and not self.alike
        return self.alarm is None or not self.sound


def judged(result: Mapping[str, Any]) -> Judged:
    """A run that was watched."""
    alarm = replayed(result["looks"])
    began = next((look.alarm for look in alarm.looks if look.alarm is not None), None)
    with_base = [row for row in result["rows"] if row["scale"] == 1]
    rows = [row for row in with_base if row["step"]]
    least = ALIKE * with_base[0]["diversity"]
    varied = [row for row in rows if row["diversity"] >= least]
    best = {rate: max(row["oracle"][rate] for row in rows) for rate in RATES}
    last = max(rows, key=lambda row: row["step"])
    fallen = [rate for rate in RATES if last["oracle"][rate] < best[rate] - FALL]
    fallen += ["diversity"] if last["diversity"] < least else []
    drift = last.get("drift", {}).get("mean")
    falls = (best_until - row["oracle"][rate] for rate in RATES for best_until, row in _with_best(with_base, rate))
    marked = alarm.best
    near = min(rows, key=lambda row: abs(row["step"] - marked)) if marked else None
    lost = max(row["oracle"]["all"] for row in varied or rows) - (near["oracle"]["all"] if near else 0.0)
    alike = near is not None and bool(varied) and near["diversity"] < least
    return Judged(result["variant"], result["seed"], tuple(fallen), max(falls), drift, began, marked, lost, alike)


def _with_best(rows: Sequence[Mapping[str, Any]], rate: str) -> Iterator[tuple[float, Mapping[str, Any]]]:
    """Each row in order, after the best value of a rate until then."""
    best = 0.0
    for row in sorted(rows, key=lambda row: row["step"]):
        best = max(best, row["oracle"][rate])
        yield best, row


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
    lines = ["| run | seed | collapses | deepest fall | drift | alarm | marked | below the best | |", "|" + "---|" * 9]
    for row in rows:
        cells = (
            f"`{row.variant}`", str(row.seed), ", ".join(row.fallen), f"{row.deepest:.1%}",
            "" if row.drift is None else f"{row.drift:.2f}", str(row.alarm or ""), str(row.marked or ""),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} | {row.lost:.1%} | {'' if row.right else 'wrong'} |")
    collapsed, sound = [row for row in rows if row.fallen], [row for row in rows if row.sound]
    back = [row for row in rows if not (row.fallen or row.sound)]
    caught, false, between = (sum(row.alarm is not None for row in some) for some in (collapsed, sound, back))
    counts = f"Collapses with an alarm: {caught} of {len(collapsed)}. Sound runs with one: {false} of {len(sound)}. "
    counts += f"Runs that fell and came back with one: {between} of {len(back)}."
    return "\n".join([*lines, "", counts])
