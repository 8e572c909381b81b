"""A ToyWorld training on the card, with PyTorch's operations and with ours, against the CPU's."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.card.rows import Row, at_most
from lowmem_drf.errors import LowmemError
from lowmem_drf.training.metrics import read_metrics

STEPS = 2
SETTINGS = {
    "card": ("device=cuda",),
    "card with our kernels": ("device=cuda", "kernels.ops=fused", "kernels.attention=triton"),
}
LESS = ("batch=2", "micro_batch=2", "log.eval_prompts=0", "sampler.steps=4", "sampler.graded_steps=4")
LIMITS = {"reward": 0.01, "grad_norm": 0.05}
"""Relative. Convolutions of fp32 run in TF32 on a card, and the second update starts from other weights."""


def toyworld() -> Iterator[Row]:
    """Rewards and gradient norms of the first updates."""
    with tempfile.TemporaryDirectory() as folder:
        on_cpu = _train(Path(folder) / "cpu", ("device=cpu",))
        for n, (name, keys) in enumerate(SETTINGS.items()):
            for step, (ours, cpu) in enumerate(zip(_train(Path(folder) / str(n), keys), on_cpu, strict=True), 1):
                if "skipped" in ours:
                    yield Row(f"{name}: update {step}", "was skipped", state="wrong", note="its values are not finite")
                    continue
                for key, limit in LIMITS.items():
                    note = f"CPU {cpu[key]:.6g}, here {ours[key]:.6g}"
                    yield at_most(f"{name}: {key} of update {step}", abs(ours[key] / cpu[key] - 1), "", limit, note)


def _train(folder: Path, keys: tuple[str, ...]) -> list[dict[str, float]]:
    command = [sys.executable, "-m", "lowmem_drf", "train", "--preset", "toy", "--steps", str(STEPS)]
    command += ["--output", str(folder), *(word for key in (*LESS, *keys) for word in ("-s", key))]
    if code := subprocess.run(command).returncode:
        raise LowmemError(f"{' '.join(command[1:])} ended with exit code {code}; its message is above")
    return read_metrics(folder)
