"""Truth against time on ToyWorld, for each lever that makes an update cheaper: what the oracle says of held-out clips.

    python -m bench.evening                                  # all variants, seeds 0 1 2; goes on where it was stopped
    python -m bench.evening --variants toy toy-fast --seeds 0
    python -m bench.evening --report                         # the table and docs/images/evening.svg from what is there

For each variant and seed: ``train``, then ``eval``'s measures on 128 held-out prompts x 2 seeds, written to
``bench/results/evening/<variant>_<seed>.json``; what has a file is skipped. Time is twofold:

- *CPU s*: the process's CPU time (one thread: ``OMP_NUM_THREADS=1``), which other work on the machine hardly changes:
  of the updates alone, and of the whole ``train`` command, which also loads models and weighs the questions' words.
- *passes*: of a clip through the transformer, per update. A rollout step is one pass, two with guidance; a graded step
  is a forward and a backward of each branch that carries gradient, and a backward counts as one pass, because a frozen
  base needs the products with dX only: batch * (steps * (1 or 2) + graded_steps * (1 or 2) * 2), and three for the
  anchor (``optim.anchor``), or its share of them (``optim.anchor_every``).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.script import reports_errors, save
from bench.toyworld.seeds import LIBRARIES, train_and_measure
from lowmem_drf.config import load_config
from lowmem_drf.files import write_text
from lowmem_drf.schema import Config

SHORT = ("steps=100", "optim.lr=6e-4")
"""The levers are compared at fewer updates than ``toy-fast`` takes, and at the learning rate of ``toy``."""
RECORDED = (
    "memory.checkpoint=true",
    "memory.record_rollout=true",
    "kernels.graded_attention=int8",
    "kernels.rollout_attention=int8",
)
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "toy": ("toy", ()),
    "toy-half": ("toy", ("steps=100",)),
    "toy-frames5": ("toy", ("critic.frames=5",)),
    "toy-window1": ("toy", ("memory.vae_backward=window:1",)),
    "toy-guided-cond": ("toy", ("sampler.guidance=2",)),
    "toy-guided-both": ("toy", ("sampler.guidance=2", "sampler.guidance_grad=both")),
    "toy-fast": ("toy-fast", ("steps=140",)),
    "toy-fast-6e-4": ("toy-fast", ("steps=140", "optim.lr=6e-4")),
    "toy-fast-100": ("toy-fast", SHORT),
    "toy-fast-random2": ("toy-fast", (*SHORT, "sampler.graded=random", "sampler.graded_steps=2")),
    "toy-fast-random1": ("toy-fast", (*SHORT, "sampler.graded=random", "sampler.graded_steps=1")),
    "toy-fast-products": ("toy-fast", (*SHORT, "model.products=int8")),
    "toy-fast-attention": ("toy-fast", (*SHORT, *RECORDED)),
    "toy-fast-int8": ("toy-fast", (*SHORT, *RECORDED, "model.products=int8")),
    "toy-fast-tiny": ("toy-fast", (*SHORT, "model.decoder=tiny")),
    "toy-fast-tiny-backward": ("toy-fast", (*SHORT, "model.decoder=tiny_backward")),
}
"""Name -> preset and overrides. A new lever is a line."""
UNPREVIEWED = ("log.sample_every=0", "log.watch_every=0", "optim.anchor=0", "lora.scale=1")
UNPREVIEWED += ("batch=8", "micro_batch=8", "lora.alpha=16")
"""Clips for the eye of the user or of the watch are no part of the time that is compared. The rest is what ``toy-fast``
had then: its anchor, and what goes with it, came later (``bench.evidence``)."""
FOLDER = Path(__file__).parent / "results" / "evening"
PLOT = Path(__file__).parents[1] / "docs" / "images" / "evening.svg"
MARKERS = "os^"
"""Of ten variants each."""
RATES = ("all", "physics", "quality")


def passes(config: Config) -> int:
    """Of a clip through the transformer, per update (see above)."""
    sampler = config.sampler
    branches = 1 if sampler.guidance == 1 else 2
    graded = branches if sampler.guidance_grad == "both" else 1
    anchor = 3 / config.optim.anchor_every if config.optim.anchor else 0.0
    return round(config.batch * (sampler.steps * branches + sampler.graded_steps * graded * 2 + anchor))


def run(name: str, seed: int, folder: Path, console: Console) -> dict[str, Any]:
    """One training and its measures: the row of ``bench.toyworld.seeds``, and ``variant`` and ``passes``."""
    preset, own = VARIANTS[name]
    overrides = [*UNPREVIEWED, *own]
    row = train_and_measure(seed, preset, overrides, folder, console)
    counted = passes(load_config(preset, overrides))
    setting = {"variant": name, "preset": preset, "set": overrides, "threads": torch.get_num_threads()}
    return {**setting, "passes": counted, **row}


def read(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """The rows of all files of known variants, in the order of ``VARIANTS``."""
    rows = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    order = list(VARIANTS)
    return sorted((row for row in rows if row["variant"] in order), key=lambda row: order.index(row["variant"]))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line per variant, means over its seeds; in brackets each seed's all-correct rate."""
    heads = ("", "seeds", "all correct", "physics", "quality", "diversity", "updates", "passes", "CPU s", "train")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, own in by_variant(rows).items():
        each = ", ".join(f"{row['tuned']['oracle']['all'] * 100:.1f}" for row in own)
        truth = [f"{mean(row['tuned']['oracle'][rate] for row in own):.1%}" for rate in RATES]
        diversity = f"{mean(row['tuned']['diversity'] for row in own):.3f}"
        seconds = [f"{mean(row[key] for row in own):.0f}" for key in ("updates_cpu_s", "train_cpu_s")]
        cost = (str(own[0]["updates"]), str(own[0]["passes"]), *seconds)
        cells = [f"`{name}`", str(len(own)), f"{truth[0]} ({each})", *truth[1:], diversity, *cost]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mean(values: Any) -> float:
    return statistics.fmean(values)


def by_variant(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    return {name: [row for row in rows if row["variant"] == name] for name in dict.fromkeys(r["variant"] for r in rows)}


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """All-correct over the updates' CPU seconds: a small dot a seed, a large mark the mean."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.hashsalt": "evening", "svg.fonttype": "none", "font.size": 9}
    figure, axes = plt.subplots(figsize=(6, 4.4))
    for number, (name, own) in enumerate(by_variant(rows).items()):
        points = [(row["updates_cpu_s"], row["tuned"]["oracle"]["all"] * 100) for row in own]
        x, y = (mean(values) for values in zip(*points, strict=True))
        color, marker = f"C{number % 10}", MARKERS[number // 10]
        axes.scatter(*zip(*points, strict=True), s=8, color=color, alpha=0.4)
        axes.scatter([x], [y], s=50, color=color, marker=marker, label=name)
    axes.set(xlabel="CPU seconds of the updates", ylabel="held-out clips all correct, %", xlim=(0, None))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.margins(y=0.1)
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)
    write_text(path, "\n".join(line.rstrip() for line in path.read_text(encoding="utf-8").splitlines()) + "\n")


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Prints the table as it grows; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.evening", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds")
    parser.add_argument("--report", action="store_true", help="train nothing: the table and the plot of what is there")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the JSON files")
    parser.add_argument("--plot", type=Path, default=PLOT, help="SVG file to draw with --report")
    options = parser.parse_args(arguments)
    if not options.report:
        console = Console(soft_wrap=True, stderr=True)
        # seed by seed, so that what is stopped has every variant
        for name, seed in ((name, seed) for seed in options.seeds for name in options.variants):
            file = options.folder / f"{name}_{seed}.json"
            if not file.exists():
                with tempfile.TemporaryDirectory() as folder:
                    row = run(name, seed, Path(folder), console)
                file.parent.mkdir(parents=True, exist_ok=True)
                save(file, row, *LIBRARIES)
                print(table(read(options.folder)), flush=True)
        return 0
    rows = read(options.folder)
    print(table(rows))
    plot(rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
