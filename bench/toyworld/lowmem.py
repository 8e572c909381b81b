"""ToyWorld trained under every way of keeping frozen weights: does what saves memory change what is learned?

    python -m bench.toyworld.lowmem --updates 80 --json bench/results/toy_lowmem.json

{16 bit, NF4, 8 bit} x {transformer resident, streamed} x {critic resident, parked, streamed}: 18 trainings with the
same seed, one after another. Promised: for each number format the trained LoRA is the same file to the byte, wherever
the weights were kept, and the oracle's all-correct rate rises. Clips are measured once for LoRAs that are the same.
Exit code 1 if a promise is broken.
"""

from __future__ import annotations

import argparse
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

from bench.versions import versions
from lowmem_drf.assembly.loading import load_models
from lowmem_drf.commands.train import train_command
from lowmem_drf.errors import LowmemError
from lowmem_drf.scoring.evaluate import compare, finish_trial, make_trial
from lowmem_drf.training.checkpoint import checkpoint_folder
from lowmem_drf.training.lora_file import load_run_lora
from lowmem_drf.training.metrics import read_metrics
from lowmem_drf.training.run_folder import run_config

FORMATS = {"16 bit": "none", "NF4": "nf4", "8 bit": "int8"}
TRANSFORMER = {"resident": ([], []), "streamed": (["transformer"], [])}
CRITIC = {"resident": ([], []), "parked": ([], ["critic"]), "streamed": (["critic"], [])}
"""Name -> what it adds to memory.stream and to memory.park."""
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
    """One training: its settings, and the hash of what it learned."""
    run = folder / "-".join((form, transformer, critic)).replace(" ", "")
    # the rate falls to 0 at the last update, whatever their number
    train_command(
        "toy",
        None,
        run,
        updates,
        0,
        False,
        [*settings(form, transformer, critic), "log.eval_prompts=0", "log.sample_every=0", *overrides],
        False,
    )
    learned = (checkpoint_folder(run) / "lora.safetensors").read_bytes()
    seconds = sum(row["update_s"] for row in read_metrics(run))
    return {
        "format": form,
        "transformer": transformer,
        "critic": critic,
        "run": run,
        "lora": hashlib.sha256(learned).hexdigest(),
        "updates_s": seconds,
    }


def measure(run: Path, console: Console) -> dict[str, Any]:
    """Base and tuned, as ``eval`` measures them."""
    config = run_config(run)
    trial = make_trial(config, (), PROMPTS, SEEDS)
    models = load_models(config, [prompt.text for prompt in trial.prompts])
    load_run_lora(models.transformer, run, config)
    models.awake("critic")
    return compare(config, models, finish_trial(config, trial, models.asked_critic, console), console)


def verdict(row: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    """What is broken; empty where the promises are kept. ``first``: of the same format, everything resident."""
    broken = [] if row["lora"] == first["lora"] else ["learned something else than with resident weights"]
    if row["tuned"]["oracle"]["all"] <= row["base"]["oracle"]["all"]:
        broken.append("the oracle does not rise")
    return "; ".join(broken)


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    made = Table("format", "transformer", "critic", "all correct", "physics", "updates", "as resident, to the byte")
    for row in rows:
        rates = [
            f"{row['base']['oracle'][name]:.1%} -> {row['tuned']['oracle'][name]:.1%}" for name in ("all", "physics")
        ]
        made.add_row(
            row["format"],
            row["transformer"],
            row["critic"],
            *rates,
            f"{row['updates_s']:.0f} s",
            row["verdict"] or "yes",
        )
    return made


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.toyworld.lowmem", description=__doc__.partition("\n")[0] if __doc__ else None
    )
    parser.add_argument("--updates", type=int, default=80)
    parser.add_argument(
        "-s",
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key; repeatable",
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    options = parser.parse_args(arguments)
    console = Console(soft_wrap=True)
    rows: list[dict[str, Any]] = []
    measured: dict[tuple[str, str], dict[str, Any]] = {}
    try:
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
    except LowmemError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "updates": options.updates,
            "set": options.overrides,
            "threads": torch.get_num_threads(),
            "versions": versions("torch", "diffusers", "transformers", "peft", "bitsandbytes"),
            "rows": rows,
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if not any(row["verdict"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
