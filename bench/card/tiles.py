"""Every tile of this card, not only the fastest: values and gradients against the naive form in fp64."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.card.rows import Row, at_most, failed
from bench.kernels.ops import OPS, Op, Sizes, build

MORE_FILES = {"attention": ("attention", "attention_backward")}
"""Files whose kernels an op launches, where these are not the op's own."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WAN = {"B": 2, "L": 333, "H": 12, "d": 128}
PACKED = {"B": 1, "L": 777, "H": 4, "d": 128, "M": 777, "G": 2, "prefix": 300, "questions": 3}
SIZES: dict[str, tuple[Sizes, ...]] = {
    "attention": (PACKED, {"B": 1, "L": 333, "H": 2, "d": 80, "M": 500, "G": 2}),
    "attention_int8": ({"B": 1, "L": 333, "H": 2, "d": 128, "M": 500},),
    "norm_silu": ({"B": 1, "C": 96, "T": 3, "h": 31, "w": 53}, {"B": 1, "C": 384, "T": 1, "h": 7, "w": 11}),
}
"""Ragged ends everywhere; the other ops take ``WAN``."""


def tuners(op: Op) -> dict[str, Any]:
    """The autotuned kernels of an op, by name."""
    found = {}
    for file in MORE_FILES.get(op.name, (op.file,)):
        for name, value in vars(importlib.import_module(f"lowmem_drf.kernels.{file}")).items():
            if isinstance(getattr(value, "configs", None), list) and hasattr(value, "fn"):
                found[f"{file}.{name.strip('_')}"] = value
    if not found:
        raise RuntimeError(f"no autotuned kernel is found in kernels/{op.file}.py: bench/card/tiles.py must follow it")
    return found


def tiles() -> Iterator[Row]:
    """The worst error of each tile, as a share of what is allowed: twice that of the naive form in the same dtype,
    plus one rounding, in the norm."""
    for op in OPS:
        every = tuners(op)
        mine = {name: _of_this_card(tuner) for name, tuner in every.items()}
        cases = [_Case(op, sizes, dtype) for sizes in SIZES.get(op.name, (WAN,)) for dtype in _dtypes(op)]
        for name, tuner in every.items():
            _pin({every[other]: configs[0] for other, configs in mine.items()})
            for config in mine[name]:
                _pin({tuner: config})
                yield _worst(f"{op.name}: {name}, {config}", tuner, cases)


def _dtypes(op: Op) -> tuple[torch.dtype, ...]:
    return DTYPES[:2] if op.name == "attention_int8" else DTYPES


def _of_this_card(tuner: Any) -> list[Any]:
    return list(tuner.early_config_prune(tuner.configs, {})) if len(tuner.configs) > 1 else list(tuner.configs)


def _pin(chosen: dict[Any, Any]) -> None:
    """The autotuner times nothing where there is one configuration."""
    for tuner, config in chosen.items():
        tuner.configs, tuner.best_config = [config], None


def _worst(what: str, tuner: Any, cases: list[_Case]) -> Row:
    worst, where, ran = 0.0, "", False
    for case in cases:
        tuner.best_config = None
        try:
            share, part = case.error()
        except Exception as error:  # what Triton and CUDA raise has many types
            return failed(f"{what}, {case.label}", error)
        if tuner.best_config is None:  # another dtype's kernel
            continue
        ran = True
        if not share <= worst:
            worst, where = share, f"{part}, {case.label}"
    return (
        at_most(what, worst, "of the allowed error", 1.0, where)
        if ran
        else Row(what, "was not launched", state="failed")
    )


class _Case:
    """An op on inputs of one size and dtype, with the exact results and the allowed errors."""

    def __init__(self, op: Op, sizes: Sizes, dtype: torch.dtype) -> None:
        self.label = f"{str(dtype).removeprefix('torch.')} {'x'.join(map(str, sizes.values()))}"
        self._function = op.fused
        self._arguments = build(op, sizes, dtype, torch.device("cuda"))
        wide = {name: _wide(value) for name, value in self._arguments.items()}
        self._exact, eager = _results(op.naive, wide), _results(op.naive, self._arguments)
        eps = torch.finfo(dtype).eps
        self._allowed = [
            2 * ((rounded.double() - exact).norm() + eps * exact.norm())
            for rounded, exact in zip(eager, self._exact, strict=True)
        ]

    def error(self) -> tuple[float, str]:
        """The largest error as a share of what is allowed, and of which result."""
        shares = [
            ((ours.double() - exact).norm() / allowed).item()
            for ours, exact, allowed in zip(
                _results(self._function, self._arguments), self._exact, self._allowed, strict=True
            )
        ]
        worst = max(range(len(shares)), key=lambda i: float("inf") if shares[i] != shares[i] else shares[i])
        return shares[worst], f"result {worst}"


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def _results(function: Any, arguments: dict[str, Any]) -> list[Tensor]:
    """Outputs and gradients, for the same upstream gradient in every dtype."""
    outs = function(**arguments)
    outs = [outs] if isinstance(outs, Tensor) else list(outs)
    leaves = [x for x in arguments.values() if isinstance(x, Tensor) and x.requires_grad]
    if not leaves:
        return outs
    generator = torch.Generator().manual_seed(1)
    upstream = [
        torch.randn(out.shape, generator=generator).to(torch.bfloat16).to(out.device, out.dtype) for out in outs
    ]
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, upstream)]
