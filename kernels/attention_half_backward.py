"""The backward pass of attention with sums in fp16, for cards whose tensor cores do that twice as fast as sums in fp32.
The same gradient: fp16 rounds eight times finer than bf16, and no number leaves its range.

The formulas are those of ``attention_backward.py``. Tensors are divided by powers of two, of v one for a head and of
the others one for ``ROWS`` tokens of a head, and rounded to fp16, which keeps bf16's bits::

    q' = q / u_q    d' = dO / u_d    k' = k / u_k    v' = v / u_v    P' = 2^P_BITS P    dS' = P' * (d' v'^T - delta')

S = u_q u_k q' k'^T is summed in fp32, because P is its exponential. The other four products are summed in fp16 over the
channels, or over ``ROWS`` keys or queries, and then multiplied by the powers and added in fp32. Bounds:

- |d' v'^T| and |delta'| are below N = 2^(D_OUT_BITS + V_BITS) = 2^7, for these bits bound the norms of rows, and out
  is a mean of rows of v. So |d' v'^T - delta'| is at most 2 N (1 - P). What is above that is rounding, and cut off: a
  query that sees one key alone has no gradient.
- dQ: a row of P sums to 1 and its dS to 0, so a row of |dS'| sums to at most 2^P_BITS N = 2^14, and k' is below 1. (The
  log-sum-exp of an 8-bit forward may be off by one.)
- dK: P (1 - P) is at most 1/4, so |dS'| is at most 2^13; 64 of them with q' below 2^Q_BITS: 2^15.
- dV: 64 times P' d', with d' below 2^2: 2^15.

fp16 ends at 2^16, and its full precision at 2^-14, where P is 2^-21.
``python -m bench.accuracy.attention_backward`` has the errors of both ways.

q' lies in the memory of dq until dq is known. Heads are taken in two parts, so that sums and d' take no more memory
than the sums of the other way.

Shapes as in ``attention_backward.py``, but Wan's alone: H = G, d = 128, and no ranges.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowmem_drf.kernels.attention_common import LOG2E, STAGGER, dot, half_dot, load_tile, query_parts, store_tile
from lowmem_drf.kernels.tiles import CARDS, Tile, Variant, tiles_for, tuned, variant

DTYPES, HEAD_DIM = (torch.bfloat16, torch.float16), 128
ROWS = 64
"""Tokens that share a power of two, and whose products are summed in fp16."""
P_BITS, D_OUT_BITS, V_BITS, K_BITS, Q_BITS = 7, 2, 5, 0, -4
"""Numbers are below two to this power; of d' and v' the norms of rows."""
NORM_BITS = D_OUT_BITS + V_BITS
GEFORCE = (86, 89, 120)
"""Cards that take it (``WAYS`` in ``attention_backward.py``); the others could."""

ROW_TILES = (
    Tile({"BLOCK_M": ROWS}, 8, 1, CARDS, "the rows of a power; reads and writes, and keeps nothing"),
)  # fmt: skip
HALF_TILES = (
    Tile({"BLOCK_M": ROWS, "BLOCK_N": ROWS}, 8, 2, CARDS,
         "as many queries as fp16 sums allow; P and dS pass through shared memory"),
)  # fmt: skip


@triton.jit
def _power(largest, BITS: tl.constexpr):
    """(unit, 1 / unit), powers of two with ``largest`` / unit < 2^BITS. Beyond 2^-87 and 2^87 they stay, so that both
    exist."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) + (1 - BITS)
    exponent = tl.minimum(tl.maximum(exponent, 40), 214)
    return (exponent << 23).to(tl.float32, bitcast=True), ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _scaled(b_x, BITS: tl.constexpr, NORMS: tl.constexpr):
    """(x / unit in fp16, unit, 1 / unit) for a block of rows: numbers, or with ``NORMS`` the norms of rows, are below
    2^BITS."""
    b_x = b_x.to(tl.float32)
    unit, inverse = _power(tl.max(tl.max(tl.abs(b_x), 1), 0), BITS)
    if NORMS:  # of numbers that are neither too large nor too small to be squared; of zeros 1
        b_y = b_x * inverse
        more, less = _power(tl.maximum(tl.sqrt(tl.max(tl.sum(b_y * b_y, 1), 0)), 1.0), BITS)
        unit, inverse = unit * more, inverse * less
    return (b_x * inverse).to(tl.float16), unit, inverse


@triton.jit
def attention_half_rows_kernel(
    p_q, p_d_out, p_out, p_lse, p_q16, p_d16, p_lse2, p_delta, p_q_unit, p_d_unit,
    stride_qb, stride_ql, stride_qh, stride_db, stride_dl, stride_dh, stride_ob, stride_ol, stride_oh,
    stride_gb, stride_gl, stride_gh, stride_eb, stride_eh, L, L_PADDED,
    Q_BITS: tl.constexpr, D_OUT_BITS: tl.constexpr, P_BITS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """q' and d' with their powers; lse in units of log 2, less P_BITS; delta'."""
    i_h, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    H = tl.num_programs(1)
    start = tl.program_id(0) * BLOCK_M
    o_m = start + tl.arange(0, BLOCK_M)
    b_q = load_tile(p_q + i_b * stride_qb + i_h * stride_qh, start, L, stride_ql, D, D, BLOCK_M)
    b_d_out = load_tile(p_d_out + i_b * stride_db + i_h * stride_dh, start, L, stride_dl, D, D, BLOCK_M)
    b_out = load_tile(p_out + i_b * stride_ob + i_h * stride_oh, start, L, stride_ol, D, D, BLOCK_M)
    b_q16, q_unit, _ = _scaled(b_q, Q_BITS, False)
    b_d16, d_unit, d_inverse = _scaled(b_d_out, D_OUT_BITS, True)
    store_tile(p_q16 + i_b * stride_gb + i_h * stride_gh, b_q16, start, L, stride_gl, D, D, BLOCK_M)
    store_tile(p_d16 + (i_b * L * H + i_h) * D, b_d16, start, L, H * D, D, D, BLOCK_M)
    row = i_b * H + i_h
    block = row * tl.num_programs(0) + tl.program_id(0)
    tl.store(p_q_unit + block, q_unit)
    tl.store(p_d_unit + block, d_unit)
    b_lse = tl.load(p_lse + i_b * stride_eb + i_h * stride_eh + o_m, mask=o_m < L, other=float("inf"))
    tl.store(p_lse2 + row * L_PADDED + o_m, b_lse * LOG2E - P_BITS)
    b_delta = tl.sum(b_out.to(tl.float32) * (b_d_out.to(tl.float32) * d_inverse), 1)
    tl.store(p_delta + row * L_PADDED + o_m, b_delta)


@triton.jit
def _add_to_dq(p_dq, b_ds, b_k, unit, times, D: tl.constexpr, BLOCK_M: tl.constexpr):
    """Adds the part of these keys to a block of dq, without its scale; nothing if ``times`` is 0."""
    o_m, o_d = tl.arange(0, BLOCK_M), tl.arange(0, D)
    m_d = tl.zeros_like(o_d) < times
    b_dq = half_dot(tl.trans(b_ds), b_k).to(tl.float32) * unit  # [BM, D]
    tl.atomic_add(p_dq + ((o_m * D)[:, None] + o_d[None, :]), b_dq, mask=m_d[None, :], sem="relaxed")


@triton.jit
def attention_half_backward_kernel(
    p_k, p_v, p_q16, p_d16, p_lse2, p_delta, p_q_unit, p_d_unit, p_v_norm, p_sums, p_dk, p_dv,
    stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh, stride_gb, stride_gl, stride_gh,
    stride_ns, stride_nb, stride_nl, stride_nh, scale, L, L_PADDED, M, SPLITS,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, NORM_BITS: tl.constexpr, P_BITS: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds dQ without its scale to ``p_sums``, (B, H, L_PADDED, d) in fp32. dK and dV have a leading dimension for the
    parts of the queries."""
    i_h, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    H = tl.num_programs(1)
    i_n, i_split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    start_n = i_n * BLOCK_N
    o_n = start_n + tl.arange(0, BLOCK_N)
    b_k = load_tile(p_k + i_b * stride_kb + i_h * stride_kh, start_n, M, stride_kl, D, D, BLOCK_N)
    b_v = load_tile(p_v + i_b * stride_vb + i_h * stride_vh, start_n, M, stride_vl, D, D, BLOCK_N)
    b_k, k_unit, _ = _scaled(b_k, K_BITS, False)
    b_k = tl.where((o_n < M)[:, None], b_k, 0.0)  # keys beyond M have no part in dq
    v_unit, v_inverse = _power(tl.load(p_v_norm + i_b * H + i_h), V_BITS)
    b_v = (b_v.to(tl.float32) * v_inverse).to(tl.float16)
    p_q16 += i_b * stride_gb + i_h * stride_gh
    p_d16 += (i_b * L * H + i_h) * D
    row, blocks = i_b * H + i_h, L_PADDED // BLOCK_M
    p_lse2, p_delta, p_sums = p_lse2 + row * L_PADDED, p_delta + row * L_PADDED, p_sums + row * L_PADDED * D
    p_q_unit, p_d_unit = p_q_unit + row * blocks, p_d_unit + row * blocks
    b_dk = tl.zeros([BLOCK_N, D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, D], tl.float32)
    dv_unit = 1.0 / (1 << P_BITS)
    dk_unit = v_unit * dv_unit
    dq_unit = k_unit * dk_unit
    s_unit = scale * LOG2E * k_unit
    stop = tl.cdiv(L, BLOCK_M)
    share = tl.cdiv(stop, SPLITS)
    first = i_split * share
    count = tl.maximum(tl.minimum(share, stop - first), 0)
    begin = tl.minimum(i_n % STAGGER, tl.maximum(count - 1, 0))
    p_late = p_sums
    b_late = tl.zeros([BLOCK_N, BLOCK_M], tl.float16)
    late_unit = 0.0
    for i in range(count):
        _add_to_dq(p_late, b_late, b_k, late_unit, i, D, BLOCK_M)
        i_m = first + begin + i - tl.where(begin + i < count, 0, count)
        start_m = i_m * BLOCK_M
        p_late = p_sums + start_m.to(tl.int64) * D
        o_m = start_m + tl.arange(0, BLOCK_M)
        b_q = load_tile(p_q16, start_m, L, stride_gl, D, D, BLOCK_M)
        b_d = load_tile(p_d16, start_m, L, H * D, D, D, BLOCK_M)
        q_unit, d_unit = tl.load(p_q_unit + i_m), tl.load(p_d_unit + i_m)
        b_s = dot(b_k, tl.trans(b_q))  # [BN, BM]
        b_p = tl.fma(b_s, s_unit * q_unit, -tl.load(p_lse2 + o_m)[None, :])
        b_p = tl.exp2(tl.minimum(b_p, P_BITS))  # as it is but for rounding, and for keys beyond M
        b_dp = half_dot(b_v, tl.trans(b_d))  # [BN, BM]
        b_ds = b_dp.to(tl.float32) - (tl.load(p_delta + o_m) * v_inverse)[None, :]
        b_most = (2 << NORM_BITS) - b_p * (2.0 ** (NORM_BITS + 1 - P_BITS))
        b_late = (b_p * tl.clamp(b_ds, -b_most, b_most, tl.PropagateNan.ALL)).to(tl.float16)
        b_dv += half_dot(b_p.to(tl.float16), b_d).to(tl.float32) * d_unit
        b_dk += half_dot(b_late, b_q).to(tl.float32) * (q_unit * d_unit)
        late_unit = dq_unit * d_unit
    _add_to_dq(p_late, b_late, b_k, late_unit, count, D, BLOCK_M)
    place = i_split * stride_ns + i_b * stride_nb + i_h * stride_nh
    store_tile(p_dk + place, b_dk * (dk_unit * scale), start_n, M, stride_nl, D, D, BLOCK_N)
    store_tile(p_dv + place, b_dv * dv_unit, start_n, M, stride_nl, D, D, BLOCK_N)


_tuned_rows = tuned(ROW_TILES, key=[])(attention_half_rows_kernel)
_tuned_half = tuned(HALF_TILES, key=["D", "L", "M"])(attention_half_backward_kernel)


def may_be_half(q: Tensor, k: Tensor, ranges: Tensor | None) -> bool:
    return q.dtype in DTYPES and q.shape[3] == HEAD_DIM and q.shape[2] == k.shape[2] and ranges is None


def half_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, gradients: Sequence[Tensor]
) -> None:
    """Writes dq, dk and dv, for inputs that are ``aligned``. Also allocates ``half_workspace``."""
    for some in _halves(q.shape[2]):
        inputs, written = ([x[:, :, some] for x in tensors] for tensors in ((d_out, q, k, v, out), gradients))
        _backward_of_heads(*inputs, lse[:, some], scale, written)


def _halves(H: int) -> list[slice]:
    """The first part is not smaller."""
    return [slice(0, -(-H // 2)), slice(-(-H // 2), H)][: min(H, 2)]


def _backward_of_heads(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, gradients: Sequence[Tensor]
) -> None:
    dq, dk, dv = gradients
    B, L, H, d = q.shape
    M = k.shape[1]
    padded, splits = L + -L % ROWS, query_parts(L, M, H, B)
    v_norm = torch.linalg.vector_norm(v, dim=-1, dtype=torch.float32).amax(1)
    q16, d16 = dq.view(torch.float16), q.new_empty(q.shape, dtype=torch.float16)
    lse2, delta = q.new_empty(2, B, H, padded, dtype=torch.float32)
    q_unit, d_unit = q.new_empty(2, B, H, padded // ROWS, dtype=torch.float32)
    sums = q.new_zeros(B, H, padded, d, dtype=torch.float32)
    _tuned_rows[lambda meta: (padded // ROWS, H, B)](
        q, d_out, out, lse, q16, d16, lse2, delta, q_unit, d_unit,
        *(n for x in (q, d_out, out, q16) for n in x.stride()[:3]), *lse.stride()[:2], L, padded,
        Q_BITS=Q_BITS, D_OUT_BITS=D_OUT_BITS, P_BITS=P_BITS, D=d,
    )  # fmt: skip
    partial = (dk[None], dv[None]) if splits == 1 else q.new_empty(2, splits, B, M, H, d, dtype=torch.float32)
    _tuned_half[lambda meta: (triton.cdiv(M, meta["BLOCK_N"]) * splits, H, B)](
        k, v, q16, d16, lse2, delta, q_unit, d_unit, v_norm, sums, *partial,
        *(n for x in (k, v, q16) for n in x.stride()[:3]), *partial[0].stride()[:4], scale, L, padded, M, splits,
        K_BITS=K_BITS, V_BITS=V_BITS, NORM_BITS=NORM_BITS, P_BITS=P_BITS, D=d,
    )  # fmt: skip
    if splits > 1:
        for gradient, summands in zip((dk, dv), partial, strict=True):
            gradient.copy_(summands.sum(0))
    torch.mul(sums[:, :, :L].transpose(1, 2), scale, out=dq)


def half_workspace(q: Tensor, k: Tensor) -> int:
    """Bytes that ``half_backward`` allocates, for the larger half of the heads: d' in fp16; dq in fp32, log-sum-exp and
    delta (padded to ``ROWS``) and powers; where the queries are taken in parts, which for fewer heads are more, their
    dk and dv in fp32, and one sum."""
    B, L, H, d = q.shape
    M, blocks, found = k.shape[1], triton.cdiv(L, ROWS), []
    for some in _halves(H):
        heads = some.stop - some.start
        splits = query_parts(L, M, heads, B)
        parts = (splits > 1) * (2 * splits + 1) * 4 * M * d
        found.append(B * heads * (2 * L * d + 4 * blocks * (ROWS * (d + 2) + 2) + parts))
    return max(found)


def variants(card: int) -> Iterator[Variant]:
    """Both kernels with every tile of a card, in both dtypes."""
    fp32 = ("p_lse", "p_lse2", "p_delta", "p_q_unit", "p_d_unit", "p_v_norm", "p_sums", "scale")
    kinds = dict.fromkeys(fp32, "fp32") | dict.fromkeys(("p_q16", "p_d16"), "fp16")
    bits = {"Q_BITS": Q_BITS, "D_OUT_BITS": D_OUT_BITS, "P_BITS": P_BITS, "K_BITS": K_BITS, "V_BITS": V_BITS}
    bits["NORM_BITS"] = NORM_BITS
    for kernel, tiles in ((attention_half_rows_kernel, ROW_TILES), (attention_half_backward_kernel, HALF_TILES)):
        mine = {name: value for name, value in bits.items() if name in kernel.arg_names}
        for element in ("bf16", "fp16"):
            for tile in tiles_for(tiles, card):
                yield variant(kernel, tile, element, mine | {"D": HEAD_DIM}, **kinds)
