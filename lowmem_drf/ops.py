"""The only module that imports the kernels. The implementation of each operation is chosen once per run, and printed.

``RowOps``: the token-wise operations of a transformer block, and the VAE's norm with SiLU. ``naive`` is the arithmetic
of diffusers 0.42, operation by operation; ``fused`` are the Triton kernels. ``Attention``: a differentiable call, and a
pair (forward, backward) for fused attention checkpointing, which runs an attention's backward without repeating its
forward. The other back ends are in ``models/attention.py``.

An explicit choice that cannot run is an error; only ``auto`` chooses.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lowmem_drf.errors import BadInputError
from lowmem_drf.libraries import cure

if TYPE_CHECKING:
    from lowmem_drf.memory.kept_attention import KeptAttention

RowChoice = Literal["auto", "fused", "naive"]
AttentionName = Literal["auto", "triton", "cudnn", "sdpa", "xformers", "flash"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class RowOps:
    """Functions of x_BLD in the dtype of x, with fp32 arithmetic. Scales, shifts and gates are fp32, (B, 1, D)."""

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
    norm_silu: Callable[..., Tensor] | None
    """(x_BCTHW, gamma_C, before=, past_BCTHW=): SiLU of the VAE's RMSNorm over channels, behind past frames. ``None``:
    diffusers' modules."""
    lean_linears: bool
    """LoRA layers are computed by ``models/lora/linear.py`` instead of peft."""


def naive_ops() -> RowOps:
    """The arithmetic of diffusers, bit by bit."""
    return RowOps("naive", _norm_modulate, _layer_norm, _gate_residual, _rms_norm, _rope_qk, None, False)


def fused_ops() -> RowOps:
    """The kernels. Imports Triton."""
    from lowmem_drf.kernels.gate_residual import gate_residual
    from lowmem_drf.kernels.modulate import norm_modulate
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
    def normed(x: Tensor, weight: Tensor) -> Tensor:
        return _rotate(_rms_norm(x, weight, eps).unflatten(2, (heads, -1)), cos, sin)

    return normed(q, weight_q), normed(k, weight_k)


def _rotate(x_BLHd: Tensor, cos_1L1d: Tensor, sin_1L1d: Tensor) -> Tensor:
    """Rotary embedding on neighbouring channels, in the embedding's dtype; returns the dtype of ``x``."""
    x_1, x_2 = x_BLHd.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_1L1d[..., 0::2], sin_1L1d[..., 1::2]
    out = torch.empty_like(x_BLHd)
    out[..., 0::2] = x_1 * cos - x_2 * sin
    out[..., 1::2] = x_1 * sin + x_2 * cos
    return out


Pair = tuple[Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]], Callable[..., tuple[Tensor, Tensor, Tensor]]]
"""(q, k, v) -> (out, lse), and (d_out, q, k, v, out, lse) -> (dq, dk, dv). All are (B, L, H, d) except lse, which only
the back end reads."""


@dataclass(frozen=True)
class Attention:
    """Unmasked attention on (B, L, H, d)."""

    name: AttentionName
    call: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Differentiable."""
    pair: Pair

    @classmethod
    def of_pair(cls, name: AttentionName, pair: Pair) -> Attention:
        """A back end that has no differentiable call of its own."""
        return cls(name, lambda q, k, v: _WithKeptAttention.apply(q, k, v, pair, None), pair)

    def keep_attention(self, q: Tensor, k: Tensor, v: Tensor, kept_attention: KeptAttention) -> Tensor:
        """As ``call``. A forward writes its result to ``kept_attention``; the recompute reads it from there."""
        out: Tensor = _WithKeptAttention.apply(q, k, v, self.pair, kept_attention)
        return out


class _WithKeptAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pair: Pair, kept_attention: KeptAttention | None) -> Tensor:
        forward, ctx.backward_of = pair
        if kept_attention is not None and kept_attention.reading:
            out, lse = kept_attention.read()
            out = out.detach()  # the returned tensor joins the graph, the kept one must not
        else:
            out, lse = forward(q, k, v)
            if kept_attention is not None:
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


def tiles() -> ModuleType:
    """``kernels/tiles.py``: which tiles were chosen, and choosing them. Imports Triton."""
    from lowmem_drf.kernels import tiles

    return tiles


def attention_workspace(*arguments: Any) -> int:
    """Bytes that the operator ``lowmem_drf::attention_backward`` allocates beside its results. Imports Triton."""
    from lowmem_drf.kernels.attention_backward import attention_backward_workspace

    return attention_backward_workspace(*arguments)


def ranged_attention() -> tuple[Callable[[Tensor, Tensor, Tensor, float, Tensor], Tensor], tuple[int, ...]]:
    """The same kernel with a range of keys per query, for the critic, and the head sizes it supports. Imports
    Triton."""
    from lowmem_drf.kernels.attention import HEAD_DIMS, attention

    return attention, HEAD_DIMS


def packed_ranges(prefix: int, lengths: Sequence[int], tokens: int) -> Tensor:
    """(1, tokens, 3) on the CPU, for ``ranged_attention``: questions of these lengths behind a prefix. Each sees the
    prefix and itself; padding sees nothing."""
    from lowmem_drf.kernels import attention

    return attention.packed_ranges(prefix, lengths, tokens, "cpu")


def window_ranges(bounds: Sequence[int]) -> Tensor:
    """(1, L, 3) on the CPU, for ``ranged_attention``: the windows [bounds[n], bounds[n + 1]) of a sequence."""
    from lowmem_drf.kernels import attention

    return attention.window_ranges(bounds, "cpu")


def sdpa_attention() -> Attention:
    """PyTorch's own, but for cuDNN's, which is a back end of its own here."""
    return Attention("sdpa", _sdpa, (sdpa_forward, sdpa_backward))


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cpu":
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def sdpa_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """PyTorch's FlashAttention for the card (16 bit) or the CPU (and the plan's fake CPU tensors); in fp32 on a card
    its memory-efficient attention."""
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
    """The reason why the kernels cannot run on ``device``, with the cure; ``None`` if they can."""
    if importlib.util.find_spec("triton") is None:
        return f"Triton is not installed. Install it with: {cure('triton')}"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "there is no CUDA card. To interpret the kernels on the CPU, very slowly, set TRITON_INTERPRET=1"
    return None


def choose_rows(choice: RowChoice, device: torch.device) -> RowOps:
    """``auto``: the kernels on a CUDA card, diffusers' arithmetic on a CPU.

    Raises:
        BadInputError: ``fused`` cannot run on ``device``.
    """
    reason = why_no_triton(device)
    if choice == "fused" and reason:
        raise BadInputError(f'kernels.ops = "fused" cannot run: {reason}')
    if choice == "auto":
        choice = "fused" if device.type == "cuda" and not reason else "naive"
    return fused_ops() if choice == "fused" else naive_ops()


def require_int8_products() -> None:
    """Raises BadInputError where ``int8_linear`` cannot be imported."""
    if importlib.util.find_spec("triton") is None:
        cure_ = f"install it with: {cure('triton')}; or set -s model.products=16bit"
        raise BadInputError(f'model.products = "int8" cannot run: Triton is not installed; {cure_}')


def int8_linear() -> ModuleType:
    """``kernels/int8_linear.py``: products of a layer in 8-bit integers; on a CPU in plain PyTorch. Imports Triton."""
    from lowmem_drf.kernels import int8_linear

    return int8_linear


def int8_attention(device: torch.device | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """As ``int8_forward``, without the log-sum-exp."""
    forward = int8_forward(device, "rollout_attention")
    return lambda q, k, v: forward(q, k, v)[0]


def int8_forward(
    device: torch.device | None, key: str = "graded_attention"
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """``kernels/attention_int8.py``, (out, lse) without gradient: the kernel on a card; the same quantisation in plain
    PyTorch on a CPU, and for what the kernel does not take (fp32, ToyWorld's 32 channels). Imports Triton.

    Args:
        device: where it must run; ``None``: nowhere yet (a plan).
        key: the setting that asks for it, for the message.

    Raises:
        BadInputError: it cannot run there.
    """
    on_cpu = device is not None and device.type == "cpu"
    missing = importlib.util.find_spec("triton") is None
    reason = why_no_triton(device) if device is not None and (missing or not on_cpu) else None
    if reason:
        raise BadInputError(f'kernels.{key} = "int8" cannot run: {reason}')
    from lowmem_drf.kernels import attention_int8 as file

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if on_cpu or q.dtype not in file.DTYPES or q.shape[-1] not in file.HEAD_DIMS:
            return file.attention_int8_naive_forward(q, k, v)
        return file.attention_int8_forward(q, k, v)

    return attend


def why_no_int8(dtype: torch.dtype, head_dim: int) -> str | None:
    """The reason why the int8 kernel does not take such attentions. Imports Triton."""
    from lowmem_drf.kernels.attention_int8 import DTYPES, HEAD_DIMS

    if head_dim not in HEAD_DIMS:
        return f"heads have {head_dim} channels, and it takes {' or '.join(map(str, HEAD_DIMS))}"
    return None if dtype in DTYPES else "it takes no fp32"


def int8_workspace(*arguments: Any) -> int:
    """Bytes that ``attention_int8`` allocates beside its result, of the operator's arguments."""
    from lowmem_drf.kernels.attention_int8 import attention_int8_workspace

    return attention_int8_workspace(*arguments)
