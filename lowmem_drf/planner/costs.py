"""FLOPs and workspaces of operators, the rates of a card, and the ledger's counters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry


def _attention_flops(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    """Two products: scores, and scores times values. With GQA ``q`` has more heads than ``k``."""
    return 2 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * (q.shape[3] + v.shape[3])


def _attention_backward_flops(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    """Five products, where the forward has two."""
    return _attention_flops(q, k, v) * 5 // 2


_aten = torch.ops.aten
FLOPS: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
"""Missing from ``torch.utils.flop_counter``: attention of (fake) CPU tensors."""

CONVOLUTIONS = {_aten.convolution, _aten.convolution_backward}

WORKSPACE: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda d_out, q, *_: 4 * q.numel()
}
"""Bytes that only the CUDA kernel allocates: FlashAttention-2 accumulates the gradient of q in fp32 (flash_bwd's
``dq_accum``)."""


@cache
def facts(func: Any) -> tuple[str, Callable[..., int] | None, Callable[..., int] | None]:
    """An operator's name, its FLOP formula and its workspace formula."""
    packet = func.overloadpacket
    name = str(func.name()).removeprefix("aten::")
    return name, FLOPS.get(packet) or flop_registry.get(packet), WORKSPACE.get(packet)


@dataclass(frozen=True, slots=True)
class Rates:
    """A card's rates, per second."""

    flops: Mapping[torch.dtype, float]
    """Matrix products, and convolutions in 16 bit, by dtype."""
    convolution: float
    """FLOPs of fp32 convolutions: PyTorch lets cuDNN use TF32 for them."""
    bytes: float
    """Read and written in the card's memory."""
    link: float = math.inf
    """Bytes to the host, and as many to the card at the same time."""


@dataclass(frozen=True, slots=True)
class Counters:
    """Totals; they only grow."""

    flops: int = 0
    seconds: float = 0.0
    """Computation, and waiting for copies."""
    stalled: float = 0.0
    """Seconds of waiting for copies between card and host."""
    copying: float = 0.0
    """Summed duration of the copies, in seconds."""
    to_host: int = 0
    to_card: int = 0
    """Bytes."""
    between: int = 0
    """Part of these that the cards of different processes exchanged."""

    def __add__(self, other: Counters) -> Counters:
        return Counters(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: Counters) -> Counters:
        return Counters(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))
