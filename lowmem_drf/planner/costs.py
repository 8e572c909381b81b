"""FLOPs and workspaces of operators, the rates of a card, its link to the host, and the ledger's counters."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from lowmem_drf.ops import attention_workspace, int8_workspace


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

INT8 = "int8 products"
IN_8_BIT = {INT8: "matmul", "int8 attention": "attention"}
"""Kinds of work in 8 bit, and what they are in 16."""
CONVOLUTIONS = {_aten.convolution, _aten.convolution_backward}

WORKSPACE: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda d_out, q, *_: 4 * q.numel(),
    "lowmem_drf::attention_backward": attention_workspace,
    "lowmem_drf::attention_int8": int8_workspace,
}
"""Bytes that only the CUDA kernel allocates, by operator or by its name: FlashAttention-2 accumulates the gradient of q
in fp32 (flash_bwd's ``dq_accum``), and so does our kernel; int8 attention has q, k and v in fewer bits."""

EITHER: dict[str, Callable[..., int]] = {
    "lowmem_drf::int8_product": lambda x8, step, w8, scale, bias, dtype, stored: max(
        0, w8.numel() * dtype.itemsize - x8.nbytes - step.nbytes
    ),
}
"""As ``WORKSPACE``, where a card may decide for products in 16 bit: these hold the unpacked weight in the place of the
integers of x."""


@cache
def facts(func: Any) -> tuple[str, Callable[..., int] | None, Callable[..., int] | None]:
    """An operator's name, its FLOP formula and its workspace formula."""
    packet = func.overloadpacket
    name = str(func.name()).removeprefix("aten::")
    return name, FLOPS.get(packet) or flop_registry.get(packet), WORKSPACE.get(packet) or WORKSPACE.get(name)


@cache
def kind_of(func: Any) -> str:
    """The kind of an operator with FLOPs, as in ``cards.SHARES``."""
    name = str(func.name())
    if "attention" in name:
        backward = " backward" if "backward" in name else ""
        return "int8 attention" if "int8" in name else f"attention{backward}"
    if "int8_product" in name:
        return INT8
    return "conv3d" if func.overloadpacket in CONVOLUTIONS else "matmul"


def half_fits(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the arguments of an attention's backward are such as ``attention_half_backward`` takes: no mask, and no
    ranges of keys."""
    ranges_or_causal = args[7] if len(args) > 7 else None
    plain = ranges_or_causal is None or ranges_or_causal is False
    return args[1].shape[-1] == 128 and plain and kwargs.get("attn_mask") is None


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
    shares: Mapping[str, float] = field(default_factory=dict)
    """Of these rates of arithmetic, by ``kind_of`` operator. Default: all."""
    int8: float = 0.0
    """Products of 8-bit integers; 0: as those of their result's dtype."""


def in_16_bit(
    func: Any, args: Any, outputs: Any, flops: int, moved: int, rates: Rates, undecided: Collection[str]
) -> float | None:
    """Seconds of the 16-bit form of an operator in 8 bit, unpacking included. ``None``: it is none of these kinds."""
    if "quantise_rows" in str(func.name()):
        return 0.0 if INT8 in undecided else None
    if (eight := kind_of(func)) not in undecided:
        return None
    kind = IN_8_BIT[eight]
    dtype = outputs[0].dtype
    unpacked = args[2].numel() * (1 + dtype.itemsize) / rates.bytes if kind == "matmul" else 0.0
    rate = rates.flops.get(dtype, rates.flops[torch.float32]) * rates.shares.get(kind, 1.0)
    return unpacked + max(flops / rate, moved / rates.bytes)


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
    more: float = 0.0
    """Seconds that computation would take beyond ``seconds`` without 8 bit; counted only where a card decides."""

    def __add__(self, other: Counters) -> Counters:
        return Counters(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: Counters) -> Counters:
        return Counters(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: int) -> Counters:
        return Counters(*(times * a for a in astuple(self)))


class Pcie:
    """A plan's model of the link between card and host: copies overlap with computation until it needs their result.

    Two queues, one per direction, as PCIe has them and ``host`` uses them: one stream copies to the host, one to the
    card. A copy starts when the previous one of its queue has ended. Times are seconds on the caller's clock, and
    never decrease.

    Args:
        rate: bytes per second in each direction. Infinite: copies take no time.
        in_flight: bytes that may be on their way to the host before the computation waits for the oldest copy; a single
            copy may be larger.
    """

    def __init__(self, rate: float, in_flight: int) -> None:
        self._rate, self._in_flight = rate, in_flight
        self._up_until = self._down_until = 0.0
        self._leaving: deque[tuple[float, int]] = deque()
        self.up_bytes = self.down_bytes = 0
        """Sent to the card, and to the host."""
        self.between_bytes = 0
        """Part of both that was exchanged with other cards."""
        self.busy_s = 0.0
        """Summed duration of the copies."""

    def fetch(self, now: float, nbytes: int, written: float) -> float:
        """Starts a copy to the card of a tensor that is on the host from ``written`` on. Returns its arrival time."""
        self._up_until = max(now, self._up_until, written) + nbytes / self._rate
        self.up_bytes += nbytes
        self.busy_s += nbytes / self._rate
        return self._up_until

    def send(self, now: float, nbytes: int) -> tuple[float, float]:
        """Starts a copy to the host. Returns its arrival time, and the time until which the computation must wait."""
        self._down_until = max(now, self._down_until) + nbytes / self._rate
        self.down_bytes += nbytes
        self.busy_s += nbytes / self._rate
        self._leaving.append((self._down_until, nbytes))
        until = now
        while len(self._leaving) > 1 and sum(size for _, size in self._leaving) > self._in_flight:
            until = max(until, self._leaving.popleft()[0])
        return self._down_until, until

    def exchange(self, now: float, nbytes: int, ready: float) -> float:
        """Sends ``nbytes`` to other cards through the host's memory and receives as many, at the same time, from
        ``ready`` on. Returns when it is done."""
        self._up_until = self._down_until = max(now, ready, self._up_until, self._down_until) + nbytes / self._rate
        self.up_bytes += nbytes
        self.down_bytes += nbytes
        self.between_bytes += 2 * nbytes
        self.busy_s += 2 * nbytes / self._rate
        return self._up_until

    def sent(self, now: float) -> float:
        """When all copies to the host have arrived."""
        self._leaving.clear()
        return max(now, self._down_until)

    def quiet(self, now: float) -> float:
        """When no copy is under way."""
        return max(self.sent(now), self._up_until)
