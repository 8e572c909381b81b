"""Base against tuned as a table of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lowmem_drf.scoring.measures import MEASURES

if TYPE_CHECKING:
    from rich.console import Console

REWARDS = {
    "reward": "reward",
    "heldout_reward": "reward, held-out questions",
    "second_reward": "reward, second critic",
}
WINS = {
    "reward": "prompts won",
    "heldout_reward": "prompts won, held-out",
    "second_reward": "prompts won, second critic",
}
FORMS = {
    **dict.fromkeys(("motion", "flicker", "noise"), ".2%"),
    "freeze": ".1%",
    **dict.fromkeys(("ti", "si"), ".1f"),
    **dict.fromkeys(("blur", "blocking"), ".2f"),
}
"""Of measures of clips; of others three decimals."""
NAMES = {"ti": "temporal information", "si": "spatial information", "velocity_norm": "velocity norm"}
WIDTH = 79
"""Columns of the widest table."""
GROUPS = {"oracle": ".1%", "drift": ".2f", "vbench": ".3f"}


def print_table(result: Mapping[str, Any], console: Console) -> None:
    """Prints a ``result.Result``, one line per measure: base, tuned, and the change between its ends, bold if the
    interval is on one side of zero (of half of the prompts, for wins). A narrow terminal gets no intervals."""
    from rich.table import Table

    wide = console.width >= WIDTH
    table = Table("", "base", "tuned", "change (95% over prompts)" if wide else "change")
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for section in sections(result):
        for name, base, tuned, change, ends, sure in section:
            cells = name, base, tuned, f"{change} {ends}".strip() if wide else change
            table.add_row(*cells, style="bold" if sure else "")
        table.add_section()
    console.print(table)


Line = tuple[str, str, str, str, str, bool]
"""Name, base, tuned, change, its interval, and whether it is sure."""


def sections(result: Mapping[str, Any]) -> Iterator[list[Line]]:
    """The lines of a ``result.Result``: rewards and prompts won, groups, measures of the clips."""
    base, tuned, changed = (result[part] for part in ("base", "tuned", "change"))

    def line(title: str, key: str, before: float | None, after: float | None, form: str) -> list[Line]:
        if before is None or after is None:
            return []
        found = changed.get(key, {"low": None, "high": None})
        signed = f"+z{form}"  # no minus zero
        change = format(after - before, signed)
        return [(title, format(before, f"z{form}"), format(after, f"z{form}"), change, *_interval(found, signed, 0))]

    rewards = []
    for key, title in REWARDS.items():
        rewards += line(title, key, base.get(key), tuned.get(key), ".3f")
        if key == "reward":
            for aspect, value in base["reward_by_aspect"].items():
                after = tuned["reward_by_aspect"].get(aspect)
                rewards += line(f"  {aspect}", f"reward_by_aspect.{aspect}", value, after, ".3f")
    for key, won in result["wins"].items():
        rewards.append((WINS[key], "", format(won["mean"], ".1%"), "", *_interval(won, ".1%", 0.5)))
    yield rewards
    for group, form in GROUPS.items():
        yield [
            row
            for name, value in (base.get(group) or {}).items()
            for row in line(
                f"{group}: {name.replace('_', ' ')}", f"{group}.{name}", value, (tuned.get(group) or {}).get(name), form
            )
        ]
    of_clips = ("diversity", *MEASURES, "velocity_norm")
    yield [
        row
        for name in of_clips
        for row in line(NAMES.get(name, name), name, base[name], tuned[name], FORMS.get(name, ".3f"))
    ]


def _interval(interval: Mapping[str, Any], form: str, middle: float) -> tuple[str, bool]:
    """In words, and whether it is on one side of the middle."""
    low, high = interval["low"], interval["high"]
    if low is None or high is None:
        return "", False
    return f"({low:{form}} … {high:{form}})", not low <= middle <= high
