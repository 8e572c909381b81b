"""docs/evidence.md's tables and plots, from the files of ``bench/results/evidence``."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.evidence import alarms
from bench.evidence.variants import LATE, SCREEN, VARIANTS
from lowmem_drf.files import write_text

DOCS = Path(__file__).parents[2] / "docs"
PAGE, IMAGES = DOCS / "evidence.md", DOCS / "images"
SPLITS = Path(__file__).parents[1] / "results" / "splits.json"
HEADS: tuple[str, ...] = ("", "updates", "seeds", "all correct", "physics", "quality", "held out", "second critic")
HEADS += ("diversity", "drift", "radius", "spread", "edge", "passes", "s")


def read(folder: Path) -> list[dict[str, Any]]:
    """The results of all variants that there are, in the order of ``VARIANTS``."""
    results = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    order = list(VARIANTS)
    known = ({**result, "group": VARIANTS[result["variant"]].group} for result in results if result["variant"] in order)
    return sorted(known, key=lambda result: (order.index(result["variant"]), result["seed"]))


def table(results: Sequence[Mapping[str, Any]], group: str) -> str:
    """Markdown: the base of each preset, and each variant of the group after its last update; means over seeds, in
    brackets each seed's all-correct rate. Runs of other lengths than the default one stand without it."""
    beside = {"default"} if group not in ("main", "short", "long") else set()
    mine = [result for result in results if result["group"] == group or result["variant"] in beside]
    lines = [f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
    for preset in dict.fromkeys(result["preset"] for result in mine):
        first = next(result for result in mine if result["preset"] == preset)
        lines.append(_line(f"base of `{preset}`", [first["rows"][0]], {}))
    for name in dict.fromkeys(result["variant"] for result in mine):
        own = [result for result in mine if result["variant"] == name]
        done = min(last(result)["step"] for result in own)
        lines.append(_line(f"`{name}`: {VARIANTS[name].says}", [at(result, done) for result in own], own[0]))
    return "\n".join(lines)


FRONT = ("default", "short", "short_few", "short_few_huber", "short_few_four", "far", "far_draft_1")
"""Variants of other tables that the plot of truth against drift has too."""


STRENGTHS: tuple[str, ...] = ("default", "short", "short_few_huber", "short_few_four", "long_few", "long_last")
STRENGTHS += ("long_four", "far", "far_draft_1", "far_yesno", "far_free")


def scales(results: Sequence[Mapping[str, Any]], names: Sequence[str] = STRENGTHS) -> str:
    """Markdown: the last checkpoint of some variants at several strengths of the LoRA, times that of its training."""
    lines = [f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
    for name in names:
        if not (own := [result for result in results if result["variant"] == name]):
            continue
        done, used = min(last(result)["step"] for result in own), strength(name)
        for scale in sorted({row["scale"] for result in own for row in result["rows"]}, reverse=True):
            rows = [row for result in own for row in result["rows"] if (row["step"], row["scale"]) == (done, scale)]
            lines.append(_line(f"`{name}`, LoRA x {used * scale:g}", rows, own[0]))
    return "\n".join(lines)


LATES = ("default", "short_few_four", "long_few", "long_last", "long_four", "far", "far_draft_1")


def late(results: Sequence[Mapping[str, Any]], names: Sequence[str] = LATES) -> str:
    """Markdown: the last checkpoint of some variants used in all steps, and at low noise alone (``lora.max_sigma``)."""
    lines = [f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
    for name in names:
        own = [result for result in results if result["variant"] == name and result.get("late")]
        for scale in sorted({row["scale"] for result in own for row in result["late"]}):
            done, used = last(own[0])["step"], strength(name) * scale
            everywhere = [
                row for result in own for row in result["rows"] if (row["step"], row["scale"]) == (done, scale)
            ]
            lines.append(_line(f"`{name}`, LoRA x {used:g}", everywhere, own[0]))
            rows = [row for result in own for row in result["late"] if row["scale"] == scale]
            lines.append(_line(f"the same, up to sigma {LATE:g}", rows, own[0]))
    return "\n".join(lines)


PARTS = ("size", "edge", "outline", "saturation", "texture", "speed", "x", "y")


def parts(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: what drift is the mean of, of the main table's runs, and of the best one used in all steps and at low
    noise alone; means over seeds."""
    lines = [f"|  | {' | '.join(PARTS)} |", "|---" * (len(PARTS) + 1) + "|"]
    mine = [result for result in results if result["group"] == "main"]
    rows: dict[str, list[Mapping[str, Any]]] = {"base of `toy-fast`": [mine[0]["rows"][0]]} if mine else {}
    for result in mine:
        rows.setdefault(f"`{result['variant']}`", []).append(last(result))
    for result in (result for result in results if result["variant"] == (name := "long_few")):
        more = max(row["scale"] for row in result["late"])
        said = f"`{name}`, LoRA x {strength(name) * more:g}"
        rows.setdefault(said, []).extend(row for row in result["rows"] if row["scale"] == more)
        rows.setdefault(f"{said}, up to sigma {LATE:g}", []).extend(r for r in result["late"] if r["scale"] == more)
    for name, own in rows.items():
        cells = (f"{fmean(drift_of(row, part) for row in own):.2f}" for part in PARTS)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def strength(name: str) -> float:
    """``lora.scale`` of a variant, the last that is given: a row's scale is times it."""
    given = [text.removeprefix("lora.scale=") for text in VARIANTS[name].overrides if text.startswith("lora.scale=")]
    return float(given[-1] if given else 1)


def splits(_: Sequence[Mapping[str, Any]], file: Path = SPLITS) -> str:
    """Markdown: what ``bench.evidence.splits`` measured, base and tuned."""
    runs = json.loads(file.read_text(encoding="utf-8"))["runs"]
    names = list(dict.fromkeys(name for found in runs.values() for name in found))
    lines = [f"|  | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for run, found in runs.items():
        for who in ("base", "tuned"):
            lines.append(f"| `{run}`, {who} | {' | '.join(f'{found[name][who]:.1%}' for name in names)} |")
    return "\n".join(lines)


def last(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row of the last measured checkpoint at full strength."""
    row: Mapping[str, Any] = max((row for row in result["rows"] if row["scale"] == 1), key=lambda row: row["step"])
    return row


def at(result: Mapping[str, Any], step: int) -> Mapping[str, Any]:
    row: Mapping[str, Any] = next(row for row in result["rows"] if (row["step"], row["scale"]) == (step, 1))
    return row


def drift_of(row: Mapping[str, Any], key: str = "mean") -> float:
    """NaN where no clip shows a shape."""
    return float(row["drift"].get(key, math.nan))


def _line(name: str, rows: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> str:
    def mean(values: Iterable[float]) -> float:
        return fmean(values)

    each = ", ".join(f"{row['oracle']['all'] * 100:.1f}" for row in rows)
    rates = {rate: mean(row["oracle"][rate] for row in rows) for rate in ("all", "physics", "quality")}
    drift = {key: mean(drift_of(row, key) for row in rows) for key in ("mean", "radius", "radius_spread", "edge_px")}
    whole = {key: mean(row[key] for row in rows) for key in ("heldout_reward", "second", "diversity", "updates_s")}
    cells = [name, str(rows[0]["step"]), str(len(rows))]
    cells += [f"{rates['all']:.1%}" + (f" ({each})" if len(rows) > 1 else "")]
    cells += [f"{rates['physics']:.1%}", f"{rates['quality']:.1%}"]
    cells += [f"{whole['heldout_reward']:.3f}", f"{whole['second']:.3f}", f"{whole['diversity']:.3f}"]
    cells += [f"{drift[key]:.2f}" for key in drift]
    cells += [str(result["passes"]), f"{whole['updates_s']:.0f}"] if result else ["", ""]
    return f"| {' | '.join(cells)} |"


def write_page(results: Sequence[Mapping[str, Any]], page: Path = PAGE) -> None:
    """Replaces what stands between the page's marks ``<!-- table: NAME -->`` and ``<!-- end -->``."""
    text = page.read_text(encoding="utf-8")
    write_text(page, re.sub(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", lambda found: _filled(found, results), text,
                            flags=re.DOTALL))  # fmt: skip


def _filled(found: re.Match[str], results: Sequence[Mapping[str, Any]]) -> str:
    own = {"scales": scales, "late": late, "parts": parts, "splits": splits, "alarms": alarms.table}
    return f"{found[1]}{own.get(found[2], partial(table, group=found[2]))(results)}\n{found[3]}"


def plots(results: Sequence[Mapping[str, Any]], folder: Path = IMAGES) -> None:
    """``evidence_far.svg`` and ``evidence_long.svg``: what happens with more updates. ``evidence_front.svg``: truth
    against drift and diversity, of long and short runs their end; dotted: more than the LoRA's strength.
    ``evidence_late.svg``: the same of a LoRA used in all steps, and at low noise alone."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.hashsalt": "evidence", "svg.fonttype": "none", "font.size": 9}
    _curves([result for result in results if result["group"] == "main"], folder / "evidence_far.svg")
    _curves([result for result in results if result["group"] in ("free", "long")], folder / "evidence_long.svg")
    figure, both = plt.subplots(1, 2, figsize=(9, 4.6), sharey=True, layout="constrained")
    shown = [result for result in results if result["group"] in ("drift", "long") or result["variant"] in FRONT]
    for number, name in enumerate(dict.fromkeys(result["variant"] for result in shown)):
        style: dict[str, Any] = {"color": f"C{number % 10}", "marker": "os^"[number // 10], "lw": 0.8, "ms": 4}
        for place, result in enumerate(result for result in shown if result["variant"] == name):
            rows = [row for row in result["rows"] if row["scale"] == 1 and row["step"]]
            rows = rows if result["updates"] == SCREEN else rows[-1:]  # a long path hides all others
            more = [row for row in result["rows"] if row["scale"] > 1]
            for axes, measure in zip(both, FRONTS.values(), strict=True):
                axes.plot(*_front(rows, measure), label=None if place else name, **style)
                if more:
                    axes.plot(*_front([rows[-1], *more], measure), **style, ls=":", mfc="none")
    _finish(figure, both, results[0]["rows"][0]["diversity"], folder / "evidence_front.svg")
    figure, both = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for number, name in enumerate(LATES[2:]):
        own = [result for result in results if result["variant"] == name and result.get("late")]
        ends = [row for result in own for row in result["rows"] if row["step"] == last(result)["step"]]
        for rows, style in ((ends, {"ls": ":", "mfc": "none"}), ([r for result in own for r in result["late"]], {})):
            each = [[row for row in rows if row["scale"] == scale] for scale in sorted({row["scale"] for row in rows})]
            truth = [100 * fmean(row["oracle"]["all"] for row in some) for some in each]
            label = None if rows is ends else name
            for axes, measure in zip(both, FRONTS.values(), strict=True):
                means = [fmean(measure(row) for row in some) for some in each]
                axes.plot(means, truth, label=label, color=f"C{number}", marker="o", lw=1, ms=4, **style)
    _finish(figure, both, results[-1]["rows"][0]["diversity"], folder / "evidence_late.svg")
    plt.close("all")


def _finish(figure: Any, both: Sequence[Any], base: float, path: Path) -> None:
    """Words, grid and legend of a plot of truth against ``FRONTS``; ``base``: its diversity."""
    for axes, says in zip(both, FRONTS, strict=True):
        axes.set(xlabel=says)
        axes.grid(alpha=0.3)
    both[0].set(ylabel="held-out clips all correct, %")
    both[1].axvline(base, color="gray", lw=0.8, ls="--")
    figure.legend(*both[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    _save(figure, path)


CURVES: tuple[tuple[str, Callable[[Any], float]], ...] = (
    ("all correct, %", lambda row: 100 * row["oracle"]["all"]),
    ("drift", drift_of),
    ("held-out questions", lambda row: row["heldout_reward"]),
    ("diversity", lambda row: row["diversity"]),
)


FRONTS: dict[str, Callable[[Any], float]] = {
    "drift: distance from ToyWorld's own clips": drift_of,
    "diversity (dashed: the base's)": lambda row: row["diversity"],
}
"""What truth is drawn against."""


def _curves(shown: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Each run a line over its updates, each variant a colour."""
    import matplotlib.pyplot as plt

    figure, all_axes = plt.subplots(2, 2, figsize=(8, 5.2), sharex=True, layout="constrained")
    for axes, (words, value) in zip(all_axes.flat, CURVES, strict=True):
        for number, name in enumerate(dict.fromkeys(result["variant"] for result in shown)):
            for place, result in enumerate(result for result in shown if result["variant"] == name):
                rows = [row for row in result["rows"] if row["scale"] == 1]
                color, label = f"C{number}", None if place else name
                axes.plot([row["step"] for row in rows], [value(row) for row in rows], color=color, label=label, lw=1.2)
        axes.set_title(words, loc="left", fontsize=9)
        axes.grid(alpha=0.3)
    for axes in all_axes[1]:
        axes.set_xlabel("updates")
    figure.legend(*all_axes[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    _save(figure, path)


def _front(rows: Sequence[Mapping[str, Any]], measure: Callable[[Any], float]) -> tuple[list[float], list[float]]:
    return [measure(row) for row in rows], [100 * row["oracle"]["all"] for row in rows]


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    write_text(path, "\n".join(line.rstrip() for line in path.read_text(encoding="utf-8").splitlines()) + "\n")
