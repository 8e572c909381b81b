"""The backward pass of attention (``attention.py``: forward pass, public functions), and code that both passes share.

With S = scale q k^T, P = exp(S - lse) and the upstream gradient dO (FlashAttention-2: Dao 2023, arXiv 2307.08691,
algorithm 2)::

    delta = rowsum(dO * O)      dV = P^T dO            dP = dO V^T
    dS = P * (dP - delta)       dQ = scale dS K        dK = scale dS^T Q

P is recomputed tile by tile from q, k and the log-sum-exp. Results are deterministic, without atomics: one kernel for
dK and dV loops over the queries (of all heads that share the key head), another for dQ over the keys. That computes S
and dP twice: 7 products instead of 5. P and dS are rounded to the inputs' dtype for the products; sums, exponentials
and lse are fp32.

Shapes: q, out, d_out (B, L, H, d); k, v (B, M, G, d), H a multiple of G; lse (B, H, L) fp32; ranges (B or 1, L, 3)
int32 or none.

Common to the tiles below: before Hopper, Triton gives each warp 16 whole rows if a tile has at least as many rows as
channels (128); otherwise it splits by columns, and P and dS go through shared memory. Three stages in most, because
with two the copy of the next block starts only when a block is done. Registers decide the rest (255 per thread;
``bench/kernels/resources.py`` counts them).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lowmem_drf.kernels.tiles import CARDS, INTERPRETED, Tile, Variant, tiles_for, tuned

UPCAST = tl.constexpr(INTERPRETED)
LOG2E = tl.constexpr(1.4426950408889634)
SPAN = tl.constexpr(64)
"""Group size of queries and keys in ``_query_spans``."""
PADDING = 128
"""lse and delta are padded to a multiple of this, the largest tile, so that they need no masks."""

DELTA_TILES = (
    Tile({"BLOCK_M": 64}, 4, 1, CARDS, "reads 2 x 16 KiB at d = 128 and keeps nothing: bandwidth is all there is"),
)
KEY_TILES = (
    Tile(
        {"BLOCK_M": 16, "BLOCK_N": 128},
        8,
        3,
        (86, 89, 120),
        "16 rows a warp and 81 KiB; these tensor cores are slow enough for 16 queries at a time",
    ),
    Tile(
        {"BLOCK_M": 64, "BLOCK_N": 64},
        8,
        2,
        (86, 89, 120),
        "a quarter of the barriers, at the price of P and dS through shared memory; 73 KiB",
    ),
    Tile(
        {"BLOCK_M": 64, "BLOCK_N": 64},
        8,
        3,
        (80,),
        "64 queries between two barriers, three stages, and registers to spare; 106 KiB",
    ),
    Tile(
        {"BLOCK_M": 32, "BLOCK_N": 64},
        4,
        3,
        (80,),
        "two blocks on a multiprocessor: one multiplies while the other one exponentiates; 69 KiB",
    ),
    Tile(
        {"BLOCK_M": 64, "BLOCK_N": 128},
        8,
        3,
        (90,),
        "two warp groups of 64 keys; 128 queries would not leave room for dK and dV in registers; 162 KiB",
    ),
    Tile({"BLOCK_M": 64, "BLOCK_N": 64}, 4, 2, (90,), "one warp group, two blocks on a multiprocessor; 97 KiB"),
)
QUERY_TILES = (
    Tile(
        {"BLOCK_M": 128, "BLOCK_N": 32},
        8,
        3,
        (80, 86, 89, 120),
        "16 rows a warp, three stages, and 96 KiB: all that the smaller cards have",
    ),
    Tile(
        {"BLOCK_M": 64, "BLOCK_N": 32},
        4,
        3,
        (86, 89, 120),
        "half the shared memory, 68 KiB, and twice the blocks: short sequences fill the card",
    ),
    Tile(
        {"BLOCK_M": 128, "BLOCK_N": 64},
        8,
        3,
        (80, 90),
        "twice the products between two barriers; 128 KiB, 160 on Hopper",
    ),
    Tile({"BLOCK_M": 64, "BLOCK_N": 64}, 4, 2, (90,), "one warp group, two blocks on a multiprocessor; 96 KiB"),
)
FP32_TILES = (
    Tile(
        {"BLOCK_M": 32, "BLOCK_N": 32},
        8,
        1,
        CARDS,
        "exact fp32 products run outside the tensor cores: small; for tests and toy models",
    ),
)


@triton.jit
def dot(b_x, b_y, b_acc=None):
    """``b_acc + b_x @ b_y`` in fp32. The interpreter's dot does not support bf16."""
    if UPCAST:
        b_x, b_y = b_x.to(tl.float32), b_y.to(tl.float32)
    return tl.dot(b_x, b_y, b_acc, input_precision="ieee")


@triton.jit
def load_tile(p_x, start, length, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    """Rows ``start`` to ``start + BLOCK`` of a matrix of ``length`` rows. Beyond the end it repeats the last row, which
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
    """The key blocks that a block of queries sees, as six ascending bounds: all queries see all of [0, a) and [d, e),
    some see some of [a, b), [c, d) and [e, f)."""
    none = b_start >= b_stop
    a = tl.maximum(tl.min(b_prefix, 0), 0) // BLOCK_N
    b = tl.maximum(tl.cdiv(tl.max(b_prefix, 0), BLOCK_N), a)
    c = tl.maximum(tl.maximum(tl.min(tl.where(none, M, b_start), 0), 0) // BLOCK_N, b)
    f = tl.maximum(tl.cdiv(tl.max(tl.where(none, 0, b_stop), 0), BLOCK_N), c)
    d = tl.minimum(tl.maximum(tl.cdiv(tl.max(b_start, 0), BLOCK_N), c), f)
    e = tl.minimum(tl.maximum(tl.min(tl.where(none, 0, b_stop), 0) // BLOCK_N, d), f)
    return a, b, c, d, e, f


@triton.jit
def attention_delta_kernel(
    p_out,
    p_d_out,
    p_lse,
    p_lse2,
    p_delta,
    stride_db,
    stride_dl,
    stride_dh,
    L,
    L_PADDED,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    i_h, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    H = tl.num_programs(1)
    start = tl.program_id(0) * BLOCK_M
    o_m = start + tl.arange(0, BLOCK_M)
    b_out = load_tile(p_out + (i_b * L * H + i_h) * D, start, L, H * D, D, BLOCK_D, BLOCK_M).to(tl.float32)
    b_d_out = load_tile(p_d_out + i_b * stride_db + i_h * stride_dh, start, L, stride_dl, D, BLOCK_D, BLOCK_M).to(
        tl.float32
    )
    b_lse = tl.load(p_lse + (i_b * H + i_h) * L + o_m, mask=o_m < L, other=float("-inf"))
    row = (i_b * H + i_h) * L_PADDED
    tl.store(p_lse2 + row + o_m, tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2E), mask=o_m < L_PADDED)
    tl.store(p_delta + row + o_m, tl.sum(b_out * b_d_out, 1), mask=o_m < L_PADDED)


@triton.jit
def attention_key_backward_kernel(
    p_q, p_k, p_v, p_d_out, p_lse2, p_delta, p_ranges, p_spans, p_dk, p_dv,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh, stride_db, stride_dl, stride_dh, stride_rb, stride_sb,
    scale, L, L_PADDED, M, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
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
        count = tl.maximum(
            tl.cdiv(tl.maximum(tl.load(p_spans + 2 * i_first + 1), tl.load(p_spans + 2 * i_last + 1)), BLOCK_M) - first,
            0,
        )
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
            seen = (o_n[:, None] < b_prefix[None, :]) | (
                (o_n[:, None] >= b_start[None, :]) & (o_n[:, None] < b_stop[None, :])
            )
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
    b_dq, b_q, b_d_out, b_lse2, b_delta, b_prefix, b_start, b_stop, p_k, p_v, block, stride_kl, stride_vl, scale_log2, M,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PARTLY: tl.constexpr,
):  # fmt: skip
    """What one block of keys adds to dq."""
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
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh, stride_db, stride_dl, stride_dh, stride_rb,
    scale, L, L_PADDED, M, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
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
            b_dq,
            b_q,
            b_d_out,
            b_lse2,
            b_delta,
            b_prefix,
            b_start,
            b_stop,
            p_k,
            p_v,
            block,
            stride_kl,
            stride_vl,
            scale_log2,
            M,
            D,
            BLOCK_D,
            BLOCK_N,
            False,
        )
    for i in range(b - a + d - c + f - e):
        block = tl.where(i < b - a, a + i, tl.where(i < b - a + d - c, c + i - (b - a), e + i - (b - a + d - c)))
        b_dq = _query_step(
            b_dq,
            b_q,
            b_d_out,
            b_lse2,
            b_delta,
            b_prefix,
            b_start,
            b_stop,
            p_k,
            p_v,
            block,
            stride_kl,
            stride_vl,
            scale_log2,
            M,
            D,
            BLOCK_D,
            BLOCK_N,
            True,
        )
    store_tile(p_dq + (i_b * L * H + i_h) * D, b_dq * scale, start_m, L, H * D, D, BLOCK_D, BLOCK_M)


_tuned_delta = tuned(DELTA_TILES, key=["D"])(attention_delta_kernel)
_tuned_key, _tuned_key_fp32 = (
    tuned(tiles, key=["D"])(attention_key_backward_kernel) for tiles in (KEY_TILES, FP32_TILES)
)
_tuned_query, _tuned_query_fp32 = (
    tuned(tiles, key=["D"])(attention_query_backward_kernel) for tiles in (QUERY_TILES, FP32_TILES)
)


def check_inputs(
    tensors: Mapping[str, Tensor],
    scale: float | None,
    dtypes: Sequence[torch.dtype],
    head_dims: Sequence[int],
    otherwise: str,
) -> float:
    """The scale to use.

    Args:
        tensors: q, k, v, and what else has to be on their device.
        otherwise: what to call for inputs that do not fit.

    Raises:
        TypeError: a dtype that is not one of ``dtypes``, or several.
        ValueError: shapes or devices that do not fit together; a scale that is not positive.
    """
    q, k, v = (tensors[name] for name in "qkv")
    if len({x.dtype for x in (q, k, v)}) > 1 or q.dtype not in dtypes:
        got, known = (
            ", ".join(f"{name} {x.dtype}" for name, x in tensors.items()),
            ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes),
        )
        raise TypeError(f"q, k and v must have one dtype of {known}; got {got}. For others take {otherwise}.")
    if len({x.device for x in tensors.values()}) > 1 or q.device.type not in ("cuda", "cpu"):
        raise ValueError(
            f"All tensors must be on one CUDA card; got {', '.join(f'{name} on {x.device}' for name, x in tensors.items())}."
        )
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
    if (
        q.dim() != 4
        or k.dim() != 4
        or k.shape != v.shape
        or q.shape[0] != k.shape[0]
        or q.shape[3] != k.shape[3]
        or 0 in (*q.shape, *k.shape)
    ):
        raise ValueError(f"q must be (B, L, H, d), k and v (B, M, G, d), none of them empty; got {shapes}.")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"The heads of q must be a multiple of those of k; got {shapes}.")
    if q.shape[3] not in head_dims:
        raise ValueError(f"The head dimension must be one of {head_dims}; got {shapes}. For others take {otherwise}.")
    if scale is not None and scale <= 0:
        raise ValueError(f"scale must be positive, got {scale}.")
    return q.shape[3] ** -0.5 if scale is None else float(scale)


def launchable(x: Tensor) -> Tensor:
    """x with a contiguous last dimension, as the kernels need; other strides are free."""
    if x.device.type == "cpu" and not INTERPRETED:
        raise ValueError(
            "Attention's kernels need tensors on a CUDA card, got CPU tensors. Use attention_naive there, or set TRITON_INTERPRET=1."
        )
    return x if x.stride(-1) == 1 else x.contiguous()


def _query_spans(ranges: Tensor, M: int) -> Tensor:
    """(B or 1, ceil(M / 64), 2) int32: for each group of 64 keys the first query and one past the last query that see
    any of them, in groups of 64. Transient: ``L * M / 256`` bytes."""
    L, span = ranges.shape[1], SPAN.value
    prefix, start, stop = torch.nn.functional.pad(ranges, (0, 0, 0, -L % span)).unflatten(1, (-1, span)).unbind(-1)
    some = start < stop
    prefix, start, stop = prefix.amax(-1), start.where(some, M).amin(-1), stop.where(some, 0).amax(-1)
    key = torch.arange(0, M, span, device=ranges.device)
    query = torch.arange(0, L, span, device=ranges.device, dtype=torch.int32)[:, None]
    seen = (prefix[..., None] > key) | ((start[..., None] < key + span) & (stop[..., None] > key))
    return torch.stack([query.where(seen, L).amin(1), (query + span).where(seen, 0).amax(1)], -1)


@torch.library.custom_op("lowmem_drf::attention_backward", mutates_args=())
def attention_backward_op(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    ranges: Tensor | None = None,
    wanted_q: bool = True,
    wanted_kv: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv); unwanted ones are not computed and empty. Also allocates 8 bytes per query and head (padded to
    128)."""
    d_out, q, k, v = (launchable(x) for x in (d_out, q, k, v))
    out, lse, ranges = out.contiguous(), lse.contiguous(), None if ranges is None else ranges.contiguous()
    B, L, H, d = q.shape
    M, G = k.shape[1:3]
    sizes = {"D": d, "BLOCK_D": triton.next_power_of_2(d)}
    padded = L + -L % PADDING
    lse2, delta = q.new_empty(2, B, H, padded, dtype=torch.float32)
    _tuned_delta[lambda meta: (triton.cdiv(padded, meta["BLOCK_M"]), H, B)](
        out, d_out, lse, lse2, delta, *d_out.stride()[:3], L, padded, **sizes
    )
    strides = [n for x in (q, k, v, d_out) for n in x.stride()[:3]]
    rows = 0 if ranges is None or len(ranges) == 1 else ranges.stride(0)
    exact = q.dtype is torch.float32
    dq, dk, dv = (
        q.new_empty(q.shape if wanted_q else 0),
        k.new_empty(k.shape if wanted_kv else 0),
        v.new_empty(v.shape if wanted_kv else 0),
    )
    if wanted_kv:
        spans = None if ranges is None else _query_spans(ranges, M)
        stride_s = 0 if spans is None or len(spans) == 1 else spans.stride(0)
        (_tuned_key_fp32 if exact else _tuned_key)[lambda meta: (triton.cdiv(M, meta["BLOCK_N"]), G, B)](
            q, k, v, d_out, lse2, delta, ranges, spans, dk, dv, *strides, rows, stride_s, scale, L, padded, M, GROUP=H // G, **sizes
        )  # fmt: skip
    if wanted_q:
        (_tuned_query_fp32 if exact else _tuned_query)[lambda meta: (triton.cdiv(L, meta["BLOCK_M"]), H, B)](
            q, k, v, d_out, lse2, delta, ranges, dq, *strides, rows, scale, L, padded, M, GROUP=H // G, **sizes
        )
    return dq, dk, dv


@attention_backward_op.register_fake
def _(d_out, q, k, v, out, lse, scale, ranges=None, wanted_q=True, wanted_kv=True):
    return (
        q.new_empty(q.shape if wanted_q else 0),
        k.new_empty(k.shape if wanted_kv else 0),
        v.new_empty(v.shape if wanted_kv else 0),
    )


@register_flop_formula(torch.ops.lowmem_drf.attention_backward)
def _(
    d_out_shape,
    q_shape,
    k_shape,
    v_shape,
    o_shape,
    lse_shape,
    scale,
    ranges_shape=None,
    wanted_q=True,
    wanted_kv=True,
    **_,
) -> int:
    """FLOPs as PyTorch counts its own: 5 products of all queries with all keys (shapes do not tell what ranges leave
    out), with S and dP counted once."""
    B, L, H, d = q_shape
    return 2 * B * H * L * k_shape[1] * d * (2 * (wanted_q or wanted_kv) + wanted_q + 2 * wanted_kv)


CASES = ((128, False, 1), (128, True, 7), (80, True, 1))
"""(d, ranges, query heads per key head) of the models: Wan; the critic's language model; its vision tower."""


def describe(
    element: str, d: int, ranges: bool, group: int, pointers: str, strided: str, numbers: str
) -> tuple[dict[str, str], dict[str, object]]:
    """Types and constants of a kernel's arguments: pointers (to ``element``, or as named here), strides by tensor and
    dimension, numbers."""
    known = {"lse": "*fp32", "lse2": "*fp32", "delta": "*fp32", "ranges": "*i32", "spans": "*i32"}
    types = {f"p_{x}": known.get(x, f"*{element}") for x in pointers.split() if ranges or x not in ("ranges", "spans")}
    types |= {f"stride_{x}{n}": "i32" for x in strided for n in "blh"} | {
        x: "fp32" if x == "scale" else "i32" for x in numbers.split()
    }
    constants = {f"p_{x}": None for x in pointers.split() if not ranges and x in ("ranges", "spans")}
    return types, constants | {"GROUP": group, "D": d, "BLOCK_D": triton.next_power_of_2(d)}


def variants(card: int) -> Iterator[Variant]:
    """Every kernel and tile of a card: each case above in bf16, the first one also in fp16, the fp32 tile once."""
    runs = [("bf16", *case, KEY_TILES, QUERY_TILES) for case in CASES]
    runs += [("fp16", *CASES[0], KEY_TILES, QUERY_TILES), ("fp32", 32, True, 1, FP32_TILES, FP32_TILES)]
    for element, d, ranges, group, key_tiles, query_tiles in runs:
        types, constants = describe(element, d, ranges, group, "out d_out lse lse2 delta", "d", "L L_PADDED")
        del constants["GROUP"]
        for tile in tiles_for(DELTA_TILES, card):
            yield Variant(attention_delta_kernel, tile, types, constants)
        numbers = "scale L L_PADDED M"
        described = describe(
            element,
            d,
            ranges,
            group,
            "q k v d_out lse2 delta ranges spans dk dv",
            "qkvd",
            f"stride_rb stride_sb {numbers}",
        )
        for tile in tiles_for(key_tiles, card):
            yield Variant(attention_key_backward_kernel, tile, *described)
        described = describe(
            element, d, ranges, group, "q k v d_out lse2 delta ranges dq", "qkvd", f"stride_rb {numbers}"
        )
        for tile in tiles_for(query_tiles, card):
            yield Variant(attention_query_backward_kernel, tile, *described)
