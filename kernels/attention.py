"""Attention that keeps its log-sum-exp: FlashAttention-2 (Dao 2023, arXiv 2307.08691, algorithm 1), forward pass and
public functions.

With S = scale q k^T, for query i over the keys j that it sees::

    lse_i = log sum_j exp(S_ij)      out_i = sum_j exp(S_ij - lse_i) v_j

``attention_backward.py`` has the backward pass. Nothing of size L x M is allocated; the backward keeps q, k, v, out and
lse.

Shapes, as in diffusers: q and out (B, L, H, d); k, v (B, M, G, d), H a multiple of G (grouped queries: head h reads key
head h // (H / G)), any strides with the last dimension contiguous; lse (B, H, L) fp32, natural logarithm, as in
PyTorch's flash attention. d is 16, 32, 64, 80, 96 or 128 (the tensor cores see 80 and 96 as 128). Dtypes: bf16, fp16,
and exact fp32 (slow; for tests and toy models). Sums and exponentials are fp32.

``ranges`` says which keys a query sees: int32 (B or 1, L, 3), rows (prefix, start, stop) for the union of the keys [0,
prefix) and [start, stop). Causal: (0, 0, i + 1). Windows: (0, start, stop). Questions behind one prefix: (prefix, start
of the question, i + 1). A row (0, 0, 0) sees nothing: out 0, lse -inf, no gradient. The kernel skips key blocks that no
query of a block sees, and masks only the blocks that some of them see in part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils.flop_counter import register_flop_formula

from lowmem_drf.kernels.attention_backward import attention_backward_op
from lowmem_drf.kernels.attention_common import (
    FP32_TILES,
    LN2,
    LOG2E,
    attention_variants,
    dot,
    load_ranges,
    load_tile,
    seen_blocks,
    store_tile,
)
from lowmem_drf.kernels.checks import DTYPES, aligned, check_attention, require_card, row_stride
from lowmem_drf.kernels.operators import operator
from lowmem_drf.kernels.tiles import CARDS, Tile, Variant, tuned

HEAD_DIMS = (16, 32, 64, 80, 96, 128)

TILES = (
    Tile({"BLOCK_M": 128, "BLOCK_N": 64}, 8, 3, CARDS,
         "16 rows a warp, and 96 KiB: all that the smaller cards have; 128 KiB on Hopper"),
    Tile({"BLOCK_M": 128, "BLOCK_N": 32}, 8, 3, (86, 89, 120),
         "FlashAttention-2's choice on these cards: 64 KiB; less is wasted on a ragged end"),
    Tile({"BLOCK_M": 64, "BLOCK_N": 64}, 4, 2, (80,),
         "two blocks on a multiprocessor: one multiplies while the other one exponentiates; 56 KiB"),
    Tile({"BLOCK_M": 128, "BLOCK_N": 128}, 8, 2, (90,), "two warp groups of 64 queries, wide products; 160 KiB"),
)  # fmt: skip


def attention_naive(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, ranges: Tensor | None = None
) -> Tensor:
    """The formula in plain PyTorch, differentiable, with the (L, M) matrix. Computes in fp32 (fp64 inputs: in fp64)."""
    B, L, H, d = q.shape
    M, G = k.shape[1:3]
    upcast = torch.promote_types(q.dtype, torch.float32)
    q_BGHLd = q.to(upcast).unflatten(2, (G, H // G)).permute(0, 2, 3, 1, 4)
    k_BGLd, v_BGLd = (x.to(upcast).transpose(1, 2) for x in (k, v))
    s_BGHLM = q_BGHLd @ k_BGLd[:, :, None].mT * (d**-0.5 if scale is None else scale)
    if ranges is None:
        p_BGHLM = s_BGHLM.softmax(-1)
    else:
        key, (prefix, start, stop) = torch.arange(M, device=q.device), ranges[..., None].unbind(2)
        seen = ((key < prefix) | ((key >= start) & (key < stop)))[:, None, None]
        p_BGHLM = s_BGHLM.masked_fill(~seen, torch.finfo(upcast).min).softmax(-1) * seen
    return (p_BGHLM @ v_BGLd[:, :, None]).permute(0, 3, 1, 2, 4).flatten(2, 3).to(q.dtype)


@triton.jit
def _forward_step(
    b_acc, b_max, b_sum, b_q, b_prefix, b_start, b_stop, p_k, p_v, block, stride_kl, stride_vl, scale_log2, M,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PARTLY: tl.constexpr,
):  # fmt: skip
    """Adds one block of keys to the weighted values, the maximum (of scores in units of log 2) and the sum of
    exponentials."""
    start_n = block * BLOCK_N
    b_k = load_tile(p_k, start_n, M, stride_kl, D, BLOCK_D, BLOCK_N)
    b_v = load_tile(p_v, start_n, M, stride_vl, D, BLOCK_D, BLOCK_N)
    b_s = dot(b_q, tl.trans(b_k))  # [BM, BN]
    if PARTLY:
        o_n = (start_n + tl.arange(0, BLOCK_N))[None, :]
        if b_prefix is None:
            b_s = tl.where(o_n < M, b_s, float("-inf"))
        else:
            seen = (o_n < b_prefix[:, None]) | ((o_n >= b_start[:, None]) & (o_n < b_stop[:, None]))
            b_s = tl.where(seen, b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale_log2)
    b_p = tl.exp2(tl.fma(b_s, scale_log2, -b_new[:, None]))
    b_old = tl.exp2(b_max - b_new)
    b_sum = b_sum * b_old + tl.sum(b_p, 1)
    b_acc = dot(b_p.to(b_v.dtype), b_v, b_acc * b_old[:, None])
    return b_acc, b_new, b_sum


@triton.jit
def attention_forward_kernel(
    p_q, p_k, p_v, p_ranges, p_out, p_lse,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh, stride_rb,
    scale, L, M,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_h, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    H = tl.num_programs(1)
    start_m = tl.program_id(0) * BLOCK_M
    o_m = start_m + tl.arange(0, BLOCK_M)
    b_q = load_tile(p_q + i_b * stride_qb + i_h * stride_qh, start_m, L, stride_ql, D, BLOCK_D, BLOCK_M)
    p_k += i_b * stride_kb + i_h // GROUP * stride_kh
    p_v += i_b * stride_vb + i_h // GROUP * stride_vh
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_M], -1e30, tl.float32)  # finite: where nothing is seen, exp2(-inf - b_max) is 0 and not NaN
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    scale_log2 = scale * LOG2E
    if p_ranges is None:
        b_prefix, b_start, b_stop = None, None, None
        a, b = M // BLOCK_N, tl.cdiv(M, BLOCK_N)
        c, d, e, f = b, b, b, b
    else:
        b_prefix, b_start, b_stop = load_ranges(p_ranges + i_b * stride_rb, o_m, L, M)
        a, b, c, d, e, f = seen_blocks(b_prefix, b_start, b_stop, M, BLOCK_N)
    for i in range(a + e - d):
        block = i
        if p_ranges is not None:
            block = tl.where(i < a, i, d + i - a)
        b_acc, b_max, b_sum = _forward_step(
            b_acc, b_max, b_sum, b_q, b_prefix, b_start, b_stop, p_k, p_v, block, stride_kl, stride_vl, scale_log2, M,
            D, BLOCK_D, BLOCK_N, False,
        )  # fmt: skip
    for i in range(b - a + d - c + f - e):
        block = tl.where(i < b - a, a + i, tl.where(i < b - a + d - c, c + i - (b - a), e + i - (b - a + d - c)))
        b_acc, b_max, b_sum = _forward_step(
            b_acc, b_max, b_sum, b_q, b_prefix, b_start, b_stop, p_k, p_v, block, stride_kl, stride_vl, scale_log2, M,
            D, BLOCK_D, BLOCK_N, True,
        )  # fmt: skip
    b_none = b_sum == 0.0
    b_sum = tl.where(b_none, 1.0, b_sum)
    b_lse = tl.where(b_none, float("-inf"), (b_max + tl.log2(b_sum)) * LN2)
    b_acc = b_acc / b_sum[:, None]
    store_tile(p_out + (i_b * L * H + i_h) * D, b_acc, start_m, L, H * D, D, BLOCK_D, BLOCK_M)
    tl.store(p_lse + (i_b * H + i_h) * L + o_m, b_lse, mask=o_m < L)


_tuned_forward = tuned(TILES, key=["D", "GROUP", "L", "M", "p_ranges"])(attention_forward_kernel)
_tuned_forward_fp32 = tuned(FP32_TILES, key=[])(attention_forward_kernel)


@operator("attention_forward")
def attention_forward_op(
    q: Tensor, k: Tensor, v: Tensor, scale: float, ranges: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse); allocates nothing else."""
    require_card("attention", q)
    q, k, v = (aligned(x) for x in (q, k, v))
    ranges = None if ranges is None else ranges.contiguous()
    B, L, H, d = q.shape
    M, G = k.shape[1:3]
    out, lse = q.new_empty(q.shape), q.new_empty(B, H, L, dtype=torch.float32)
    strides = [n for x in (q, k, v) for n in x.stride()[:3]]
    stride_r = 0 if ranges is None else row_stride(ranges)
    kernel = _tuned_forward_fp32 if q.dtype is torch.float32 else _tuned_forward
    sizes = {"GROUP": H // G, "D": d, "BLOCK_D": triton.next_power_of_2(d)}
    with torch.cuda.device_of(q):
        kernel[lambda meta: (triton.cdiv(L, meta["BLOCK_M"]), H, B)](
            q, k, v, ranges, out, lse, *strides, stride_r, scale, L, M, **sizes
        )
    return out, lse


@torch.library.register_fake(attention_forward_op)
def _(q, k, v, scale, ranges=None):
    return q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)


@register_flop_formula(torch.ops.lowmem_drf.attention_forward)
def _(q_shape, k_shape, *_, **__) -> int:
    """As PyTorch counts its own attention: all queries with all keys, because shapes do not show what ranges leave
    out."""
    B, L, H, d = q_shape
    return 4 * B * H * L * k_shape[1] * d


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, scale: float, ranges: Tensor | None, deterministic: bool
    ) -> Tensor:
        out, lse = attention_forward_op(q, k, v, scale, ranges)
        ctx.save_for_backward(q, k, v, out, lse, ranges)
        ctx.scale, ctx.deterministic = scale, deterministic
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, ranges = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        found = attention_backward_op(
            d_out, q, k, v, out, lse, ctx.scale, ranges, wanted[0], wanted[1] or wanted[2], ctx.deterministic
        )
        return *(gradient if want else None for gradient, want in zip(found, wanted, strict=False)), None, None, None


def attention(
    q: Tensor, k: Tensor, v: Tensor,
    scale: float | None = None, ranges: Tensor | None = None, deterministic: bool | None = None,
) -> Tensor:  # fmt: skip
    """softmax(scale q k^T) v, differentiable in q, k and v. Gradients that are not needed are not computed.

    Args:
        q: (B, L, H, d), bf16, fp16 or fp32.
        k: (B, M, G, d), the same dtype, H a multiple of G.
        v: as k.
        scale: positive; None: d ** -0.5.
        ranges: (B or 1, L, 3) int32, the keys that each query sees; None: all keys.
        deterministic: gradients have the same bits every time, and take seven products instead of five. Otherwise the
            last bits of q's differ. None: as ``torch.use_deterministic_algorithms`` says.

    Returns:
        (B, L, H, d).

    Raises:
        TypeError: a dtype that the kernels do not have.
        ValueError: shapes or devices that do not match.
    """
    return _Attention.apply(q, k, v, _checked(q, k, v, scale, ranges), ranges, _or_torchs(deterministic))


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, ranges: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) of ``attention`` without autograd, lse (B, H, L) fp32: for callers that keep both and then call
    ``attention_backward``."""
    return attention_forward_op(q, k, v, _checked(q, k, v, scale, ranges), ranges)


def attention_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    scale: float | None = None, ranges: Tensor | None = None, wanted_q: bool = True, wanted_kv: bool = True,
    deterministic: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) from the results of ``attention_forward`` and the gradient of out. Unwanted gradients have no
    elements. Checks and ``deterministic`` as in ``attention``."""
    scale = _checked(q, k, v, scale, ranges)
    for name, x in (("d_out", d_out), ("out", out)):
        if x.shape != q.shape or x.dtype != q.dtype or x.device != q.device:
            wanted, got = (f"{tuple(y.shape)} {y.dtype} on {y.device}" for y in (q, x))
            raise ValueError(f"{name} must be as q, {wanted}; got {got}.")
    B, L, H, _ = q.shape
    if lse.shape != (B, H, L) or lse.dtype is not torch.float32 or lse.device != q.device:
        wanted = f"{(B, H, L)} torch.float32 on {q.device}, as attention_forward gives it"
        raise ValueError(f"lse must be {wanted}; got {tuple(lse.shape)} {lse.dtype}, {lse.device}.")
    return attention_backward_op(
        d_out, q, k, v, out, lse, scale, ranges, wanted_q, wanted_kv, _or_torchs(deterministic)
    )


def _or_torchs(deterministic: bool | None) -> bool:
    return torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic


def _checked(q: Tensor, k: Tensor, v: Tensor, scale: float | None, ranges: Tensor | None) -> float:
    """Checks the inputs and returns the scale to use."""
    tensors = {"q": q, "k": k, "v": v} | ({} if ranges is None else {"ranges": ranges})
    scale = check_attention(tensors, scale, DTYPES, HEAD_DIMS, "attention_naive")
    if ranges is not None and ranges.dtype is not torch.int32:
        raise TypeError(f"ranges must be int32, got {ranges.dtype}.")
    if ranges is not None and ranges.shape not in ((1, q.shape[1], 3), (q.shape[0], q.shape[1], 3)):
        raise ValueError(f"ranges must be (B or 1, L, 3); q is {tuple(q.shape)}, ranges {tuple(ranges.shape)}.")
    return scale


def causal_ranges(L: int, device: torch.device | str) -> Tensor:
    """(1, L, 3): query i sees the keys up to its own."""
    return window_ranges([0, L], device, causal=True)


def window_ranges(bounds: Sequence[int], device: torch.device | str, causal: bool = False) -> Tensor:
    """(1, L, 3) for windows [bounds[n], bounds[n + 1]) of a sequence (cu_seqlens): a query sees its own window,
    ``causal``: up to itself."""
    pairs = zip(bounds[:-1], bounds[1:], strict=True)
    windows = [torch.tensor([0, start, stop]).repeat(stop - start, 1) for start, stop in pairs]
    return _ranges(torch.cat(windows), causal, device)


def packed_ranges(prefix: int, lengths: Sequence[int], L: int, device: torch.device | str) -> Tensor:
    """(1, L, 3) for a causal prefix and causal questions behind it, each of which sees the prefix and itself. The rest
    is padding, which sees nothing."""
    ranges = torch.zeros(L, 3, dtype=torch.int64)
    end = prefix + sum(lengths)
    bounds = [0, prefix, *(prefix + torch.tensor(lengths).cumsum(0)).tolist()]
    ranges[:end] = window_ranges(bounds, "cpu", causal=True)[0]
    ranges[prefix:end, 0] = prefix
    return _ranges(ranges, False, device)


def _ranges(ranges: Tensor, causal: bool, device: torch.device | str) -> Tensor:
    if causal:
        ranges[:, 2] = torch.arange(1, len(ranges) + 1)
    return ranges[None].to(device, torch.int32)


def variants(card: int) -> Iterator[Variant]:
    """The forward kernel with every tile of a card, on the cases of the models."""
    yield from attention_variants(attention_forward_kernel, TILES, card)
