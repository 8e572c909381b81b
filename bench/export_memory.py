"""How much host memory do ``export-lora`` and ``--merge`` take at a model's true size?

    python -m bench.export_memory
    python -m bench.export_memory --merge --json bench/results/export_memory.json

It makes a run's folder as ``train`` leaves it, with a LoRA of random numbers on all linear layers of the blocks, and a
generator's folder in the hub's layout, whose weights are zeros in sparse files that take no disk. The command runs in a
process of its own. Its peak is what the kernel reports (``ru_maxrss``): all resident pages, also those of files that
are mapped into memory. ``--merge`` writes a whole transformer in bf16 into the temporary folder: 2.8 GB for 1.3B.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.versions import versions
from lowmem_drf.config import load_config, to_toml
from lowmem_drf.models.generators import KNOWN_GENERATORS
from lowmem_drf.models.wan.random_generator import empty_text, empty_transformer, empty_vae
from lowmem_drf.models.weights.files import MODEL_INDEX

MODELS = {
    "1.3B": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "5B": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    "14B": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
}
PRESET = "rtx4090"
CLASSES = {"transformer": "WanTransformer3DModel", "vae": "AutoencoderKLWan", "text_encoder": "UMT5EncoderModel"}


def write_sparse(file: Path, model: torch.nn.Module) -> None:
    """A safetensors file with a model's parameters in fp32, all zeros."""
    header: dict[str, Any] = {}
    end = 0
    for name, parameter in model.named_parameters():
        start, end = end, end + 4 * parameter.numel()
        header[name] = {"dtype": "F32", "shape": list(parameter.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)


def make_generator(folder: Path, model: str) -> None:
    """A diffusers folder of ``KNOWN_GENERATORS[model]``. Its tokenizer is empty: an export reads none."""
    known = KNOWN_GENERATORS[model].config
    made = {
        "transformer": (empty_transformer(known.transformer), known.transformer),
        "vae": (empty_vae(known.vae), known.vae),
        "text_encoder": (empty_text(known.text), known.text),
    }
    for name, (module, config) in made.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
        write_sparse(
            folder / name / f"{'model' if name == 'text_encoder' else 'diffusion_pytorch_model'}.safetensors", module
        )
    (folder / "tokenizer").mkdir()
    index = {"_class_name": "WanPipeline", **{name: ["diffusers", kind] for name, kind in CLASSES.items()}}
    (folder / MODEL_INDEX).write_text(json.dumps(index), encoding="utf-8")


def make_run(folder: Path, generator: Path, rank: int) -> None:
    """A run with one checkpoint, step 1. B is not zero, as after training."""
    from safetensors.torch import save_file

    overrides = [f"model.id={generator}", f"lora.rank={rank}"]
    config = load_config(PRESET, overrides)
    transformer = empty_transformer(json.loads((generator / "transformer" / "config.json").read_text(encoding="utf-8")))
    noise = torch.Generator().manual_seed(0)
    state = {}
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(tuple(f".{target}" for target in config.lora.targets)):
            for side, shape in (("A", (rank, module.in_features)), ("B", (module.out_features, rank))):
                state[f"{name}.lora_{side}.weight"] = torch.randn(shape, generator=noise) / math.sqrt(shape[1])
    checkpoint = folder / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    save_file(state, checkpoint / "lora.safetensors", metadata={"alpha": repr(config.lora.alpha)})
    (folder / "config.toml").write_text(to_toml(config), encoding="utf-8")


def measure(arguments: list[str]) -> dict[str, float]:
    """Peak of resident memory in GiB, and seconds, of a command in a process of its own. Raises CalledProcessError."""
    command = [sys.executable, "-m", "lowmem_drf", *arguments]
    start = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    kib = usage.ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return {"peak_gib": round(kib / 2**20, 2), "seconds": round(time.perf_counter() - start, 1)}


def table(rows: Mapping[str, Mapping[str, float]], title: str) -> Table:
    """The peaks as a table."""
    made = Table("command", "peak RSS, GiB", "seconds", title=title)
    for command, row in rows.items():
        made.add_row(command, f"{row['peak_gib']:.2f}", f"{row['seconds']:.0f}")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.export_memory", description=__doc__.partition("\n")[0] if __doc__ else None
    )
    parser.add_argument("--model", choices=tuple(MODELS), default="1.3B")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--merge", action="store_true", help="--merge as well")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        make_generator(place / "generator", MODELS[options.model])
        make_run(place / "run", place / "generator", options.rank)
        rows = {"export-lora": measure(["export-lora", str(place / "run")])}
        if options.merge:
            rows["export-lora --merge"] = measure(["export-lora", str(place / "run"), "--merge", str(place / "merged")])
    Console(soft_wrap=True).print(table(rows, f"{MODELS[options.model]}, rank {options.rank}"))
    if options.json:
        result = {
            "model": MODELS[options.model],
            "rank": options.rank,
            "versions": versions("torch", "diffusers", "peft", "safetensors"),
            **rows,
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
