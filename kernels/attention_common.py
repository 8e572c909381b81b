"""Tile loads, products and key ranges of all attention kernels, and the cases that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import triton
import triton.language as tl

from lowmem_drf.kernels.tiles import CARDS, INTERPRETED, Tile, Variant, tiles_for, variant

UPCAST = tl.constexpr(INTERPRETED)
LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)

STAGGER = tl.constexpr(8)
"""Neighbouring programs begin at different query blocks, as many as this, so that fewer add to the same rows of dq at
once. All of them are in the L2 cache."""
PROGRAMS = 512
"""Four for each multiprocessor of an RTX 4090: queries are split where there are fewer blocks of 64 keys."""
LEAST_QUERIES = 1024
"""Of a part of the queries; fewer would not be worth the sums."""

FP32_TILES = (
    Tile({"BLOCK_M": 32, "BLOCK_N": 32}, 8, 1, CARDS,
         "exact fp32 products run outside the tensor cores: small; for tests and toy models"),
)  # fmt: skip


@triton.jit
def dot(b_x, b_y, b_acc=None):
    """``b_acc + b_x @ b_y`` in fp32. The interpreter's dot knows no bf16."""
    if UPCAST:
        b_x, b_y = b_x.to(tl.float32), b_y.to(tl.float32)
    return tl.dot(b_x, b_y, b_acc, input_precision="ieee")


@triton.jit
def half_dot(b_x, b_y):
    """``b_x @ b_y`` with sums in fp16. The interpreter sums in fp32: one rounding."""
    if UPCAST:
        return dot(b_x, b_y).to(tl.float16)
    return tl.dot(b_x, b_y, out_dtype=tl.float16)


@triton.jit
def load_tile(p_x, start, length, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    """Rows ``start`` to ``start + BLOCK`` of a matrix of ``length`` rows. Rows beyond the end repeat the last one: that
    takes fewer registers than a mask."""
    o_r, o_d = tl.minimum(tl.arange(0, BLOCK), length - 1 - start), tl.arange(0, BLOCK_D)
    p_tile = p_x + start.to(tl.int64) * stride + ((o_r * stride)[:, None] + o_d[None, :])  # [BLOCK, BD]
    if D < BLOCK_D:
        return tl.load(p_tile, mask=(o_d < D)[None, :], other=0.0)
    return tl.load(p_tile)


@triton.jit
def store_tile(p_x, b_x, start, length, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    o_r, o_d = start + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    p_tile = p_x + (o_r.to(tl.int64) * stride)[:, None] + o_d[None, :]  # [BLOCK, BD]
    tl.store(p_tile, b_x.to(p_x.dtype.element_ty), mask=(o_r < length)[:, None] & (o_d < D)[None, :])


@triton.jit
def load_ranges(p_ranges, o_m, L, M):
    """(prefix, start, stop) of each query within [0, M]; a query beyond L sees nothing."""
    m_m = o_m < L
    b_prefix = tl.load(p_ranges + o_m * 3, mask=m_m, other=0)
    b_start = tl.load(p_ranges + o_m * 3 + 1, mask=m_m, other=0)
    b_stop = tl.load(p_ranges + o_m * 3 + 2, mask=m_m, other=0)
    return tl.minimum(b_prefix, M), b_start, tl.minimum(b_stop, M)


@triton.jit
def seen_blocks(b_prefix, b_start, b_stop, M, BLOCK_N: tl.constexpr):
    """Key blocks that a block of queries sees: six bounds in order. All queries see all keys of the blocks [0, a) and
    [d, e); some see some keys of [a, b), [c, d) and [e, f)."""
    none = b_start >= b_stop
    a = tl.maximum(tl.min(b_prefix, 0), 0) // BLOCK_N
    b = tl.maximum(tl.cdiv(tl.max(b_prefix, 0), BLOCK_N), a)
    c = tl.maximum(tl.maximum(tl.min(tl.where(none, M, b_start), 0), 0) // BLOCK_N, b)
    f = tl.maximum(tl.cdiv(tl.max(tl.where(none, 0, b_stop), 0), BLOCK_N), c)
    d = tl.minimum(tl.maximum(tl.cdiv(tl.max(b_start, 0), BLOCK_N), c), f)
    e = tl.minimum(tl.maximum(tl.min(tl.where(none, 0, b_stop), 0) // BLOCK_N, d), f)
    return a, b, c, d, e, f


def query_parts(L: int, M: int, H: int, B: int) -> int:
    """Parts of the queries in a backward pass. They follow from the shapes alone, so that sums have the same order
    everywhere."""
    return max(1, min(PROGRAMS // (triton.cdiv(M, 64) * H * B), L // LEAST_QUERIES))


CASES = ((128, False, 1), (128, True, 7), (80, True, 1))
"""(d, ranges, query heads to a key head) of the models: Wan; the critic's language model; its vision tower."""


def attention_variants(
    kernel: Any, tiles: Sequence[Tile], card: int, fp32_tiles: Sequence[Tile] = FP32_TILES, none: Sequence[str] = ()
) -> Iterator[Variant]:
    """Variants of one kernel with every tile of a card: each of ``CASES`` in bf16, the first one in fp16 too (the same
    code of the same size), and the fp32 tile once.

    Args:
        none: arguments that are None.
    """
    runs = [("bf16", *case, tiles) for case in CASES]
    runs += [("fp16", *CASES[0], tiles), ("fp32", 32, True, 1, fp32_tiles)]
    fp32 = dict.fromkeys(("p_lse", "p_lse2", "p_delta", "p_sums", "scale"), "fp32")
    for element, d, ranges, group, chosen in runs:
        constants: dict[str, Any] = dict.fromkeys(none)
        constants |= {} if ranges else {"p_ranges": None, "p_spans": None}
        constants |= {"GROUP": group, "D": d, "BLOCK_D": triton.next_power_of_2(d)}
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        kinds = fp32 | ({"p_dk": "fp32", "p_dv": "fp32"} if group > 1 else {})
        for tile in tiles_for(chosen, card):
            yield variant(kernel, tile, element, constants, p_ranges="i32", p_spans="i32", **kinds)
