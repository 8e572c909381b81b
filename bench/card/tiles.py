"""Every tile of this card, not only the fastest: values and gradients against the naive form in fp64."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.card.rows import Row, at_most, failed
from bench.kernels.ops import OPS, Op, Sizes, build
from lowmem_drf.kernels.tiles import Tuned, tile_words

MORE_FILES = {"attention": ("attention", "attention_backward", "attention_half_backward")}
"""Files whose kernels an op launches, where these are not the op's own."""
EXACT = ("attention",)
"""Ops that have kernels of their own for fp32."""
TWO_WAYS = ("attention",)
"""Ops that have kernels of their own for ``deterministic``."""
PLAIN: dict[str, Sizes] = {"attention": {"B": 1, "L": 333, "H": 3, "d": 128, "M": 500, "G": 3}}
"""Of ops that have kernels of their own for inputs without ranges."""
WAN = {"B": 2, "L": 333, "H": 12, "d": 128}
SIZES: dict[str, Sizes] = {
    "attention": {"B": 1, "L": 777, "H": 4, "d": 128, "M": 777, "G": 2, "prefix": 300, "questions": 3},
    "attention_int8": {"B": 1, "L": 333, "H": 2, "d": 128, "M": 500},
    "int8_linear": {"N": 333, "I": 640, "O": 384},
    "norm_silu": {"B": 1, "C": 96, "T": 3, "h": 31, "w": 53},
}
"""Ragged ends everywhere; the other ops take ``WAN``. One size an op: a tile takes seconds to compile."""


def tuners(op: Op) -> dict[str, Tuned]:
    """The kernels of an op that have tiles, by name."""
    found = {}
    for file in MORE_FILES.get(op.name, (op.file,)):
        for name, value in vars(importlib.import_module(f"lowmem_drf.kernels.{file}")).items():
            if isinstance(value, Tuned):
                found[f"{file}.{name.strip('_')}"] = value
    if not found:
        raise RuntimeError(f"no kernel with tiles is found in kernels/{op.file}.py: bench/card/tiles.py must follow it")
    return found


def tiles() -> Iterator[Row]:
    """The worst error of each tile, as a share of what is allowed: twice that of the naive form in the same dtype,
    plus one rounding, in the norm."""
    for op in OPS:
        every = tuners(op)
        configs = {tuner: tuner.configs for tuner in every.values()}
        mine = {name: tuner.of_this_card() for name, tuner in every.items()}
        # of two ways the last one, which has kernels of its own beside those that all inputs take
        first = {every[name]: chosen[-1 if name.endswith("_ways") else 0] for name, chosen in mine.items()}
        dtypes = (*op.dtypes, torch.float32) if op.name in EXACT else op.dtypes
        cases = [_Case(op, SIZES.get(op.name, WAN), dtype) for dtype in dtypes]
        if op.name in TWO_WAYS:
            cases += [_Case(op, SIZES[op.name], dtype, more={"deterministic": True}) for dtype in dtypes]
        if op.name in PLAIN:
            cases += [_Case(op, PLAIN[op.name], dtype) for dtype in op.dtypes]
        for name, tuner in every.items():
            _pin(first)
            for config in mine[name]:
                _pin({tuner: config})
                yield _worst(f"{op.name}: {name}, {tile_words(config)}", tuner, cases)
        for tuner, all_of_them in configs.items():  # another op may launch it too
            tuner.configs = all_of_them


def _pin(chosen: dict[Tuned, Any]) -> None:
    """One configuration alone is taken."""
    for tuner, config in chosen.items():
        tuner.configs, tuner.launched = [config], None


def _worst(what: str, tuner: Tuned, cases: Sequence[_Case]) -> Row:
    """Of the cases that launch this kernel."""
    worst, where, ran = 0.0, "", False
    for case in cases:
        tuner.launched = None
        try:
            share, part = case.error()
        except Exception as error:  # what Triton and CUDA raise has many types
            return failed(f"{what}, {case.label}", error)
        if tuner.launched is not None:
            ran = True
            if not share <= worst:
                worst, where = share, f"{part}, {case.label}"
    return at_most(what, worst, "of the allowed", 1.0, where) if ran else Row(what, "was not launched", state="failed")


class _Case:
    """An op on inputs of one size and dtype, with the exact results and the allowed errors."""

    def __init__(
        self, op: Op, sizes: Sizes, dtype: torch.dtype, device: str = "cuda", more: dict[str, Any] | None = None
    ) -> None:
        more = more or {}
        self.label = " ".join([str(dtype).removeprefix("torch."), "x".join(map(str, sizes.values())), *more])
        self._function = functools.partial(op.fused, **more)
        self._arguments = build(op, sizes, dtype, torch.device(device))
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
