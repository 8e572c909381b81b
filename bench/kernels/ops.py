"""The ops that ``bench.kernels.speed`` measures, with their inputs and sizes: every public function of ``kernels/``
that has a naive form."""

from __future__ import annotations

import functools
import importlib
import math
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
    """None: the dtype of the run."""
    grad: bool = False
    make: Callable[[Sizes, torch.device], Any] | None = None
    """Makes the value from the sizes; None: random normal values."""


@dataclass(frozen=True)
class Op:
    """One public function of ``kernels/``."""

    file: str
    name: str
    inputs: Mapping[str, Input]
    sizes: Mapping[str, Sizes]
    """Label to sizes."""
    tiny: Sizes
    """For the interpreter."""
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    products: bool = False
    """True for ops whose speed is in FLOPs; the other ones move memory."""
    tests: str = ""
    """File in ``tests/kernels/``; default: ``test_<file>.py``."""

    @property
    def fused(self) -> Callable[..., Any]:
        return getattr(importlib.import_module(f"lowmem_drf.kernels.{self.file}"), self.name)

    @property
    def naive(self) -> Callable[..., Any]:
        return getattr(importlib.import_module(f"lowmem_drf.kernels.{self.file}"), f"{self.name}_naive")

    @property
    def test_file(self) -> str:
        return self.tests or f"test_{self.file}.py"


def _angles(function: Callable[[Tensor], Tensor], sizes: Sizes, device: torch.device) -> Tensor:
    table = torch.linspace(0, 100, sizes["L"] * sizes["d"] // 2, device=device).view(1, sizes["L"], 1, -1)
    return function(table.repeat_interleave(2, 3))


def _packed(sizes: Sizes, device: torch.device) -> Tensor | None:
    """Ranges of a prefix and questions of equal length behind it; None: every query sees every key."""
    if "prefix" not in sizes:
        return None
    packed_ranges = importlib.import_module("lowmem_drf.kernels.attention").packed_ranges
    lengths = [(sizes["L"] - sizes["prefix"]) // sizes["questions"]] * sizes["questions"]
    return packed_ranges(sizes["prefix"], lengths, sizes["L"], device)


def _constant(value: Any) -> Input:
    return Input(make=lambda sizes, device: sizes[value] if isinstance(value, str) else value)


def _integers(sizes: Sizes, device: torch.device) -> Tensor:
    return torch.randint(-127, 128, (sizes["O"], sizes["I"]), dtype=torch.int8, device=device)


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
X, ROW_FP32 = Input(SEQUENCE, grad=True), Input(ROW, torch.float32)
LAYERS = ((1536, 1536), (1536, 8960), (8960, 1536), (5120, 13824))
"""Of Wan-1.3B; the feed-forward of Wan-14B."""
CRITIC = {"B": 1, "L": 4096, "H": 28, "d": 128, "M": 4096, "G": 4, "prefix": 2560, "questions": 24}

OPS = (
    Op(
        "attention",
        "attention",
        {"q": QUERIES, "k": KEYS, "v": KEYS, "ranges": Input(make=_packed)},
        {
            **{f"{name}, self": {**sizes, "M": sizes["L"], "G": sizes["H"]} for name, sizes in (WAN | WAN_14B).items()},
            "Wan-1.3B, to 512 text tokens": {"B": 1, "L": 32760, "H": 12, "d": 128, "M": 512, "G": 12},
            "critic, 24 questions packed": CRITIC,
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
        "int8_linear",
        "int8_linear",
        {
            **{"x_NI": Input(("N", "I"), grad=True), "w8_OI": Input(make=_integers)},
            **{"scale_O": Input(("O",), torch.float32), "bias_O": Input(("O",))},
        },
        {f"{inside} -> {outside}": {"N": 32760, "I": inside, "O": outside} for inside, outside in LAYERS},
        {"N": 10, "I": 24, "O": 16},
        products=True,
    ),
    Op(
        "modulate",
        "norm_modulate",
        {"x_BLD": X, "weight_BD": ROW_FP32, "shift_BD": ROW_FP32, "eps": EPS},
        WAN | WAN_14B,
        TINY,
    ),
    Op(
        "gate_residual",
        "gate_residual",
        {"x_BLD": X, "y_BLD": X, "gate_BD": ROW_FP32},
        WAN | WAN_14B,
        TINY,
        tests="test_modulate.py",
    ),
    Op(
        "rope_qk",
        "rope_qk",
        {
            **{"q_BLD": X, "k_BLD": X, "weight_q_D": Input(WEIGHT), "weight_k_D": Input(WEIGHT)},
            **{"cos": COS, "sin": SIN, "heads": _constant("H"), "eps": EPS},
        },
        WAN | WAN_14B,
        TINY,
    ),
    Op("rope_qk", "rms_norm", {"x_BLD": X, "weight_D": Input(WEIGHT), "eps": EPS}, WAN | WAN_14B, TINY),
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
    """Arguments of the op, the same for every call."""
    torch.manual_seed(0)
    made: dict[str, Any] = {}
    for name, spec in op.inputs.items():
        if spec.make:
            made[name] = spec.make(sizes, device)
        else:
            shape = [math.prod(sizes[factor] for factor in product.split("*")) for product in spec.shape]
            made[name] = torch.randn(shape, dtype=spec.dtype or dtype, device=device).requires_grad_(spec.grad)
    return made
