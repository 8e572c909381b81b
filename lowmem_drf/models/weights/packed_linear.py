"""Frozen linear layers with 4- or 8-bit weights, unpacked for each product.

    nf4    NormalFloat4 in blocks of 64 weights, with 8-bit scales in blocks of 256 (double quantisation; QLoRA, arXiv
           2305.14314)
    int8   w = q * scale / 127, where scale is the largest absolute value of a row (LLM.int8(), arXiv 2208.07339,
           without its outliers)

bitsandbytes' operators (0.50) pack and unpack NF4 on CUDA, on the CPU and on fake tensors. Its modules are not used:
they keep the scales in an attribute of the weight, read the weight from there in the backward, and may repack it in the
forward. Here all tensors are plain parameters and buffers and go through ``save_for_backward``, so they can be
offloaded, streamed and checkpointed like any others.

An unpacked weight lives only during its product. With ``products = "int8"`` an int8 weight is not unpacked: its product
is one of integers, with the rows of x, and in the backward those of the gradient, quantised as they come
(``kernels/int8_linear.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from lowmem_drf.errors import LowmemError
from lowmem_drf.ops import int8_linear

Packing = Literal["nf4", "int8"]

BLOCK = 64
"""Weights that share a scale in NF4."""
NESTED_BLOCK = 256
"""Scales of NF4 that share a scale."""

_BUFFERS: dict[str, tuple[str, ...]] = {"nf4": ("absmax", "nested_absmax", "nested_code", "offset"), "int8": ("scale",)}
_Device = str | torch.device


class PackedLinear(nn.Linear):
    """x W^T + b: (…, in) -> (…, out) in the dtype of x. Frozen: only x gets a gradient.

    Created on ``meta``; ``pack`` sets the weight, and the caller fills the bias, a plain parameter.

    Attributes:
        weight: nf4: uint8 (ceil(out * in / 2), 1), two weights per byte. int8: int8 (out, in).
        absmax, nested_absmax, nested_code, offset: nf4, as bitsandbytes' ``QuantState``: uint8 (n,) for n blocks; fp32
            (ceil(n / 256),); fp32 (256,), the values of an 8-bit scale; fp32 (), the mean of all scales.
        scale: int8: fp32 (out,).
        int8_products: int8: also multiply in 8 bit.
    """

    int8_products = False

    def __init__(self, in_features: int, out_features: int, bias: bool, quant: Packing) -> None:
        super().__init__(in_features, out_features, bias, device="meta")
        self.quant: Packing = quant
        self._take(_quantise(quant, self.weight.detach()))
        if bias:
            self.bias.requires_grad_(False)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the unpacked weight."""
        return self.out_features, self.in_features

    def pack(self, weight: Tensor, home: _Device | None = None) -> None:
        """Quantises ``weight`` (out, in), of any floating dtype, on its device, and moves the result to ``home``."""
        if tuple(weight.shape) != self.shape:
            raise ValueError(f"a weight of {list(weight.shape)} for a layer of {list(self.shape)}")
        self._take(tensor if home is None else tensor.to(home) for tensor in _quantise(self.quant, weight.detach()))

    @classmethod
    def from_bnb(cls, linear: Any) -> PackedLinear:
        """Moves the tensors out of a ``bitsandbytes.nn.Linear4bit``, without a copy. Raises LowmemError unless it is
        NF4 with double quantisation in blocks of 64 and 256."""
        state = getattr(linear.weight, "quant_state", None)
        if (
            state is None
            or state.quant_type != "nf4"
            or not state.nested
            or (state.blocksize, state.state2.blocksize) != (BLOCK, NESTED_BLOCK)
        ):
            raise LowmemError("is not NF4 with double quantisation in blocks of 64 and 256")
        made = cls(linear.in_features, linear.out_features, linear.bias is not None, "nf4")
        packed = linear.weight.data.as_subclass(Tensor).contiguous().view(-1).view(torch.uint8).view(-1, 1)
        made._take((packed, state.absmax, state.state2.absmax, state.state2.code, state.offset))
        if linear.bias is not None:
            made.bias = nn.Parameter(linear.bias.data, requires_grad=False)
        # module and weight form a cycle: the tensors would live until the next garbage collection
        linear.weight = linear.quant_state = None
        return made

    def packed(self) -> tuple[Tensor, ...]:
        """The tensors for ``unpack``, the weight first."""
        return self.weight, *(getattr(self, name) for name in _BUFFERS[self.quant])

    def forward(self, x: Tensor) -> Tensor:
        if self.quant == "nf4" and x.numel() == self.in_features and self._fits_gemm(x):
            return self._one_row(x)
        if self.int8_products:
            flat = x.reshape(-1, x.shape[-1])
            made: Tensor = int8_linear().int8_linear(flat, *self.packed(), self.bias)
            return made.view(*x.shape[:-1], -1)
        result: Tensor = _Product.apply(x, self.bias, self.quant, self.shape, *self.packed())
        return result

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, quant={self.quant}{', int8 products' if self.int8_products else ''}"

    def _take(self, packed: Iterable[Tensor]) -> None:
        weight, *others = packed
        self.weight = nn.Parameter(weight, requires_grad=False)
        for name, tensor in zip(_BUFFERS[self.quant], others, strict=True):
            self.register_buffer(name, tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Device moves reach the scales, casts (``.to(dtype)``, ``.half()``) do not: bitsandbytes needs fp32."""
        scales = {id(buffer) for buffer in self.buffers(recurse=False) if buffer.dtype is torch.float32}
        made: PackedLinear = super()._apply(
            lambda x: fn(x.view(torch.int32)).view(torch.float32) if id(x) in scales else fn(x), recurse
        )
        return made

    def _fits_gemm(self, x: Tensor) -> bool:
        differentiable = torch.is_grad_enabled() and x.requires_grad
        return not differentiable and x.dtype is not torch.float64 and self.in_features % BLOCK == 0

    def _one_row(self, x: Tensor) -> Tensor:
        """bitsandbytes' product with packed weights, for generation: on CUDA it reads a quarter of the bytes and
        unpacks nothing to memory."""
        weight, absmax, nested_absmax, nested_code, offset = self.packed()
        scales = {"absmax_8bit": absmax, "absmax_code": nested_code, "absmax_offset": offset}
        product = torch.ops.bitsandbytes.gemm_4bit
        result: Tensor = product(x, weight, self.shape, nested_absmax, BLOCK, "nf4", self.bias, **scales)
        return result


def unpack(quant: Packing, shape: tuple[int, int], packed: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """The weight (out, in) of a ``PackedLinear``'s ``packed()``, rounded once from fp32 to ``dtype``."""
    if quant == "int8":
        q, scale = packed
        # one kernel on CUDA, without an fp32 copy of the weight
        return torch.mul(q, (scale / 127)[:, None], out=torch.empty(shape, dtype=dtype, device=q.device))
    ops = torch.ops.bitsandbytes
    weight, absmax, nested_absmax, nested_code, offset = packed
    scales = ops.dequantize_blockwise(absmax, nested_absmax, nested_code, NESTED_BLOCK, torch.float32).add_(offset)
    # one long row unless blocks end with the rows: the AVX-512 kernel of bitsandbytes 0.50.2 mixes up their scales
    rows = shape if shape[1] % BLOCK == 0 else (1, shape[0] * shape[1])
    supported = torch.float32 if dtype is torch.float64 else dtype
    made: Tensor = ops.dequantize_4bit(weight, scales, BLOCK, "nf4", rows, supported)
    return made.view(shape).to(dtype)


class _Product(torch.autograd.Function):
    """x W^T + b. Saves only the packed tensors, and unpacks W again in the backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, quant: Packing, shape: tuple[int, int], *packed: Tensor
    ) -> Tensor:
        ctx.quant, ctx.shape = quant, shape
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(*packed)
        return F.linear(x, unpack(quant, shape, packed, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        packed = ctx.saved_tensors
        d_x = d_y @ unpack(ctx.quant, ctx.shape, packed, d_y.dtype) if ctx.needs_input_grad[0] else None
        return d_x, None, None, None, *(None for _ in packed)


def _quantise(quant: Packing, weight: Tensor) -> tuple[Tensor, ...]:
    """NF4 as ``bitsandbytes.functional.quantize_4bit(…, compress_statistics=True)``; int8 as its
    ``int8_vectorwise_quant``, but in any dtype: the CUDA kernel takes only fp16."""
    if quant == "int8":
        scale = weight.abs().amax(1).float()
        steps = 127 / scale.clamp_min(1e-30)  # a row of zeros stays zero
        return (weight * steps[:, None]).round_().to(torch.int8), scale
    import bitsandbytes  # noqa: F401  # defines the operators

    ops = torch.ops.bitsandbytes
    weight = weight.float() if weight.dtype is torch.float64 else weight
    packed, scales = ops.quantize_4bit(weight, BLOCK, "nf4", torch.uint8)
    offset = scales.mean()
    code = scales.new_empty(256).copy_(_scale_values())
    absmax, nested_absmax = ops.quantize_blockwise(scales - offset, code, NESTED_BLOCK)
    return packed, absmax, nested_absmax, code, offset


@cache
def _scale_values() -> Tensor:
    """bitsandbytes' dynamic 8-bit data type (arXiv 2110.02861), fp32 (256,)."""
    from bitsandbytes.functional import create_dynamic_map

    with _disable_current_modes():  # cached, so never a fake tensor
        return create_dynamic_map()
