"""The ops of ``bench.kernels.speed``: what each takes, and at which sizes. One entry for every public function of
``kernels/`` with a naive form."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Input:
    """One argument of an op."""

    shape: tuple[str, ...] = ()
    """Names of sizes; a product is written ``"H*d"``."""
    dtype: torch.dtype | None = None
    """None: that of the run."""
    grad: bool = False
    make: Callable[[Sizes, torch.device], Any] | None = None
    """Of the sizes, where it is not a tensor of normal deviates."""


@dataclass(frozen=True)
class Op:
    """One public function of ``kernels/``."""

    file: str
    name: str
    inputs: Mapping[str, Input]
    sizes: Mapping[str, Sizes]
    """By what they are."""
    tiny: Sizes
    """For the interpreter."""
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    products: bool = False
    """Attention, rather than an op that moves memory."""

    @property
    def fused(self) -> Callable[..., Any]:
        return getattr(importlib.import_module(f"lowmem_drf.kernels.{self.file}"), self.name)

    @property
    def naive(self) -> Callable[..., Any]:
        return getattr(importlib.import_module(f"lowmem_drf.kernels.{self.file}"), f"{self.name}_naive")


def _angles(function: Callable[[Tensor], Tensor], sizes: Sizes, device: torch.device) -> Tensor:
    table = torch.linspace(0, 100, sizes["L"] * sizes["d"] // 2, device=device).view(1, sizes["L"], 1, -1)
    return function(table.repeat_interleave(2, 3))


def _packed(sizes: Sizes, device: torch.device) -> Tensor | None:
    """A prefix and questions of equal length behind it; None: every query sees every key."""
    if "prefix" not in sizes:
        return None
    packed_ranges = importlib.import_module("lowmem_drf.kernels.attention").packed_ranges
    lengths = [(sizes["L"] - sizes["prefix"]) // sizes["questions"]] * sizes["questions"]
    return packed_ranges(sizes["prefix"], lengths, sizes["L"], device)


def _constant(value: Any) -> Input:
    return Input(make=lambda sizes, device: sizes[value] if isinstance(value, str) else value)


WAN = {
    "Wan-1.3B, 832x480x81": {"B": 1, "L": 32760, "H": 12, "d": 128},
    "Wan-14B, 832x480x17": {"B": 1, "L": 7800, "H": 40, "d": 128},
}
WAN_14B = {"Wan-14B, 832x480x81": {"B": 1, "L": 32760, "H": 40, "d": 128}}
TINY = {"B": 2, "L": 10, "H": 2, "d": 16}
SEQUENCE, ROW, WEIGHT = ("B", "L", "H*d"), ("B", "H*d"), ("H*d",)
EPS = _constant(1e-6)
COS, SIN = (Input(make=functools.partial(_angles, function)) for function in (torch.cos, torch.sin))
QUERIES, KEYS = Input(("B", "L", "H", "d"), grad=True), Input(("B", "M", "G", "d"), grad=True)

OPS = (
    Op(
        "attention",
        "attention",
        {"q": QUERIES, "k": KEYS, "v": KEYS, "ranges": Input(make=_packed)},
        {
            **{f"{name}, self": {**sizes, "M": sizes["L"], "G": sizes["H"]} for name, sizes in (WAN | WAN_14B).items()},
            "Wan-1.3B, to 512 text tokens": {"B": 1, "L": 32760, "H": 12, "d": 128, "M": 512, "G": 12},
            "critic, 24 questions packed": {
                "B": 1,
                "L": 4096,
                "H": 28,
                "d": 128,
                "M": 4096,
                "G": 4,
                "prefix": 2560,
                "questions": 24,
            },
        },
        {**TINY, "M": 10, "G": 1, "prefix": 4, "questions": 2},
        products=True,
    ),
    Op(
        "attention_int8",
        "attention_int8",
        {name: Input(("B", length, "H", "d")) for name, length in (("q", "L"), ("k", "M"), ("v", "M"))},
        {f"{name}, self": {**sizes, "M": sizes["L"]} for name, sizes in (WAN | WAN_14B).items()},
        {**TINY, "d": 64, "M": 12},
        products=True,
    ),
    Op(
        "modulate",
        "norm_modulate",
        {
            "x_BLD": Input(SEQUENCE, grad=True),
            "weight_BD": Input(ROW, torch.float32),
            "shift_BD": Input(ROW, torch.float32),
            "eps": EPS,
        },
        WAN | WAN_14B,
        TINY,
    ),
    Op(
        "modulate",
        "gate_residual",
        {
            "x_BLD": Input(SEQUENCE, grad=True),
            "y_BLD": Input(SEQUENCE, grad=True),
            "gate_BD": Input(ROW, torch.float32),
        },
        WAN | WAN_14B,
        TINY,
    ),
    Op(
        "rope_qk",
        "rope_qk",
        {
            **{name: Input(SEQUENCE, grad=True) for name in ("q_BLD", "k_BLD")},
            **{name: Input(WEIGHT) for name in ("weight_q_D", "weight_k_D")},
            **{"cos": COS, "sin": SIN, "heads": _constant("H"), "eps": EPS},
        },
        WAN | WAN_14B,
        TINY,
    ),
    Op(
        "rope_qk",
        "rms_norm",
        {"x_BLD": Input(SEQUENCE, grad=True), "weight_D": Input(WEIGHT), "eps": EPS},
        WAN | WAN_14B,
        TINY,
    ),
    Op(
        "norm_silu",
        "norm_silu",
        {"x_BCTHW": Input(("B", "C", "T", "h", "w"), grad=True), "gamma_C": Input(("C",))},
        {
            "Wan VAE, 4 frames of 832x480": {"B": 1, "C": 96, "T": 4, "h": 480, "w": 832},
            "Wan VAE, 4 frames at a half": {"B": 1, "C": 192, "T": 4, "h": 240, "w": 416},
            "Wan VAE, 2 frames at a quarter": {"B": 1, "C": 384, "T": 2, "h": 120, "w": 208},
        },
        {"B": 1, "C": 24, "T": 2, "h": 3, "w": 5},
        (torch.bfloat16, torch.float32),
    ),
)


def build(op: Op, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The op's arguments."""
    torch.manual_seed(0)
    made: dict[str, Any] = {}
    for name, spec in op.inputs.items():
        if spec.make:
            made[name] = spec.make(sizes, device)
        else:
            shape = [
                functools.reduce(lambda size, factor: size * sizes[factor], product.split("*"), 1)
                for product in spec.shape
            ]
            made[name] = torch.randn(shape, dtype=spec.dtype or dtype, device=device).requires_grad_(spec.grad)
    return made
