"""The backward pass of attention; ``attention.py`` has the forward pass and the public functions.

With S = scale q k^T, P = exp(S - lse) and the upstream gradient dO (FlashAttention-2: Dao 2023, arXiv 2307.08691,
algorithm 2)::

    delta = rowsum(dO * O)    dP = dO V^T    dS = P * (dP - delta)
    dV = P^T dO    dQ = scale dS K    dK = scale dS^T Q

P is recomputed tile by tile from q, k and the log-sum-exp. A program holds a block of keys for one query head, dK and
dV in registers, and blocks of queries pass: five products. Each pass adds its part of dQ to a buffer in fp32 with
atomics, whose order differs from run to run, and so do the last bits of dQ. ``deterministic``: the same kernel without
dQ, and ``attention_query_backward.py`` for dQ: seven products, the same bits every time. P and dS are rounded to the
dtype of the inputs for the products; sums, exponentials and lse are fp32.

Programs of the query heads that share a key head, and of the parts of the queries where there are too few keys to fill
a card, write their dK and dV in fp32; a sum in fixed order follows.

Shapes: q, out, d_out (B, L, H, d); k, v (B, M, G, d), H a multiple of G; lse (B, H, L) fp32; ranges (B or 1, L, 3)
int32 or None.

``attention_half_backward.py`` is another way to all gradients, for GeForce cards. A run times both (``WAYS``); without
that, sums are in fp32.

Choice of tiles: before Hopper, Triton gives every warp 16 whole rows if a tile has at least as many rows as channels
(128). Otherwise it splits the tile by columns, and P and dS pass through shared memory. Most tiles have three stages,
because with two the copy of the next block starts only when a block is done; the five products add dQ one block late,
which covers that copy. Registers decide the rest (255 a thread; ``bench/kernels/resources.py`` counts them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lowmem_drf.kernels.attention_common import (
    FP32_TILES,
    LOG2E,
    STAGGER,
    attention_variants,
    dot,
    load_ranges,
    load_tile,
    query_parts,
    store_tile,
)
from lowmem_drf.kernels.attention_half_backward import GEFORCE, half_backward, half_workspace, may_be_half
from lowmem_drf.kernels.attention_query_backward import tuned_query, tuned_query_fp32
from lowmem_drf.kernels.checks import aligned, require_card, row_stride
from lowmem_drf.kernels.operators import operator
from lowmem_drf.kernels.tiles import CARDS, Tile, Variant, tuned

SPAN = tl.constexpr(64)
"""``_query_spans`` works on groups of this many queries and keys."""
PADDING = 128
"""lse, delta and the sums of dq are padded to a multiple of the largest tile's rows, so that they need no mask."""

DELTA_TILES = (
    Tile({"BLOCK_M": 64}, 4, 1, CARDS, "reads 2 x 16 KiB at d = 128 and keeps nothing: bandwidth is all there is"),
)
JOINT_TILES = (
    Tile({"BLOCK_M": 64, "BLOCK_N": 64}, 8, 2, (86, 89, 90, 120),
         "FlashAttention-2's choice on the smaller cards; 97 KiB of their 99, 81 on sm_120, 129 on Hopper"),
    Tile({"BLOCK_M": 64, "BLOCK_N": 64}, 8, 3, (80,), "the same with three stages; 131 KiB"),
)  # fmt: skip
WAYS = (
    Tile({"HALF": 0}, 1, 1, CARDS, "sums in fp32: on data center cards as fast as in fp16"),
    Tile({"HALF": 1}, 1, 1, GEFORCE, "sums in fp16 at twice the rate, for a pass over q and dO, and conversions"),
)  # fmt: skip
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
def _add_to_dq(p_dq, b_ds, b_k, times, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr):
    """Adds the part of these keys to a block of dq, without its scale; nothing if ``times`` is 0."""
    o_m, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    m_d = (o_d < D) & (tl.zeros_like(o_d) < times)
    b_dq = dot(tl.trans(b_ds), b_k)  # [BM, BD]
    tl.atomic_add(p_dq + ((o_m * D)[:, None] + o_d[None, :]), b_dq, mask=m_d[None, :], sem="relaxed")


@triton.jit
def attention_key_backward_kernel(
    p_q, p_k, p_v, p_d_out, p_lse2, p_delta, p_ranges, p_spans, p_sums, p_dk, p_dv,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    stride_db, stride_dl, stride_dh, stride_rb, stride_sb, scale, L, L_PADDED, M, SPLITS,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK and dV, and unless ``p_sums`` is None also dQ: zeros (B, H, L_PADDED, d) in fp32, to which it adds. dK and dV
    are (SPLITS * GROUP, B, M, G, d)."""
    i_h, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    H, B = tl.num_programs(1), tl.num_programs(2)
    i_g, i_n, i_split = i_h // GROUP, tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    start_n = i_n * BLOCK_N
    o_n = start_n + tl.arange(0, BLOCK_N)
    b_k = load_tile(p_k + i_b * stride_kb + i_g * stride_kh, start_n, M, stride_kl, D, BLOCK_D, BLOCK_N)
    b_v = load_tile(p_v + i_b * stride_vb + i_g * stride_vh, start_n, M, stride_vl, D, BLOCK_D, BLOCK_N)
    p_q += i_b * stride_qb + i_h * stride_qh
    p_d_out += i_b * stride_db + i_h * stride_dh
    row = (i_b * H + i_h) * L_PADDED
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    scale_log2 = scale * LOG2E
    first = 0
    stop = tl.cdiv(L, BLOCK_M)
    if p_ranges is not None:
        p_ranges += i_b * stride_rb
        p_spans += i_b * stride_sb
        i_first, i_last = start_n // SPAN, (tl.minimum(start_n + BLOCK_N, M) - 1) // SPAN
        first = tl.minimum(tl.load(p_spans + 2 * i_first), tl.load(p_spans + 2 * i_last)) // BLOCK_M
        stop = tl.cdiv(tl.maximum(tl.load(p_spans + 2 * i_first + 1), tl.load(p_spans + 2 * i_last + 1)), BLOCK_M)
    share = tl.cdiv(tl.maximum(stop - first, 0), SPLITS)
    first += i_split * share
    count = tl.maximum(tl.minimum(share, stop - first), 0)
    if p_sums is not None:
        if p_ranges is None:
            b_k = tl.where((o_n < M)[:, None], b_k, 0.0)  # they have no part in dq
        begin = tl.minimum(i_n % STAGGER, tl.maximum(count - 1, 0))
        p_sums += row * D
        p_late = p_sums
        b_late = tl.zeros([BLOCK_N, BLOCK_M], b_k.dtype)
    for i in range(count):
        if p_sums is None:
            start_m = (first + i) * BLOCK_M
        else:
            _add_to_dq(p_late, b_late, b_k, i, D, BLOCK_D, BLOCK_M)
            start_m = (first + begin + i - tl.where(begin + i < count, 0, count)) * BLOCK_M
            p_late = p_sums + start_m.to(tl.int64) * D
        o_m = start_m + tl.arange(0, BLOCK_M)
        b_q = load_tile(p_q, start_m, L, stride_ql, D, BLOCK_D, BLOCK_M)
        b_d_out = load_tile(p_d_out, start_m, L, stride_dl, D, BLOCK_D, BLOCK_M)
        b_s = dot(b_k, tl.trans(b_q))  # [BN, BM]
        b_p = tl.fma(b_s, scale_log2, -tl.load(p_lse2 + row + o_m)[None, :])
        if p_sums is not None and p_ranges is None:
            b_p = tl.minimum(b_p, 0.0)  # as it is but for rounding, and for keys beyond M
        b_p = tl.exp2(b_p)
        if p_ranges is not None:
            b_prefix, b_start, b_stop = load_ranges(p_ranges, o_m, L, M)
            o_k = o_n[:, None]
            seen = (o_k < b_prefix[None, :]) | ((o_k >= b_start[None, :]) & (o_k < b_stop[None, :]))
            b_p = tl.where(seen, b_p, 0.0)
        b_dv = dot(b_p.to(b_d_out.dtype), b_d_out, b_dv)
        b_dp = dot(b_v, tl.trans(b_d_out))  # [BN, BM]
        b_ds = (b_p * (b_dp - tl.load(p_delta + row + o_m)[None, :])).to(b_q.dtype)
        b_dk = dot(b_ds, b_q, b_dk)
        if p_sums is not None:
            b_late = b_ds
    if p_sums is not None:
        _add_to_dq(p_late, b_late, b_k, count, D, BLOCK_D, BLOCK_M)
    G = H // GROUP
    row = ((i_split * GROUP + i_h % GROUP) * B + i_b) * M * G + i_g
    store_tile(p_dk + row * D, b_dk * scale, start_n, M, G * D, D, BLOCK_D, BLOCK_N)
    store_tile(p_dv + row * D, b_dv, start_n, M, G * D, D, BLOCK_D, BLOCK_N)


_tuned_delta = tuned(DELTA_TILES, key=["D"])(attention_delta_kernel)
_tuned_joint = tuned(JOINT_TILES, key=["D", "GROUP", "L", "M", "p_ranges", "p_sums"])(attention_key_backward_kernel)
_tuned_joint_fp32 = tuned(FP32_TILES, key=["D"])(attention_key_backward_kernel)
_tuned_key = tuned(KEY_TILES, key=["D", "GROUP", "L", "M", "p_ranges", "p_sums"])(attention_key_backward_kernel)
_tuned_key_fp32 = tuned(FP32_TILES, key=["D"])(attention_key_backward_kernel)


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


def _backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
    gradients: tuple[Tensor, Tensor, Tensor], ranges: Tensor | None = None,
    wanted_q: bool = True, wanted_kv: bool = True, deterministic: bool = False,
) -> None:  # fmt: skip
    """Sums in fp32."""
    B, L, H, d = q.shape
    M, G = k.shape[1:3]
    sizes = {"D": d, "BLOCK_D": triton.next_power_of_2(d)}
    padded = L + -L % PADDING
    lse2, delta = q.new_empty(2, B, H, padded, dtype=torch.float32)
    strides = [n for x in (q, k, v, d_out) for n in x.stride()[:3]]
    stride_r = 0 if ranges is None else row_stride(ranges)
    dq, dk, dv = gradients
    exact, joint = q.dtype is torch.float32, wanted_q and wanted_kv and not deterministic
    _tuned_delta[lambda meta: (triton.cdiv(padded, meta["BLOCK_M"]), H, B)](
        out, d_out, lse, lse2, delta, *d_out.stride()[:3], L, padded, **sizes
    )
    if wanted_kv:
        sums = q.new_zeros(B, H, padded, d, dtype=torch.float32) if joint else None
        splits = query_parts(L, M, H, B)
        parts = splits * (H // G)
        partial = (dk, dv) if parts == 1 else q.new_empty(2, parts, *k.shape, dtype=torch.float32)
        spans = None if ranges is None else _query_spans(ranges, M)
        stride_s = 0 if spans is None else row_stride(spans)
        kernels = (_tuned_joint, _tuned_joint_fp32) if joint else (_tuned_key, _tuned_key_fp32)
        kernels[exact][lambda meta: (triton.cdiv(M, meta["BLOCK_N"]) * splits, H, B)](
            q, k, v, d_out, lse2, delta, ranges, spans, sums, *partial, *strides, stride_r, stride_s, scale,
            L, padded, M, splits, GROUP=H // G, **sizes,
        )  # fmt: skip
        if parts > 1:
            for gradient, summands in zip((dk, dv), partial, strict=True):
                gradient.copy_(summands.sum(0))
        if sums is not None:
            torch.mul(sums[:, :, :L].transpose(1, 2), scale, out=dq)
    if wanted_q and not joint:
        (tuned_query_fp32 if exact else tuned_query)[lambda meta: (triton.cdiv(L, meta["BLOCK_M"]), H, B)](
            q, k, v, d_out, lse2, delta, ranges, dq, *strides, stride_r, scale, L, padded, M, GROUP=H // G, **sizes
        )


class _Way:
    """Both ways to all gradients, each with all that it launches, as a kernel that ``Tuned`` may time."""

    __name__ = "attention_backward"
    arg_names = ("d_out", "q", "k", "v", "out", "lse", "scale", "gradients", "L", "M", "D")

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._run

    @staticmethod
    def _run(*arguments: Any, HALF: int, **_: Any) -> None:
        *inputs, _, _ = arguments
        (half_backward if HALF else _backward)(*inputs)


tuned_ways = tuned(WAYS, key=["D", "L", "M"])(_Way())


@operator("attention_backward")
def attention_backward_op(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
    ranges: Tensor | None = None, wanted_q: bool = True, wanted_kv: bool = True, deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv). Unwanted gradients are not computed and have no elements. Also allocates at most
    ``attention_backward_workspace``."""
    require_card("attention", q)
    d_out, q, k, v, out = (aligned(x) for x in (d_out, q, k, v, out))
    out, lse, ranges = out.contiguous(), lse.contiguous(), None if ranges is None else ranges.contiguous()
    gradients = dq, dk, dv = _empty_gradients(q, k, v, wanted_q, wanted_kv)
    inputs = d_out, q, k, v, out, lse
    with torch.cuda.device_of(q):
        if wanted_q and wanted_kv and not deterministic and may_be_half(q, k, ranges):
            tuned_ways[()](*inputs, scale, gradients, q.shape[1], k.shape[1], D=q.shape[3])
        else:
            _backward(*inputs, scale, gradients, ranges, wanted_q, wanted_kv, deterministic)
    return dq, dk, dv


@torch.library.register_fake(attention_backward_op)
def _(d_out, q, k, v, out, lse, scale, ranges=None, wanted_q=True, wanted_kv=True, deterministic=False):
    return _empty_gradients(q, k, v, wanted_q, wanted_kv)


def attention_backward_workspace(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
    ranges: Tensor | None = None, wanted_q: bool = True, wanted_kv: bool = True, deterministic: bool = False,
) -> int:  # fmt: skip
    """Bytes that the op allocates beside its results, at most: log-sum-exp and delta, 4 each per query and head (padded
    to 128); unless ``deterministic`` dq in fp32; where several programs share a key, their dk and dv in fp32, and one
    sum; or what ``half_backward`` takes. Not the spans of ranges, and copies of inputs that are not ``aligned``."""
    B, L, H, d = q.shape
    rows, parts = B * H * (L + -L % PADDING), query_parts(L, k.shape[1], H, B) * (H // k.shape[2])
    joint = wanted_q and wanted_kv and not deterministic
    found = 4 * (2 * rows + rows * d * joint + wanted_kv * (parts > 1) * (2 * parts + 1) * k.numel())
    return max(found, half_workspace(q, k)) if joint and may_be_half(q, k, ranges) else found


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor, wanted_q: bool, wanted_kv: bool) -> tuple[Tensor, Tensor, Tensor]:
    wanted = ((q, wanted_q), (k, wanted_kv), (v, wanted_kv))
    dq, dk, dv = (x.new_empty(x.shape if want else 0) for x, want in wanted)
    return dq, dk, dv


@register_flop_formula(torch.ops.lowmem_drf.attention_backward)
def _(
    d_out, q_shape, k_shape, v, out, lse, scale, ranges=None, wanted_q=True, wanted_kv=True, deterministic=False, **_
) -> int:
    """All queries with all keys, as PyTorch counts its own attention, because shapes do not show what ranges leave out:
    5 products; 7 if ``deterministic``, which computes S and dP twice."""
    B, L, H, d = q_shape
    products = 3 * wanted_q + 4 * wanted_kv - 2 * (wanted_q and wanted_kv and not deterministic)
    return 2 * B * H * L * k_shape[1] * d * products


def variants(card: int) -> Iterator[Variant]:
    """The two kernels with every tile of a card, on the cases of the models."""
    yield from attention_variants(attention_delta_kernel, DELTA_TILES, card, fp32_tiles=DELTA_TILES)
    yield from attention_variants(attention_key_backward_kernel, JOINT_TILES, card)
    yield from attention_variants(attention_key_backward_kernel, KEY_TILES, card, none=("p_sums",))
