"""The result as a table: on the console and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from bench.card.parent import Result

COLUMNS = ("section", "what", "expected", "measured", "difference", "", "note")
STYLES = {"ok": "green", "off": "yellow", "wrong": "bold red", "failed": "red"}


def cells(result: Result) -> list[tuple[str, ...]]:
    """A section's lines: its rows, and one that says how it ended if it is not done."""
    lines = [_cells(result.name, row) for row in result.rows]
    if result.outcome != "done":
        lines.append((result.name, "the section", "", "", "", result.outcome, result.reason))
    return lines


def _cells(section: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    expected, measured = row["expected"], row["measured"]
    numbers = isinstance(expected, int | float) and isinstance(measured, int | float)
    apart = f"{measured / expected - 1:+.0%}" if numbers and expected else ""
    shown = (_shown(value, row["unit"]) for value in (expected, measured))
    return section, row["what"], *shown, apart, row["state"], row["note"]


def _shown(value: Any, unit: str) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:.4g} {unit}".strip()


def rich_table(result: Result) -> Table:
    """One section, for the console."""
    title = f"{result.name}: {result.outcome}, {result.seconds:.0f} s"
    made = Table(*COLUMNS[1:], title=Text(title, STYLES["ok" if result.good else "wrong"]), title_justify="left")
    for _, *line in cells(result):
        made.add_row(*map(Text, line), style=STYLES.get(line[4]))
    return made


def markdown(heading: str, results: Iterable[Result]) -> str:
    """All sections."""
    lines = [f"# {heading}", "", _line(COLUMNS), _line(["---"] * len(COLUMNS))]
    lines += [_line(line) for result in results for line in cells(result)]
    return "\n".join(lines) + "\n"


def _line(texts: Iterable[str]) -> str:
    return "| " + " | ".join(" ".join(text.replace("|", "/").split()) for text in texts) + " |"
