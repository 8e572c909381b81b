"""A frozen linear layer with a LoRA as one autograd function that keeps only what its gradients need.

    y = u W^T + b + scale (u A^T) B^T          u = x, or gelu(x) in the second layer of a feed-forward

peft allocates the base's output, the LoRA's output, its scaled copy and their sum, and autograd does the same for the
gradient at the input. Here products accumulate in place (``addmm_``). With ``gelu`` the backward recomputes the
activation, so only x is kept: a hidden layer of Wan2.1-1.3B at 832x480x81 is 560 MiB.

The products are those of peft's ``lora.Linear`` (0.18) in the dtype of x, with fewer roundings, on plain cuBLAS. A
weight in 4 or 8 bit (``PackedLinear``) is unpacked in the forward and again in the backward, or multiplied as integers;
only its packed tensors are kept. The LoRA's own products and gradients are in the dtype of x either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lowmem_drf.models.lora.adapter import ADAPTER
from lowmem_drf.models.weights.packed_linear import PackedLinear, Packing, unpack
from lowmem_drf.ops import int8_linear

APPROXIMATE = "tanh"

Form = tuple[Packing, tuple[int, int], bool]
"""Of a packed weight: format, shape, and whether products are of integers."""


def linear(module: Any, x: Tensor, gelu: bool = False) -> Tensor:
    """``module(x)``, or ``module(gelu(x))``; x (…, in) -> (…, out).

    Calls the module itself if it has no active LoRA, or its base is neither a frozen ``nn.Linear`` nor a
    ``PackedLinear``.
    """
    base: Any = getattr(module, "base_layer", None)
    if (
        type(base) not in (nn.Linear, PackedLinear)
        or base.weight.requires_grad
        or ADAPTER not in getattr(module, "lora_A", {})
        or module._disable_adapters
    ):
        return cast(Tensor, module(F.gelu(x, approximate=APPROXIMATE) if gelu else x))
    matrices = [side[ADAPTER].weight for side in (module.lora_A, module.lora_B)]
    is_packed = isinstance(base, PackedLinear)
    form = (base.quant, base.shape, base.int8_products) if is_packed else None
    weights = base.packed() if is_packed else (base.weight,)
    result: Tensor = _LoraLinear.apply(x, *matrices, base.bias, module.scaling[ADAPTER], gelu, form, *weights)
    return result


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a_RI: Tensor, b_OR: Tensor, bias_O: Tensor | None,
        scale: float, gelu: bool, form: Form | None, *weights: Tensor,
    ) -> Tensor:  # fmt: skip
        u = _input(x, gelu)
        h_NR = u @ a_RI.to(x.dtype).t()
        y_NO = _times(form, weights, u, bias_O)
        y_NO.addmm_(h_NR, b_OR.to(x.dtype).t(), alpha=scale)
        ctx.save_for_backward(x, h_NR, a_RI, b_OR, *weights)
        ctx.scale, ctx.gelu, ctx.form = scale, gelu, form
        return y_NO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, h_NR, a_RI, b_OR, *weights = ctx.saved_tensors
        rest = (None,) * (4 + len(weights))
        wants_x, wants_a, wants_b = ctx.needs_input_grad[:3]
        d_NO = d_y.reshape(-1, d_y.shape[-1])
        d_h = (d_NO @ b_OR.to(d_NO.dtype)).mul_(ctx.scale)
        d_b = (d_NO.t() @ h_NR).mul_(ctx.scale).to(b_OR.dtype) if wants_b else None
        d_a = (d_h.t() @ _input(x, ctx.gelu)).to(a_RI.dtype) if wants_a else None
        if not wants_x:
            return None, d_a, d_b, *rest
        d_x = _times_transposed(ctx.form, weights, d_NO).addmm_(d_h, a_RI.to(d_h.dtype))
        if ctx.gelu:
            torch.ops.aten.gelu_backward.grad_input(d_x, x.reshape(d_x.shape), approximate=APPROXIMATE, grad_input=d_x)
        return d_x.view(x.shape), d_a, d_b, *rest


def _times(form: Form | None, weights: Sequence[Tensor], u_NI: Tensor, bias_O: Tensor | None) -> Tensor:
    """u W^T + b."""
    if form is not None and form[2]:
        return cast(Tensor, int8_linear().int8_forward(u_NI, *weights, bias_O))
    weight_OI = _weight(form, weights, u_NI.dtype)
    return u_NI @ weight_OI.t() if bias_O is None else torch.addmm(bias_O, u_NI, weight_OI.t())


def _times_transposed(form: Form | None, weights: Sequence[Tensor], d_NO: Tensor) -> Tensor:
    """d W."""
    if form is not None and form[2]:
        return cast(Tensor, int8_linear().int8_backward(d_NO, *weights))
    return d_NO @ _weight(form, weights, d_NO.dtype)


def _weight(form: Form | None, weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """(out, in)."""
    return weights[0] if form is None else unpack(form[0], form[1], tuple(weights), dtype)


def _input(x: Tensor, gelu: bool) -> Tensor:
    """(N, in)."""
    flat = x.reshape(-1, x.shape[-1])
    return F.gelu(flat, approximate=APPROXIMATE) if gelu else flat
