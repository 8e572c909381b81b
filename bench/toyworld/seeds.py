"""Does ToyWorld's training keep its promises, for every training seed?

    python -m bench.toyworld.seeds --seeds 0 1 2 --json bench/results/toy_seeds.json

For each seed: ``train``, then base against tuned on 128 held-out prompts x 2 seeds, as measured by ``eval``. Promises:
the oracle's all-correct rate rises by 35 points or more, physics and quality do not fall, diversity over seeds keeps
80% or more. Exit code 1 if a promise is broken.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table

from bench.script import add_overrides, make_parser, reports_errors, save
from lowmem_drf.assembly.loading import load_models
from lowmem_drf.commands.train import train_command
from lowmem_drf.scoring.evaluate import EVAL_PROMPTS, EVAL_SEEDS, compare, finish_trial, make_trial
from lowmem_drf.training import loop
from lowmem_drf.training.checkpoint import checkpoint_folder
from lowmem_drf.training.lora_file import load_run_lora
from lowmem_drf.training.metrics import read_metrics
from lowmem_drf.training.run_folder import run_config

RISE, KEPT_DIVERSITY = 0.35, 0.8
RATES = ("all", "physics", "quality")
LIBRARIES = ("torch", "diffusers", "transformers", "peft")
"""The figures depend on their versions."""


def train_and_measure(
    seed: int, preset: str, overrides: Sequence[str], folder: Path, console: Console
) -> dict[str, Any]:
    """One row: ``seed``, ``train_s`` (the whole command), ``updates``, ``updates_s`` (the updates alone), both also as
    the process's CPU time (``train_cpu_s``, ``updates_cpu_s``), ``base``, ``tuned``, ``verdicts``."""
    run = folder / f"seed-{seed}"
    start, cpu = time.perf_counter(), time.process_time()
    with update_times() as updates_cpu:
        train_command(preset, None, run, None, seed, False, [*overrides, "log.eval_prompts=0"], False)
    train_s, train_cpu_s = time.perf_counter() - start, time.process_time() - cpu
    config = run_config(run)
    trial = make_trial(config, (), EVAL_PROMPTS, EVAL_SEEDS)
    models = load_models(config, trial.prompts)
    load_run_lora(models.transformer, checkpoint_folder(run), config)
    models.awake("critic")
    trial = finish_trial(config, trial, models.asked_critic, console)
    result = compare(config, models, trial, console)
    base, tuned = result["base"], result["tuned"]
    metrics = read_metrics(run)
    timed = {"train_s": train_s, "updates": len(metrics), "updates_s": sum(row["update_s"] for row in metrics)}
    timed |= {"train_cpu_s": train_cpu_s, "updates_cpu_s": sum(updates_cpu)}
    return {"seed": seed, **timed, "base": base, "tuned": tuned, "verdicts": verdicts(base, tuned)}


@contextmanager
def update_times() -> Iterator[list[float]]:
    """CPU seconds of each update that is made meanwhile. Unlike ``update_s``, other work hardly changes them."""
    seconds, real = list[float](), loop.update

    def timed(*arguments: Any) -> Any:
        start = time.process_time()
        try:
            return real(*arguments)
        finally:
            seconds.append(time.process_time() - start)

    with patch.object(loop, "update", timed):
        yield seconds


def verdicts(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> dict[str, bool]:
    """Promise -> kept. The arguments are the two sides of ``eval --json``."""
    before, after = base["oracle"], tuned["oracle"]
    return {
        f"all-correct rises by {RISE * 100:.0f} points": after["all"] - before["all"] >= RISE,
        "physics does not fall": after["physics"] >= before["physics"],
        "quality does not fall": after["quality"] >= before["quality"],
        f"diversity keeps {KEPT_DIVERSITY:.0%}": tuned["diversity"] >= KEPT_DIVERSITY * base["diversity"],
    }


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One line per seed: base -> tuned."""
    made = Table("seed", *RATES, "diversity kept", "updates", "train", "promises")
    for row in rows:
        base, tuned = row["base"], row["tuned"]
        rates = [f"{base['oracle'][name]:.1%} -> {tuned['oracle'][name]:.1%}" for name in RATES]
        kept = "kept" if all(row["verdicts"].values()) else "BROKEN"
        diversity = f"{tuned['diversity'] / base['diversity']:.0%}"
        made.add_row(str(row["seed"]), *rates, diversity, f"{row['updates_s']:.0f} s", f"{row['train_s']:.0f} s", kept)
    return made


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    parser = make_parser(__spec__.name, __doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds")
    parser.add_argument("--preset", default="toy")
    add_overrides(parser)
    text = "a folder that keeps the runs (seed-0, seed-1, …); default: a temporary one"
    parser.add_argument("--output", type=Path, help=text)
    options = parser.parse_args(arguments)
    console = Console(soft_wrap=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.output or Path(temporary)
        for seed in options.seeds:
            rows.append(train_and_measure(seed, options.preset, options.overrides, folder, console))
            console.print(table(rows))
            for promise in (promise for promise, kept in rows[-1]["verdicts"].items() if not kept):
                console.print(f"seed {seed}: broken: {promise}", highlight=False)
    setting = {"preset": options.preset, "set": options.overrides, "threads": torch.get_num_threads()}
    save(options.json, setting | {"rows": rows}, *LIBRARIES)
    return 0 if all(kept for row in rows for kept in row["verdicts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
