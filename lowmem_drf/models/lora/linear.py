"""A frozen linear layer with a LoRA as one autograd function that keeps only what its gradients need.

    y = u W^T + b + scale (u A^T) B^T          u = x, or gelu(x) in the second layer of a feed-forward

peft allocates the base's output, the LoRA's output, its scaled copy and their sum, and autograd does the same for the
gradient at the input. Here products accumulate in place (``addmm_``). With ``gelu`` the backward recomputes the
activation, so only x is kept: a hidden layer of Wan2.1-1.3B at 832x480x81 is 560 MiB.

The products are those of peft's ``lora.Linear`` (0.18) in the dtype of x, with fewer roundings, on plain cuBLAS. A
weight in 4 or 8 bit (``PackedLinear``) is unpacked in the forward and again in the backward; only its packed tensors
are kept.
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

APPROXIMATE = "tanh"


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
    packing, weights = ((base.quant, base.shape), base.packed()) if is_packed else (None, (base.weight,))
    result: Tensor = _LoraLinear.apply(x, *matrices, base.bias, module.scaling[ADAPTER], gelu, packing, *weights)
    return result


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a_RI: Tensor, b_OR: Tensor, bias_O: Tensor | None,
        scale: float, gelu: bool, packing: tuple[Packing, tuple[int, int]] | None, *weights: Tensor,
    ) -> Tensor:  # fmt: skip
        u = _input(x, gelu)
        h_NR = u @ a_RI.to(x.dtype).t()
        weight_OI = _weight(packing, weights, x.dtype)
        y_NO = u @ weight_OI.t() if bias_O is None else torch.addmm(bias_O, u, weight_OI.t())
        y_NO.addmm_(h_NR, b_OR.to(x.dtype).t(), alpha=scale)
        ctx.save_for_backward(x, h_NR, a_RI, b_OR, *weights)
        ctx.scale, ctx.gelu, ctx.packing = scale, gelu, packing
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
        d_x = (d_NO @ _weight(ctx.packing, weights, d_NO.dtype)).addmm_(d_h, a_RI.to(d_h.dtype))
        if ctx.gelu:
            torch.ops.aten.gelu_backward.grad_input(d_x, x.reshape(d_x.shape), approximate=APPROXIMATE, grad_input=d_x)
        return d_x.view(x.shape), d_a, d_b, *rest


def _weight(packing: tuple[Packing, tuple[int, int]] | None, weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """(out, in)."""
    return weights[0] if packing is None else unpack(*packing, tuple(weights), dtype)


def _input(x: Tensor, gelu: bool) -> Tensor:
    """(N, in)."""
    flat = x.reshape(-1, x.shape[-1])
    return F.gelu(flat, approximate=APPROXIMATE) if gelu else flat
