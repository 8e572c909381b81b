"""Host memory of ``export-lora`` and of ``--merge`` at a model's true size.

    python -m bench.export_memory
    python -m bench.export_memory --merge --json bench/results/export_memory.json

Makes the folder of a run as ``train`` leaves it, with a random LoRA on all linear layers of the blocks, and the folder
of a generator in the hub's layout, with zero weights in sparse files that take no disk. The command runs in a separate
process. Its peak is the kernel's ``ru_maxrss``: all resident pages, memory-mapped files included. ``--merge`` writes a
whole transformer in bf16 into the temporary folder: 2.8 GB for 1.3B.
"""

from __future__ import annotations

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

from bench.script import make_parser, save
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
    """Writes a safetensors file with a model's parameters as fp32 zeros."""
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
    """Makes a diffusers folder of ``KNOWN_GENERATORS[model]``. Its tokenizer is empty: an export does not read it."""
    known = KNOWN_GENERATORS[model].config
    made = {
        "transformer": (empty_transformer(known.transformer), known.transformer),
        "vae": (empty_vae(known.vae), known.vae),
        "text_encoder": (empty_text(known.text), known.text),
    }
    for name, (module, config) in made.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        write_sparse(folder / name / f"{stem}.safetensors", module)
    (folder / "tokenizer").mkdir()
    index = {"_class_name": "WanPipeline", **{name: ["diffusers", kind] for name, kind in CLASSES.items()}}
    (folder / MODEL_INDEX).write_text(json.dumps(index), encoding="utf-8")


def make_run(folder: Path, generator: Path, rank: int) -> None:
    """Makes a run with one checkpoint, step 1. B is not zero, as after training."""
    from safetensors.torch import save_file

    config = load_config(PRESET, [f"model.id={generator}", f"lora.rank={rank}"])
    transformer = empty_transformer(json.loads((generator / "transformer" / "config.json").read_text(encoding="utf-8")))
    noise, targets = torch.Generator().manual_seed(0), tuple(f".{target}" for target in config.lora.targets)
    state = {}
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(targets):
            for side, shape in (("A", (rank, module.in_features)), ("B", (module.out_features, rank))):
                state[f"{name}.lora_{side}.weight"] = torch.randn(shape, generator=noise) / math.sqrt(shape[1])
    checkpoint = folder / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    save_file(state, checkpoint / "lora.safetensors", metadata={"alpha": repr(config.lora.alpha)})
    (folder / "config.toml").write_text(to_toml(config), encoding="utf-8")


def measure(arguments: list[str]) -> dict[str, float]:
    """Peak resident memory in GiB and seconds of a command in a separate process. Raises CalledProcessError."""
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
    made = Table("command", "peak RSS, GiB", "seconds", title=title)
    for command, row in rows.items():
        made.add_row(command, f"{row['peak_gib']:.2f}", f"{row['seconds']:.0f}")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    parser = make_parser(__spec__.name, __doc__)
    parser.add_argument("--model", choices=tuple(MODELS), default="1.3B")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--merge", action="store_true", help="also measure --merge")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        make_generator(place / "generator", MODELS[options.model])
        make_run(place / "run", place / "generator", options.rank)
        rows = {"export-lora": measure(["export-lora", str(place / "run")])}
        if options.merge:
            rows["export-lora --merge"] = measure(["export-lora", str(place / "run"), "--merge", str(place / "merged")])
    Console(soft_wrap=True).print(table(rows, f"{MODELS[options.model]}, rank {options.rank}"))
    result = {"model": MODELS[options.model], "rank": options.rank, **rows}
    save(options.json, result, "torch", "diffusers", "peft", "safetensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
