"""The only door to the kernels: which form of each operation a run uses, chosen once at its start and printed.

``RowOps``: what a transformer block does token by token, and the VAE's norm with SiLU. ``naive`` is the arithmetic of
diffusers 0.42, operation by operation; ``fused`` are the Triton kernels. ``Attention``: as a differentiable call, and
as a pair (forward, backward) for fused attention checkpointing, which calls the backward of an attention whose forward
it never repeats. The back ends that are not ours are in ``models/wan/attention.py``.

An explicit choice that cannot run is an error; only ``auto`` chooses.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lowmem_drf.errors import BadInputError

if TYPE_CHECKING:
    from lowmem_drf.memory.kept_attention import KeptAttention

RowChoice = Literal["auto", "fused", "naive"]
AttentionName = Literal["auto", "triton", "sdpa", "xformers", "flash"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class RowOps:
    """Functions of x_BLD in the dtype of x, fp32 inside. Scales, shifts and gates are fp32, (B, 1, D)."""

    name: str
    norm_modulate: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    """(x, scale, shift, eps): LayerNorm(x) * (1 + scale) + shift."""
    layer_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    """(x, weight_D, bias_D, eps)."""
    gate_residual: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(x, y, gate): x + y * gate."""
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    """(x, weight_D, eps): over all D channels."""
    rope_qk: Callable[..., tuple[Tensor, Tensor]]
    """(q, k, weight_q, weight_k, cos, sin, heads, eps): RMSNorm over all channels, split in heads, rotated: two (B, L,
    H, d)."""
    norm_silu: Callable[[Tensor, Tensor], Tensor] | None
    """(x_BCTHW, gamma_C): SiLU of the VAE's RMSNorm over channels. ``None``: diffusers' own modules."""
    lean_linears: bool
    """Linear layers with a LoRA as in ``models/lora/linear.py``, and not as in peft."""


def naive_ops() -> RowOps:
    """As diffusers computes them, to the bit."""
    return RowOps("naive", _norm_modulate, _layer_norm, _gate_residual, _rms_norm, _rope_qk, None, False)


def fused_ops() -> RowOps:
    """The kernels. Imports Triton."""
    from lowmem_drf.kernels.modulate import gate_residual, norm_modulate
    from lowmem_drf.kernels.norm_silu import norm_silu
    from lowmem_drf.kernels.rope_qk import rms_norm, rope_qk

    def layer_norm(x_BLD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
        return norm_modulate(x_BLD, weight_D.float()[None], bias_D.float()[None], eps)

    return RowOps(
        "fused",
        lambda x, scale, shift, eps: norm_modulate(x, 1 + scale[:, 0], shift[:, 0], eps),
        layer_norm,
        lambda x, y, gate: gate_residual(x, y, gate[:, 0]),
        rms_norm,
        rope_qk,
        norm_silu,
        True,
    )


def _norm_modulate(x_BLD: Tensor, scale_B1D: Tensor, shift_B1D: Tensor, eps: float) -> Tensor:
    return (F.layer_norm(x_BLD.float(), x_BLD.shape[-1:], eps=eps) * (1 + scale_B1D) + shift_B1D).type_as(x_BLD)


def _layer_norm(x_BLD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x_BLD.float(), x_BLD.shape[-1:], weight_D.float(), bias_D.float(), eps).type_as(x_BLD)


def _gate_residual(x_BLD: Tensor, y_BLD: Tensor, gate_B1D: Tensor) -> Tensor:
    return (x_BLD.float() + y_BLD * gate_B1D).type_as(x_BLD)


def _rms_norm(x_BLD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x_BLD, x_BLD.shape[-1:], weight_D, eps)


def _rope_qk(
    q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    rotated = [
        _rotate(_rms_norm(x, weight, eps).unflatten(2, (heads, -1)), cos, sin)
        for x, weight in ((q, weight_q), (k, weight_k))
    ]
    return rotated[0], rotated[1]


def _rotate(x_BLHd: Tensor, cos_1L1d: Tensor, sin_1L1d: Tensor) -> Tensor:
    """Rotary embedding on pairs of neighbours, in the embedding's dtype. Leaves in the dtype of ``x``."""
    x_1, x_2 = x_BLHd.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_1L1d[..., 0::2], sin_1L1d[..., 1::2]
    out = torch.empty_like(x_BLHd)
    out[..., 0::2] = x_1 * cos - x_2 * sin
    out[..., 1::2] = x_1 * sin + x_2 * cos
    return out


Pair = tuple[Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]], Callable[..., tuple[Tensor, Tensor, Tensor]]]
"""(q, k, v) -> (out, lse), and (d_out, q, k, v, out, lse) -> (dq, dk, dv); (B, L, H, d) all but lse, which is the
backend's own business."""


@dataclass(frozen=True)
class Attention:
    """Attention without a mask on (B, L, H, d)."""

    name: AttentionName
    call: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Differentiable."""
    pair: Pair | None
    """``None``: it has no log-sum-exp to give."""

    def keep_attention(self, q: Tensor, k: Tensor, v: Tensor, kept_attention: KeptAttention) -> Tensor:
        """As ``call``; the result is written on the kept_attention, or read from it and not computed."""
        out: Tensor = _WithKeptAttention.apply(q, k, v, self.pair, kept_attention)
        return out


class _WithKeptAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pair: Pair, kept_attention: KeptAttention) -> Tensor:
        forward, ctx.backward_of = pair
        if kept_attention.reading:
            out, lse = kept_attention.read()
            out = out.detach()  # what is returned gets a place in the graph; the kept_attention's own must not
        else:
            out, lse = forward(q, k, v)
            kept_attention.write(out, lse)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.backward_of(d_out, *ctx.saved_tensors), None, None)


def triton_attention() -> Attention:
    """``kernels/attention.py``. Imports Triton."""
    from lowmem_drf.kernels.attention import attention, attention_backward, attention_forward

    return Attention("triton", attention, (attention_forward, attention_backward))


def ranged_attention() -> tuple[Callable[[Tensor, Tensor, Tensor, float, Tensor], Tensor], tuple[int, ...]]:
    """The same kernel for the critic, which tells it what each query sees, and the sizes of heads that it knows.
    Imports Triton."""
    from lowmem_drf.kernels.attention import HEAD_DIMS, attention

    return attention, HEAD_DIMS


def packed_ranges(prefix: int, lengths: Sequence[int], tokens: int) -> Tensor:
    """(1, tokens, 3) for that kernel, on the CPU: questions of these lengths behind a prefix, each seeing the prefix
    and itself; padding sees nothing."""
    from lowmem_drf.kernels import attention

    return attention.packed_ranges(prefix, lengths, tokens, "cpu")


def window_ranges(bounds: Sequence[int]) -> Tensor:
    """(1, L, 3) for that kernel, on the CPU: the windows [bounds[n], bounds[n + 1]) of a sequence."""
    from lowmem_drf.kernels import attention

    return attention.window_ranges(bounds, "cpu")


def sdpa_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """FlashAttention as PyTorch has it: of the card (16 bit), of the CPU (and of the plan, which has fake CPU tensors);
    in fp32 on a card the memory-efficient one."""
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    if q.device.type == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(*heads)
    elif q.dtype == torch.float32:
        out, lse, *_ = _aten._scaled_dot_product_efficient_attention(*heads, None, True)
    else:
        out, lse, *_ = _aten._scaled_dot_product_flash_attention(*heads)
    return out.transpose(1, 2), lse


def sdpa_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    d, *heads, result = (x.transpose(1, 2) for x in (d_out, q, k, v, out))
    if q.device.type == "cpu":
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(d, *heads, result, lse, 0.0, False)
    elif q.dtype == torch.float32:
        no_seed = torch.zeros((), dtype=torch.int64, device=q.device)
        grads = _aten._scaled_dot_product_efficient_attention_backward(
            d, *heads, None, result, lse, no_seed, no_seed, 0.0, [True, True, True, False]
        )[:3]
    else:
        no_seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
        grads = _aten._scaled_dot_product_flash_attention_backward(
            d, *heads, result, lse, None, None, q.shape[1], k.shape[1], 0.0, False, no_seed, no_seed
        )
    dq, dk, dv = (x.transpose(1, 2) for x in grads)
    return dq, dk, dv


def why_no_triton(device: torch.device) -> str | None:
    """What keeps the kernels from running on ``device``, with the cure; ``None``: nothing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed. On Linux it comes with PyTorch: pip install triton"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "there is no CUDA card. On a CPU kernels can only be interpreted, very slowly: set the environment variable TRITON_INTERPRET=1"
    return None


def choose_rows(choice: RowChoice, device: torch.device) -> RowOps:
    """``auto``: the kernels on a CUDA card, and diffusers' arithmetic on a CPU.

    Raises:
        BadInputError: ``fused`` cannot run on ``device``.
    """
    reason = why_no_triton(device)
    if choice == "fused" and reason:
        raise BadInputError(f'kernels.ops = "fused" cannot run: {reason}')
    if choice == "auto":
        choice = "fused" if device.type == "cuda" and not reason else "naive"
    return fused_ops() if choice == "fused" else naive_ops()


def int8_attention(device: torch.device | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """``kernels/attention_int8.py``: no gradient. ``device``: where it must be able to run; ``None``: nowhere.

    Raises:
        BadInputError: it cannot.
    """
    reason = why_no_triton(device) if device is not None else None
    if reason:
        raise BadInputError(f'kernels.rollout_attention = "int8" cannot run: {reason}')
    from lowmem_drf.kernels.attention_int8 import attention_int8

    return attention_int8
