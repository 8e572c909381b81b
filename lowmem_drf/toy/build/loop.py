"""The training loop of ToyWorld's models: warm-up, decay, EMA, log lines, and checkpoints to resume from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Schedule:
    """Length and learning rate of one training."""

    steps: int
    lr: float
    warmup: int = 100
    floor: float = 0.02
    """The learning rate ends at this share of its peak, by a cosine."""
    ema: float | None = None
    clip: float = 1.0
    log_every: int = 50
    save_every: int = 200

    def share(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def scaled(count: int, scale: float) -> int:
    """``count`` steps or clips at the ``--scale`` of a build, at least one."""
    return max(1, int(count * scale))


@contextmanager
def half_products() -> Iterator[None]:
    """Matrix products in bfloat16 (weights stay fp32): twice as fast on a CPU with AVX512-BF16.

    With the MATH attention: for ToyWorld's few tokens its backward is ten times as fast there as the flash kernel's.
    """
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield


Loss = Callable[[int, torch.Generator], tuple[Tensor, dict[str, float]]]
"""(step, generator) -> (loss to minimise, values to log). All its randomness comes from the generator."""


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates (Newton-Schulz, K. Jordan 2024), for matrices and, flattened to matrices,
    convolutions.

    ``torch.optim.Muon`` takes two-dimensional weights only. Updates have the RMS of AdamW's (0.2 sqrt(max side)), so
    the two share one rate.
    """

    def __init__(
        self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(state["momentum"], group["momentum"]).flatten(1)
                tall = update.shape[0] > update.shape[1]
                x = (update.T if tall else update) / (update.norm() + 1e-7)
                for _ in range(5):
                    square = x @ x.T
                    x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
                x = x.T if tall else x
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(x.reshape(p.shape), alpha=-0.2 * group["lr"] * max(x.shape) ** 0.5)


def optimizers(model: nn.Module, lr: float, weight_decay: float = 0.01) -> list[torch.optim.Optimizer]:
    """Muon for the matrices and convolutions of ``model``, AdamW for embeddings, vectors and modules named ``head``."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [
        p
        for n, p in named
        if p.ndim >= 2 and min(p.flatten(1).shape) > 1 and not any(w in n for w in ("embed", "head", "shared", "table"))
    ]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    muon = Muon(matrices, lr=lr, weight_decay=weight_decay)
    return [torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0), muon] if rest else [muon]


def train(
    name: str,
    model: nn.Module,
    loss: Loss,
    schedule: Schedule,
    folder: Path,
    seed: int,
    log: Callable[[str], None] = print,
) -> None:
    """Trains ``model`` in place and leaves its EMA weights in it if the schedule has one.

    ``folder/<name>.pt`` is the checkpoint: if it exists, training resumes from it; a finished training is not repeated.
    """
    file = folder / f"{name}.pt"
    opts = optimizers(model, schedule.lr)
    rates = [group["lr"] for opt in opts for group in opt.param_groups]
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    ema = {n: p.detach().clone() for n, p in trained.items()} if schedule.ema else {}
    generator = torch.Generator().manual_seed(seed)
    first = 0
    if file.exists():
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
        ema = state["ema"]
        generator.set_state(state["generator"])
        first = state["step"]
        log(f"{name}: goes on from step {first}")

    def save(step: int) -> None:
        state = {
            "model": model.state_dict(),
            "optimizers": [o.state_dict() for o in opts],
            "ema": ema,
            "generator": generator.get_state(),
            "step": step,
        }
        torch.save(state, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").replace(file)

    start, seen = time.monotonic(), dict[str, float]()
    for step in range(first, schedule.steps):
        groups = [group for opt in opts for group in opt.param_groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * schedule.share(step)
        value, extra = loss(step, generator)
        for opt in opts:
            opt.zero_grad(set_to_none=True)
        value.backward()
        norm = nn.utils.clip_grad_norm_(list(trained.values()), schedule.clip)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"{name}: gradient norm {norm.item()} at step {step}")
        for opt in opts:
            opt.step()
        if schedule.ema:
            decay = min(schedule.ema, (step + 1) / (step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.values()), [trained[n] for n in ema], 1 - decay)
        for key, now in {"loss": value.item(), **extra}.items():  # running means
            seen[key] = seen[key] + 0.1 * (now - seen[key]) if key in seen else now
        if (step + 1) % schedule.log_every == 0:
            pace = (time.monotonic() - start) / (step + 1 - first)
            words = " ".join(f"{k} {v:.4f}" for k, v in seen.items())
            left_min = pace * (schedule.steps - step - 1) / 60
            log(f"{name} {step + 1}/{schedule.steps}  {words}  {pace:.3f} s/step  {left_min:.1f} min left")
        if (step + 1) % schedule.save_every == 0 or step + 1 == schedule.steps:
            save(step + 1)
    if schedule.ema:
        with torch.no_grad():
            for n, p in trained.items():
                p.copy_(ema[n])
