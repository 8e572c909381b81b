"""The backward pass of attention; ``attention.py`` has the forward pass and the public functions.

With S = scale q k^T, P = exp(S - lse) and the upstream gradient dO (FlashAttention-2: Dao 2023, arXiv 2307.08691,
algorithm 2)::

    delta = rowsum(dO * O)    dP = dO V^T    dS = P * (dP - delta)
    dV = P^T dO    dQ = scale dS K    dK = scale dS^T Q

P is recomputed tile by tile from q, k and the log-sum-exp. There are no atomics, so results are deterministic: one
kernel loops over the queries (of all heads that share a key head) for dK and dV, another loops over the keys for dQ.
Both compute S and dP, which makes 7 products instead of 5. P and dS are rounded to the dtype of the inputs for the
products; sums, exponentials and lse are fp32.

Shapes: q, out, d_out (B, L, H, d); k, v (B, M, G, d), H a multiple of G; lse (B, H, L) fp32; ranges (B or 1, L, 3)
int32 or None.

Choice of tiles: before Hopper, Triton gives every warp 16 whole rows if a tile has at least as many rows as channels
(128). Otherwise it splits the tile by columns, and P and dS pass through shared memory. Most tiles have three stages,
because with two the copy of the next block starts only when a block is done. Registers decide the rest (255 a thread;
``bench/kernels/resources.py`` counts them).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lowmem_drf.kernels.attention_common import (
    FP32_TILES,
    LOG2E,
    attention_variants,
    dot,
    load_ranges,
    load_tile,
    seen_blocks,
    store_tile,
)
from lowmem_drf.kernels.checks import aligned, require_card, row_stride
from lowmem_drf.kernels.operators import operator
from lowmem_drf.kernels.tiles import CARDS, Tile, Variant, tuned

SPAN = tl.constexpr(64)
"""``_query_spans`` works on groups of this many queries and keys."""
PADDING = 128
"""lse and delta are padded to a multiple of the largest tile's rows, so that loading them needs no mask."""

DELTA_TILES = (
    Tile({"BLOCK_M": 64}, 4, 1, CARDS, "reads 2 x 16 KiB at d = 128 and keeps nothing: bandwidth is all there is"),
)
KEY_TILES = (
    Tile({"BLOCK_M": 16, "BLOCK_N": 128}, 8, 3, (86, 89, 120),
         "16 rows a warp and 81 KiB; these tensor cores are slow enough for 16 queries at a time"),
    Tile({"BLOCK_M": 64, "BLOCK_N": 64}, 8, 2, (86, 89, 120),
         "a quarter of the barriers, at the price of P and dS through shared memory; 73 KiB"),
    Tile({"BLOCK_M": 64, "BLOCK_N": 64}, 8, 3, (80,),
         "64 queries between two barriers, three stages, and registers to spare; 106 KiB"),
    Tile({"BLOCK_M": 32, "BLOCK_N": 64}, 4, 3, (80,),
         "two blocks on a multiprocessor: one multiplies while the other one exponentiates; 69 KiB"),
    Tile({"BLOCK_M": 64, "BLOCK_N": 128}, 8, 3, (90,),
         "two warp groups of 64 keys; 128 queries would not leave room for dK and dV in registers; 162 KiB"),
    Tile({"BLOCK_M": 64, "BLOCK_N": 64}, 4, 2, (90,), "one warp group, two blocks on a multiprocessor; 97 KiB"),
)  # fmt: skip
QUERY_TILES = (
    Tile({"BLOCK_M": 128, "BLOCK_N": 32}, 8, 3, (80, 86, 89, 120),
         "16 rows a warp, three stages, and 96 KiB: all that the smaller cards have"),
    Tile({"BLOCK_M": 64, "BLOCK_N": 32}, 4, 3, (86, 89, 120),
         "half the shared memory, 68 KiB, and twice the blocks: short sequences fill the card"),
    Tile({"BLOCK_M": 128, "BLOCK_N": 64}, 8, 3, (80, 90),
         "twice the products between two barriers; 128 KiB, 160 on Hopper"),
    Tile({"BLOCK_M": 64, "BLOCK_N": 64}, 4, 2, (90,), "one warp group, two blocks on a multiprocessor; 96 KiB"),
)  # fmt: skip


@triton.jit
def attention_delta_kernel(
    p_out, p_d_out, p_lse, p_lse2, p_delta, stride_db, stride_dl, stride_dh, L, L_PADDED,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    i_h, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    H = tl.num_programs(1)
    start = tl.program_id(0) * BLOCK_M
    o_m = start + tl.arange(0, BLOCK_M)
    b_out = load_tile(p_out + (i_b * L * H + i_h) * D, start, L, H * D, D, BLOCK_D, BLOCK_M).to(tl.float32)
    p_d_out += i_b * stride_db + i_h * stride_dh
    b_d_out = load_tile(p_d_out, start, L, stride_dl, D, BLOCK_D, BLOCK_M).to(tl.float32)
    b_lse = tl.load(p_lse + (i_b * H + i_h) * L + o_m, mask=o_m < L, other=float("-inf"))
    row = (i_b * H + i_h) * L_PADDED
    tl.store(p_lse2 + row + o_m, tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2E), mask=o_m < L_PADDED)
    tl.store(p_delta + row + o_m, tl.sum(b_out * b_d_out, 1), mask=o_m < L_PADDED)


@triton.jit
def attention_key_backward_kernel(
    p_q, p_k, p_v, p_d_out, p_lse2, p_delta, p_ranges, p_spans, p_dk, p_dv,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    stride_db, stride_dl, stride_dh, stride_rb, stride_sb, scale, L, L_PADDED, M,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_g, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    G = tl.num_programs(1)
    start_n = tl.program_id(0) * BLOCK_N
    o_n = start_n + tl.arange(0, BLOCK_N)
    b_k = load_tile(p_k + i_b * stride_kb + i_g * stride_kh, start_n, M, stride_kl, D, BLOCK_D, BLOCK_N)
    b_v = load_tile(p_v + i_b * stride_vb + i_g * stride_vh, start_n, M, stride_vl, D, BLOCK_D, BLOCK_N)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    scale_log2 = scale * LOG2E
    if p_ranges is None:
        first = 0
        count = tl.cdiv(L, BLOCK_M)
    else:
        p_ranges += i_b * stride_rb
        p_spans += i_b * stride_sb
        i_first, i_last = start_n // SPAN, (tl.minimum(start_n + BLOCK_N, M) - 1) // SPAN
        first = tl.minimum(tl.load(p_spans + 2 * i_first), tl.load(p_spans + 2 * i_last)) // BLOCK_M
        last = tl.maximum(tl.load(p_spans + 2 * i_first + 1), tl.load(p_spans + 2 * i_last + 1))
        count = tl.maximum(tl.cdiv(last, BLOCK_M) - first, 0)
    for i in range(GROUP * count):
        if GROUP == 1:
            i_h = i_g
            start_m = (first + i) * BLOCK_M
        else:
            i_h = i_g * GROUP + i // count
            start_m = (first + i % count) * BLOCK_M
        o_m = start_m + tl.arange(0, BLOCK_M)
        p_row = (i_b * G * GROUP + i_h) * L_PADDED + o_m
        b_q = load_tile(p_q + i_b * stride_qb + i_h * stride_qh, start_m, L, stride_ql, D, BLOCK_D, BLOCK_M)
        b_d_out = load_tile(p_d_out + i_b * stride_db + i_h * stride_dh, start_m, L, stride_dl, D, BLOCK_D, BLOCK_M)
        b_s = dot(b_k, tl.trans(b_q))  # [BN, BM]
        b_p = tl.exp2(tl.fma(b_s, scale_log2, -tl.load(p_lse2 + p_row)[None, :]))
        if p_ranges is not None:
            b_prefix, b_start, b_stop = load_ranges(p_ranges, o_m, L, M)
            o_k = o_n[:, None]
            seen = (o_k < b_prefix[None, :]) | ((o_k >= b_start[None, :]) & (o_k < b_stop[None, :]))
            b_p = tl.where(seen, b_p, 0.0)
        b_dv = dot(b_p.to(b_d_out.dtype), b_d_out, b_dv)
        b_dp = dot(b_v, tl.trans(b_d_out))  # [BN, BM]
        b_ds = b_p * (b_dp - tl.load(p_delta + p_row)[None, :])
        b_dk = dot(b_ds.to(b_q.dtype), b_q, b_dk)
    row = i_b * M * G + i_g
    store_tile(p_dk + row * D, b_dk * scale, start_n, M, G * D, D, BLOCK_D, BLOCK_N)
    store_tile(p_dv + row * D, b_dv, start_n, M, G * D, D, BLOCK_D, BLOCK_N)


@triton.jit
def _query_step(
    b_dq, b_q, b_d_out, b_lse2, b_delta, b_prefix, b_start, b_stop, p_k, p_v, block, stride_kl, stride_vl,
    scale_log2, M, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PARTLY: tl.constexpr,
):  # fmt: skip
    """Adds one block of keys to dq."""
    start_n = block * BLOCK_N
    b_k = load_tile(p_k, start_n, M, stride_kl, D, BLOCK_D, BLOCK_N)
    b_v = load_tile(p_v, start_n, M, stride_vl, D, BLOCK_D, BLOCK_N)
    b_s = dot(b_q, tl.trans(b_k))  # [BM, BN]
    b_dp = dot(b_d_out, tl.trans(b_v))  # [BM, BN]
    b_p = tl.exp2(tl.fma(b_s, scale_log2, -b_lse2[:, None]))
    if PARTLY:
        o_n = (start_n + tl.arange(0, BLOCK_N))[None, :]
        if b_prefix is None:
            b_p = tl.where(o_n < M, b_p, 0.0)
        else:
            b_p = tl.where((o_n < b_prefix[:, None]) | ((o_n >= b_start[:, None]) & (o_n < b_stop[:, None])), b_p, 0.0)
    b_ds = b_p * (b_dp - b_delta[:, None])
    return dot(b_ds.to(b_k.dtype), b_k, b_dq)


@triton.jit
def attention_query_backward_kernel(
    p_q, p_k, p_v, p_d_out, p_lse2, p_delta, p_ranges, p_dq,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    stride_db, stride_dl, stride_dh, stride_rb, scale, L, L_PADDED, M,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_h, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    H = tl.num_programs(1)
    start_m = tl.program_id(0) * BLOCK_M
    o_m = start_m + tl.arange(0, BLOCK_M)
    b_q = load_tile(p_q + i_b * stride_qb + i_h * stride_qh, start_m, L, stride_ql, D, BLOCK_D, BLOCK_M)
    b_d_out = load_tile(p_d_out + i_b * stride_db + i_h * stride_dh, start_m, L, stride_dl, D, BLOCK_D, BLOCK_M)
    row = (i_b * H + i_h) * L_PADDED
    b_lse2, b_delta = tl.load(p_lse2 + row + o_m), tl.load(p_delta + row + o_m)
    p_k += i_b * stride_kb + i_h // GROUP * stride_kh
    p_v += i_b * stride_vb + i_h // GROUP * stride_vh
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
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
        b_dq = _query_step(
            b_dq, b_q, b_d_out, b_lse2, b_delta, b_prefix, b_start, b_stop, p_k, p_v, block, stride_kl, stride_vl,
            scale_log2, M, D, BLOCK_D, BLOCK_N, False,
        )  # fmt: skip
    for i in range(b - a + d - c + f - e):
        block = tl.where(i < b - a, a + i, tl.where(i < b - a + d - c, c + i - (b - a), e + i - (b - a + d - c)))
        b_dq = _query_step(
            b_dq, b_q, b_d_out, b_lse2, b_delta, b_prefix, b_start, b_stop, p_k, p_v, block, stride_kl, stride_vl,
            scale_log2, M, D, BLOCK_D, BLOCK_N, True,
        )  # fmt: skip
    store_tile(p_dq + (i_b * L * H + i_h) * D, b_dq * scale, start_m, L, H * D, D, BLOCK_D, BLOCK_M)


_tuned_delta = tuned(DELTA_TILES, key=["D"])(attention_delta_kernel)
_tuned_key = tuned(KEY_TILES, key=["D", "GROUP", "L", "M", "p_ranges"])(attention_key_backward_kernel)
_tuned_key_fp32 = tuned(FP32_TILES, key=["D"])(attention_key_backward_kernel)
_tuned_query = tuned(QUERY_TILES, key=["D", "GROUP", "L", "M", "p_ranges"])(attention_query_backward_kernel)
_tuned_query_fp32 = tuned(FP32_TILES, key=["D"])(attention_query_backward_kernel)


def _query_spans(ranges: Tensor, M: int) -> Tensor:
    """(B or 1, ceil(M / 64), 2) int32: for each group of 64 keys the queries [first, stop) that see any of them, in
    whole groups of 64. Transient: ``L * M / 256`` bytes."""
    L, span = ranges.shape[1], SPAN.value
    prefix, start, stop = torch.nn.functional.pad(ranges, (0, 0, 0, -L % span)).unflatten(1, (-1, span)).unbind(-1)
    some = start < stop
    prefix, start, stop = prefix.amax(-1), start.where(some, M).amin(-1), stop.where(some, 0).amax(-1)
    key = torch.arange(0, M, span, device=ranges.device)
    query = torch.arange(0, L, span, device=ranges.device, dtype=torch.int32)[:, None]
    seen = (prefix[..., None] > key) | ((start[..., None] < key + span) & (stop[..., None] > key))
    return torch.stack([query.where(seen, L).amin(1), (query + span).where(seen, 0).amax(1)], -1)


@operator("attention_backward")
def attention_backward_op(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
    ranges: Tensor | None = None, wanted_q: bool = True, wanted_kv: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv). Unwanted gradients are not computed and have no elements. Also allocates 8 bytes per query and head
    (padded to 128)."""
    require_card("attention", q)
    d_out, q, k, v, out = (aligned(x) for x in (d_out, q, k, v, out))
    out, lse, ranges = out.contiguous(), lse.contiguous(), None if ranges is None else ranges.contiguous()
    B, L, H, d = q.shape
    M, G = k.shape[1:3]
    sizes = {"D": d, "BLOCK_D": triton.next_power_of_2(d)}
    padded = L + -L % PADDING
    lse2, delta = q.new_empty(2, B, H, padded, dtype=torch.float32)
    strides = [n for x in (q, k, v, d_out) for n in x.stride()[:3]]
    stride_r = 0 if ranges is None else row_stride(ranges)
    exact = q.dtype is torch.float32
    dq, dk, dv = _empty_gradients(q, k, v, wanted_q, wanted_kv)
    with torch.cuda.device_of(q):
        _tuned_delta[lambda meta: (triton.cdiv(padded, meta["BLOCK_M"]), H, B)](
            out, d_out, lse, lse2, delta, *d_out.stride()[:3], L, padded, **sizes
        )
        if wanted_kv:
            spans = None if ranges is None else _query_spans(ranges, M)
            stride_s = 0 if spans is None else row_stride(spans)
            (_tuned_key_fp32 if exact else _tuned_key)[lambda meta: (triton.cdiv(M, meta["BLOCK_N"]), G, B)](
                q, k, v, d_out, lse2, delta, ranges, spans, dk, dv, *strides, stride_r, stride_s, scale, L, padded, M,
                GROUP=H // G, **sizes,
            )  # fmt: skip
        if wanted_q:
            (_tuned_query_fp32 if exact else _tuned_query)[lambda meta: (triton.cdiv(L, meta["BLOCK_M"]), H, B)](
                q, k, v, d_out, lse2, delta, ranges, dq, *strides, stride_r, scale, L, padded, M, GROUP=H // G, **sizes
            )
    return dq, dk, dv


@torch.library.register_fake(attention_backward_op)
def _(d_out, q, k, v, out, lse, scale, ranges=None, wanted_q=True, wanted_kv=True):
    return _empty_gradients(q, k, v, wanted_q, wanted_kv)


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor, wanted_q: bool, wanted_kv: bool) -> tuple[Tensor, Tensor, Tensor]:
    wanted = ((q, wanted_q), (k, wanted_kv), (v, wanted_kv))
    dq, dk, dv = (x.new_empty(x.shape if want else 0) for x, want in wanted)
    return dq, dk, dv


@register_flop_formula(torch.ops.lowmem_drf.attention_backward)
def _(d_out, q_shape, k_shape, v, out, lse, scale, ranges=None, wanted_q=True, wanted_kv=True, **_) -> int:
    """As PyTorch counts its own attention: 5 products of all queries with all keys (shapes do not show what ranges
    leave out), of which dQ and dK with dV share S and dP."""
    B, L, H, d = q_shape
    return 2 * B * H * L * k_shape[1] * d * (2 * (wanted_q or wanted_kv) + wanted_q + 2 * wanted_kv)


def variants(card: int) -> Iterator[Variant]:
    """The three kernels with every tile of a card, on the cases of the models."""
    yield from attention_variants(attention_delta_kernel, DELTA_TILES, card, fp32_tiles=DELTA_TILES)
    yield from attention_variants(attention_key_backward_kernel, KEY_TILES, card)
    yield from attention_variants(attention_query_backward_kernel, QUERY_TILES, card)
