"""Figures before and after: base against tuned where it was measured, else what the watch saw, else the rewards of
training."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lowmem_drf.reporting.read import Record, Row, as_row, curve, names, number
from lowmem_drf.scoring.table import NAMES, REWARDS, sections

Tone = Literal["good", "bad", "warn", "plain"]

ASPECTS = {"TA": "the prompt", "Phy": "physics", "VQ": "quality"}
HELDOUT, DIVERSITY = REWARDS["heldout_reward"], "diversity"
KEPT, LEAST_KEPT = (DIVERSITY, "motion"), 0.9
"""Measures that training should leave as they are, and from which share of the base's on they were not."""
BETTER = ("reward", "prompts won", "oracle", "training reward")
"""Beginnings of the names of which more is better."""
FIRST = (
    *(HELDOUT, "prompts won, held-out", "oracle: all", "oracle: physics", DIVERSITY, "training reward", "reward"),
    *("motion", NAMES["velocity_norm"], "blur"),
)
"""The figures to see first: what was not trained on, the truth where it is known, then what was to stay."""
CLEAR = 0.01
"""A smaller change of a reward without an interval is none."""


@dataclass(frozen=True)
class Figure:
    """One value before and after."""

    name: str
    before: str
    after: str
    change: str
    ends: str = ""
    """The interval of the change."""
    tone: Tone = "plain"


def evidence(record: Record) -> tuple[list[Figure], str]:
    """The best that there is, those to see first in front, and where it comes from."""
    for found, source in (_compared(record), _watched(record), _trained(record)):
        if found:
            order = {name: place for place, name in enumerate(FIRST)}
            return sorted(found, key=lambda figure: order.get(figure.name, len(order))), source
    return [], ""


def signed(value: float | None, digits: int = 3) -> str:
    """A number with a real minus sign, and none before a zero."""
    return "–" if value is None else _minus(f"{value:z.{digits}f}")


def words(name: str) -> str:
    """A measure, as readers know it."""
    held = {f"heldout_{aspect}": f"held-out questions: {said}" for aspect, said in ASPECTS.items()}
    others = {"lora_norm": "size of the LoRA", **held}
    scalar = f"held-out reward: {name.removeprefix('heldout_')}" if name.startswith("heldout_") else name
    return {**NAMES, **REWARDS, **others}.get(name, scalar.replace("_", " "))


def _compared(record: Record) -> tuple[list[Figure], str]:
    result = as_row(record.result.get("result"))
    try:
        lines = [line for section in sections(result) for line in section]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):  # there is none, or it was edited
        return [], ""
    found = []
    for name, before, after, change, ends, sure in lines:
        better = name.strip().startswith((*BETTER, *ASPECTS))
        tone: Tone = "plain" if not sure or not better else "bad" if change.startswith("-") else "good"
        shown = f"reward: {ASPECTS[name.strip()]}" if name.strip() in ASPECTS else name
        found.append(Figure(shown, _minus(before), _minus(after), _minus(change), _minus(ends), tone))
    was, now = as_row(result.get("base")), as_row(result.get("tuned"))
    found = [_kept(figure, was.get(figure.name), now.get(figure.name)) for figure in found]
    step = number(record.result.get("step"))
    when = f", update {step:g}, of {record.done} that are done" if step is not None and step < record.done else ""
    return found, f"Base against tuned{when}: {record.result.get('source')}; intervals of 95% over prompts."


def _watched(record: Record) -> tuple[list[Figure], str]:
    measures = [as_row(row.get("measures")) for row in record.watch]
    if len(measures) < 2:
        return [], ""
    found = list(_between(measures[0], measures[-1]))
    return found, f"The watch's fixed prompts and seeds, the base against update {record.watch[-1]['step']}."


def _between(first: Row, last: Row) -> Iterator[Figure]:
    for name, value in first.items():
        was, now = number(value), number(last.get(name))
        if was is not None and now is not None:
            tone = _tone(now - was, CLEAR) if name in REWARDS else "plain"
            yield _kept(Figure(words(name), signed(was), signed(now), _plus(now - was), tone=tone), was, now)


def _trained(record: Record) -> tuple[list[Figure], str]:
    found = [_tenths(curve(record.updates, "reward")[1], "training reward")]
    for name in names(record.updates, "reward_by_aspect"):
        values = curve(record.updates, "reward_by_aspect", name)[1]
        found.append(_tenths(values, f"training reward: {ASPECTS.get(name, name)}"))
    source = "Means of the first and the last tenth of the updates, on their own prompts."
    return [figure for figure in found if figure], source


def _tenths(values: Sequence[float], name: str) -> Figure | None:
    """The first tenth of the updates against the last; a change within twice its standard error is none."""
    part = max(1, len(values) // 10)
    first, last = values[:part], values[-part:]
    if len(values) < 2:
        return None
    was, now = statistics.fmean(first), statistics.fmean(last)
    error = math.sqrt(sum(statistics.variance(one) / len(one) for one in (first, last))) if part > 1 else 0.0
    return Figure(name, signed(was), signed(now), _plus(now - was), tone=_tone(now - was, max(CLEAR, 2 * error)))


def _kept(figure: Figure, before: object, after: object) -> Figure:
    """What training should have left as it was: its share of the base's in the place of the change."""
    was, now = number(before), number(after)
    if figure.name not in KEPT or not was or now is None:
        return figure
    return replace(figure, change=f"{now / was:.0%}", ends="", tone="bad" if now < LEAST_KEPT * was else "plain")


def _tone(change: float, clear: float) -> Tone:
    return "plain" if abs(change) < clear else "good" if change > 0 else "bad"


def _plus(change: float) -> str:
    return _minus(f"{change:+z.3f}")


def _minus(text: str) -> str:
    return text.replace("-", "−") if any(letter.isdigit() for letter in text) else text
