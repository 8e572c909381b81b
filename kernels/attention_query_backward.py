"""The gradient of the queries alone, of which ``attention_backward.py`` has the formulas: where nothing else is wanted,
or where the same inputs must give the same bits.

A block of queries stays in registers while blocks of keys pass, as in the forward pass, so dQ needs no atomics. S and
dP are computed for it alone: 3 products.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

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
from lowmem_drf.kernels.tiles import Tile, Variant, tuned

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


tuned_query = tuned(QUERY_TILES, key=["D", "GROUP", "L", "M", "p_ranges"])(attention_query_backward_kernel)
tuned_query_fp32 = tuned(FP32_TILES, key=["D"])(attention_query_backward_kernel)


def variants(card: int) -> Iterator[Variant]:
    """The kernel with every tile of a card, on the cases of the models."""
    yield from attention_variants(attention_query_backward_kernel, QUERY_TILES, card)
