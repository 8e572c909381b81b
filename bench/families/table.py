"""The README's table of families, from ``bench/results/families.json`` and the headers of the presets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.families.tiny import name_of
from bench.plans.fit import README, card_presets, header_line, measured
from lowmem_drf.config import load_config
from lowmem_drf.models.family import Family
from lowmem_drf.models.generators import FAMILIES
from lowmem_drf.preset_files import preset_card, presets

RESULTS = Path(__file__).resolve().parents[1] / "results" / "families.json"
MARKS = "<!-- families: begin -->\n", "<!-- families: end -->\n"
COLUMNS = (
    "family", "relay against one graph, fp64", "decode against the library's", "export in diffusers",
    "reward after 20 updates", "planned peak", "measured on a card",
)  # fmt: skip


def read() -> dict[str, Any]:
    """The results by family."""
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))["families"] if RESULTS.exists() else {}
    return found


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown. A family without results has none in its row."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for family in FAMILIES:
        row, own = rows.get(name_of(family)), presets_of(family)
        cells = ["not measured"] * 4
        if row:
            graded = f"K = {', '.join(list(row['relay'])[:-1])}, all: {shown(max(row['relay'].values()))}"
            rises = "; ".join(f"{one['rise']:+.2f} ± {one['error']:.2f}" for one in row["trainings"].values())
            cells = [graded, shown(row["decode"]), shown(row["export"]), rises]
        peaks = ", ".join(
            f"{peak(name)} on {preset_card(presets()[name]).partition(' (')[0]} (`{name}`)" for name in smallest(own)
        )
        on_card = {measured(name) for name in own} or {"not yet"}
        lines.append(f"| {' | '.join([family.NAME, *cells, peaks or 'no preset', ', '.join(sorted(on_card))])} |")
    return "\n".join(lines) + "\n"


def shown(difference: float) -> str:
    return f"{difference:.0e}" if difference else "0"


def presets_of(family: Family) -> list[str]:
    """Presets for cards, small cards first."""
    return [name for name in card_presets() if load_config(name).model.id in family.KNOWN]


def smallest(names: list[str]) -> list[str]:
    """For each generator, the preset of the smallest card."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(load_config(name).model.id, name)
    return list(first.values())


def peak(name: str) -> str:
    """Of a preset's ``# Plan:`` line."""
    return header_line(name, "Plan").partition(" at the peak")[0]


def page(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The README with its table."""
    before, _, rest = README.read_text(encoding="utf-8").partition(MARKS[0])
    return before + MARKS[0] + table(rows) + MARKS[1] + rest.partition(MARKS[1])[2]
