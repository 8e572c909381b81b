"""Does the placement of frozen weights change what ToyWorld's training learns?

    python -m bench.toyworld.lowmem --updates 80 --json bench/results/toy_lowmem.json

{16 bit, NF4, 8 bit} x {transformer resident, streamed} x {critic resident, parked, streamed}: 18 trainings with the
same seed, one after another. Promises: within a number format, the trained LoRA is the same file to the byte for every
placement, and the oracle's all-correct rate rises. Equal LoRAs are measured once. Exit code 1 if a promise is broken.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.script import add_overrides, make_parser, reports_errors, save
from lowmem_drf.assembly.loading import load_models
from lowmem_drf.commands.train import train_command
from lowmem_drf.scoring.evaluate import compare, finish_trial, make_trial
from lowmem_drf.training.checkpoint import checkpoint_folder
from lowmem_drf.training.lora_file import load_run_lora
from lowmem_drf.training.metrics import read_metrics
from lowmem_drf.training.run_folder import run_config

FORMATS = {"16 bit": "none", "NF4": "nf4", "8 bit": "int8"}
TRANSFORMER = {"resident": ([], []), "streamed": (["transformer"], [])}
CRITIC = {"resident": ([], []), "parked": ([], ["critic"]), "streamed": (["critic"], [])}
"""Name -> entries of memory.stream and of memory.park."""
PROMPTS, SEEDS = 64, 2


def settings(form: str, transformer: str, critic: str) -> list[str]:
    """The overrides of one training."""
    stream, park = (TRANSFORMER[transformer][i] + CRITIC[critic][i] for i in (0, 1))
    return [
        *("dtype=bf16", f"model.quant={FORMATS[form]}", "memory.checkpoint=true"),
        *(f"memory.stream={json.dumps(stream)}", f"memory.park={json.dumps(park)}"),
    ]


def train(
    form: str, transformer: str, critic: str, updates: int, folder: Path, overrides: Sequence[str]
) -> dict[str, Any]:
    """One training: its settings, and the hash of its LoRA."""
    run = folder / "-".join((form, transformer, critic)).replace(" ", "")
    changed = [*settings(form, transformer, critic), "log.eval_prompts=0", "log.sample_every=0", *overrides]
    train_command("toy", None, run, updates, 0, False, changed, False)  # the rate falls to 0 at the last update
    learned = (checkpoint_folder(run) / "lora.safetensors").read_bytes()
    seconds = sum(row["update_s"] for row in read_metrics(run))
    names = {"format": form, "transformer": transformer, "critic": critic}
    return {**names, "run": run, "lora": hashlib.sha256(learned).hexdigest(), "updates_s": seconds}


def measure(run: Path, console: Console) -> dict[str, Any]:
    """Base and tuned, as measured by ``eval``."""
    config = run_config(run)
    trial = make_trial(config, (), PROMPTS, SEEDS)
    models = load_models(config, trial.prompts)
    load_run_lora(models.transformer, checkpoint_folder(run), config)
    models.awake("critic")
    return compare(config, models, finish_trial(config, trial, models.asked_critic, console), console)


def verdict(row: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    """The broken promises; empty if there are none. ``first``: the row of the same format with everything resident."""
    broken = [] if row["lora"] == first["lora"] else ["learned something else than with resident weights"]
    if row["tuned"]["oracle"]["all"] <= row["base"]["oracle"]["all"]:
        broken.append("the oracle does not rise")
    return "; ".join(broken)


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    made = Table("format", "transformer", "critic", "all correct", "physics", "updates", "as resident, to the byte")
    for row in rows:
        base, tuned = row["base"]["oracle"], row["tuned"]["oracle"]
        rates = [f"{base[name]:.1%} -> {tuned[name]:.1%}" for name in ("all", "physics")]
        names = [row[key] for key in ("format", "transformer", "critic")]
        made.add_row(*names, *rates, f"{row['updates_s']:.0f} s", row["verdict"] or "yes")
    return made


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    parser = make_parser(__spec__.name, __doc__)
    parser.add_argument("--updates", type=int, default=80)
    add_overrides(parser)
    options = parser.parse_args(arguments)
    console = Console(soft_wrap=True)
    rows: list[dict[str, Any]] = []
    measured: dict[tuple[str, str], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for combination in product(FORMATS, TRANSFORMER, CRITIC):
            row = train(*combination, options.updates, Path(folder), options.overrides)
            key, run = (row["format"], row["lora"]), row.pop("run")
            if key not in measured:
                measured[key] = measure(run, console)
            row |= {side: measured[key][side] for side in ("base", "tuned")}
            first = next((other for other in rows if other["format"] == row["format"]), row)
            rows.append(row | {"verdict": verdict(row, first)})
            console.print(table(rows))
    result = {"updates": options.updates, "set": options.overrides, "threads": torch.get_num_threads(), "rows": rows}
    save(options.json, result, "torch", "diffusers", "transformers", "peft", "bitsandbytes")
    return 0 if not any(row["verdict"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
