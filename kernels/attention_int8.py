"""Attention that computes q k^T in 8-bit integers and p v in fp16, forward only (after SageAttention and
SageAttention2: Zhang et al. 2024, arXiv 2410.02367 and 2411.10958)::

    q' = (q - mean of q) W^-1 R                        means over the tokens of a head; W: a power of two a channel
    k' = (k - mean of k) W R                           R: Hadamard matrix, R R^T = d
    q' = s_q q8,  k' = s_k k8                          s: largest |element| of a token / 127; halves round away from 0
    scores = scale / d s_q s_k q8 k8^T + extra         q8 k8^T exact in int32
    extra = scale (mean of q) (k - mean of k)^T        one number for a key, in fp32
    out = softmax(scores) v                            softmax in fp32, p and v in fp16; their products are summed in
                                                       fp16 over 64 keys and in fp32 beyond
    lse = log sum exp(scores) + scale q (mean of k)^T      of the scores that q and k themselves have, up to rounding

A channel in which all tokens are far from zero, or one that is larger than the others, would take most of the 8 bits.
The means take away the first kind (that of k adds the same to all scores of a query, which the softmax cancels). What
is left of a channel is given to q and k in equal parts by W (SmoothQuant: Xiao et al. 2022, arXiv 2211.10438), and the
rotation, which leaves q k^T as it is, spreads it over all channels. Scores are rounded in proportion to |q'| |k'|, and
the product of sum (rms of q / w)^2 and sum (w rms of k)^2 is least at w^2 = rms of q / rms of k (Cauchy and Schwarz);
W is that w, rounded to a power of two so that products with it are exact.

Tensor cores run integer products at least twice as fast as 16-bit ones. Those of GeForce cards run fp16 products
twice as fast if they sum in fp16 (``HALF`` in ``TILES``). Each channel of v is scaled by a power of two to less than
2^9: 64 keys then add up to less than 2^15, and nothing overflows.

Any backward of 16-bit attention takes out and lse: with S = scale q k^T recomputed it has P = exp(S - lse).

Shapes as in ``attention.py``: q and out (B, L, H, d); k, v (B, M, G, d), H a multiple of G; bf16 or fp16; d is 64 or
128; lse (B, H, L) fp32, natural logarithm. Every query sees every key.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lowmem_drf.kernels.attention_common import LN2, LOG2E, UPCAST, dot, half_dot, load_tile, store_tile
from lowmem_drf.kernels.checks import aligned, check_attention, require_card
from lowmem_drf.kernels.operators import operator
from lowmem_drf.kernels.tiles import CARDS, Tile, Variant, tiles_for, tuned, variant

DTYPES, HEAD_DIMS = (torch.bfloat16, torch.float16), (64, 128)
KEYS = 64
"""The most keys whose products with v are summed in fp16."""
V_BITS = 9
"""Values are below 2^9: ``KEYS`` of them, weighted with at most 1, add up to about half of fp16's largest number."""

MOST = 4
"""Weights are from 2^-4 to 2^4, so that a channel that is constant but for rounding does not grow large."""

QUANTISE_TILES = (
    Tile({"ROWS": 32}, 8, 1, CARDS, "few rows beside a thread's 64 elements of the rotation: two blocks at a time"),
)  # fmt: skip
TILES = (
    Tile({"BLOCK_M": 128, "BLOCK_N": KEYS, "HALF": 1}, 8, 3, (86, 89, 120),
         "as many keys as fp16 sums allow: the fewest additions to fp32; 16 rows a warp"),
    Tile({"BLOCK_M": 128, "BLOCK_N": 32, "HALF": 1}, 8, 4, (86, 89, 120), "fewer registers for scores"),
    Tile({"BLOCK_M": 128, "BLOCK_N": KEYS, "HALF": 0}, 8, 3, (80, 90),
         "data center cards sum in fp32 at the same rate; 16 rows a warp"),
    Tile({"BLOCK_M": 128, "BLOCK_N": 32, "HALF": 0}, 8, 4, (80,), "fewer registers for scores"),
    Tile({"BLOCK_M": 64, "BLOCK_N": KEYS, "HALF": 0}, 4, 3, (90,),
         "one warp group, two blocks on a multiprocessor: one multiplies, the other one exponentiates"),
)  # fmt: skip


def attention_int8_naive(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """out of ``attention_int8_naive_forward``."""
    return attention_int8_naive_forward(q, k, v, scale)[0]


def attention_int8_naive_forward(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse) by the formula in plain PyTorch, for d any power of two, with p and v in fp32 (fp64 inputs: all in
    fp64), and with the (L, M) matrix. What CPUs run."""
    H, d = q.shape[2:]
    if d & (d - 1):
        raise ValueError(f"The head dimension must be a power of two to be rotated; got q {tuple(q.shape)}.")
    wide = torch.promote_types(q.dtype, torch.float32)
    q_BLHd, k_BMGd, v_BMGd = (x.to(wide) for x in (q, k, v))
    means = q_mean, k_mean = q_BLHd.mean(1), k_BMGd.mean(1)
    factor, rotation = d**-0.5 if scale is None else scale, hadamard(d).to(q_BLHd)
    centred = [x - mean.unsqueeze(1) for x, mean in zip((q_BLHd, k_BMGd), means, strict=True)]
    weights = _weights(q_BLHd, k_BMGd, q_mean, k_mean)
    q8_BLHd, k8_BMGd = (
        _rounded(x * weight.to(wide).unsqueeze(1) @ rotation) for x, weight in zip(centred, weights, strict=True)
    )
    q_BHLd, q8_BHLd, k_BHMd, k8_BHMd, v_BHMd = (
        x.transpose(1, 2).repeat_interleave(H // x.shape[2], 1) for x in (q_BLHd, q8_BLHd, centred[1], k8_BMGd, v_BMGd)
    )
    q_BH1d, k_BH1d = (x.repeat_interleave(H // x.shape[1], 1).unsqueeze(2) for x in means)
    scores_BHLM = factor / d * q8_BHLd @ k8_BHMd.mT + factor * q_BH1d @ k_BHMd.mT
    lse_BHL1 = scores_BHLM.logsumexp(-1, keepdim=True)
    out = (scores_BHLM - lse_BHL1).exp() @ v_BHMd
    lse_BHL1 = lse_BHL1 + factor * q_BHLd @ k_BH1d.mT
    return out.transpose(1, 2).to(q.dtype), lse_BHL1.squeeze(-1)


def _weights(q: Tensor, k: Tensor, q_mean: Tensor, k_mean: Tensor) -> tuple[Tensor, Tensor]:
    """(W^-1 (B, H, d), W (B, G, d)), fp32, from the means (B, H, d) and (B, G, d) over tokens. The heads of q that read
    a head of k share its weights."""
    G, eps = k_mean.shape[1], torch.finfo(torch.float32).tiny
    spread_q, spread_k = (
        torch.linalg.vector_norm(x, dim=1, dtype=mean.dtype).square() / x.shape[1] - mean.square()
        for x, mean in ((q, q_mean), (k, k_mean))
    )
    ratio = spread_q.unflatten(1, (G, -1)).mean(2).clamp(min=eps) / spread_k.clamp(min=eps)
    exponent = (ratio.log2() / 4).round().clamp(-MOST, MOST).int()
    return _power_of_two(-exponent).repeat_interleave(q_mean.shape[1] // G, 1), _power_of_two(exponent)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent, exactly, in fp32, from int32; ``exp2`` is compiled at run time on a card."""
    return ((exponent + 127) << 23).view(torch.float32)


def hadamard(d: int) -> Tensor:
    """(d, d) of 1 and -1, for d a power of two. Its rows are orthogonal."""
    made = torch.ones(1, 1)
    while len(made) < d:
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    return made


def _rounded(x: Tensor) -> Tensor:
    """x quantised to 8 bits and back, with a scale for each row."""
    step = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return (x / step + x.sign() / 2).trunc() * step


@triton.jit
def quantise_kernel(
    p_x, p_mean, p_other_mean, p_weight, p_x8, p_step, p_extra, stride_xb, stride_xl, stride_xh,
    factor, extra_factor, L,
    GROUP: tl.constexpr, ARE_KEYS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of keys also ``extra``, for each of the ``GROUP`` query heads that read them, with the mean of the queries; of
    queries what lse adds, with the mean of the keys."""
    start, i_h, i_b = tl.program_id(0) * ROWS, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = i_b * tl.num_programs(1) + i_h
    o_d, o_r = tl.arange(0, D), start + tl.arange(0, ROWS)
    m_r = o_r < L
    b_x = load_tile(p_x + i_b * stride_xb + i_h * stride_xh, start, L, stride_xl, D, D, ROWS)  # [ROWS, D]
    odd = o_d[:, None] & o_d[None, :]  # the sign of the rotation is the parity of its bits
    odd ^= odd >> 4
    odd ^= odd >> 2
    odd = (odd ^ (odd >> 1)) & 1
    b_mean, b_weight = tl.load(p_mean + row * D + o_d), tl.load(p_weight + row * D + o_d)
    b_turn = (1.0 - 2.0 * odd) * b_weight[:, None]  # exact in 16 bits
    b_y = dot(b_x, b_turn.to(b_x.dtype)) - tl.sum(b_turn * b_mean[:, None], 0)[None, :]
    step = tl.maximum(tl.max(tl.abs(b_y), 1), 1e-12) / 127
    b_y = b_y / step[:, None]
    b_x8 = (b_y + tl.where(b_y < 0, -0.5, 0.5)).to(tl.int8)
    store_tile(p_x8 + (i_b * L * tl.num_programs(1) + i_h) * D, b_x8, start, L, tl.num_programs(1) * D, D, D, ROWS)
    tl.store(p_step + row * L + o_r, step * factor, mask=m_r)
    b_x = b_x.to(tl.float32)
    if ARE_KEYS:
        b_x -= b_mean[None, :]
        for i in range(GROUP):
            b_query = tl.load(p_other_mean + (row * GROUP + i) * D + o_d) * extra_factor
            tl.store(p_extra + (row * GROUP + i) * L + o_r, tl.sum(b_x * b_query[None, :], 1), mask=m_r)
    else:
        b_key = tl.load(p_other_mean + row // GROUP * D + o_d) * extra_factor
        tl.store(p_extra + row * L + o_r, tl.sum(b_x * b_key[None, :], 1), mask=m_r)


@triton.jit
def _step(
    b_acc, b_max, b_sum, b_q8, b_q_step, p_k8, p_k_step, p_extra, p_v, block, stride_k, M,
    D: tl.constexpr, BLOCK_N: tl.constexpr, HALF: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Adds one block of keys to the weighted values, the maximum (of scores in units of log 2) and the sum of
    exponentials."""
    start_n = block * BLOCK_N
    b_k8 = tl.trans(load_tile(p_k8, start_n, M, stride_k, D, D, BLOCK_N))  # [D, BN]
    b_v = load_tile(p_v, start_n, M, stride_k, D, D, BLOCK_N)
    o_n = start_n + tl.arange(0, BLOCK_N)
    o_known = tl.minimum(o_n, M - 1) if RAGGED else o_n
    b_k_step, b_extra = tl.load(p_k_step + o_known), tl.load(p_extra + o_known)
    b_s = dot(b_q8, b_k8) if UPCAST else tl.dot(b_q8, b_k8).to(tl.float32)  # [BM, BN]
    b_s = tl.fma(b_s * b_k_step[None, :], b_q_step[:, None], b_extra[None, :])
    if RAGGED:
        b_s = tl.where((o_n < M)[None, :], b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_p = tl.exp2(b_s - b_new[:, None])
    b_old = tl.exp2(b_max - b_new)
    b_sum = b_sum * b_old + tl.sum(b_p, 1)
    b_p = b_p.to(tl.float16)
    if HALF:
        b_acc = b_acc * b_old[:, None] + half_dot(b_p, b_v).to(tl.float32)
    else:
        b_acc = dot(b_p, b_v, b_acc * b_old[:, None])
    return b_acc, b_new, b_sum


@triton.jit
def attention_int8_kernel(
    p_q8, p_k8, p_v, p_q_step, p_k_step, p_extra, p_lse_extra, p_v_unit, p_out, p_lse, L, M,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    i_h, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    H = tl.num_programs(1)
    i_g, G = i_h // GROUP, H // GROUP
    start_m = tl.program_id(0) * BLOCK_M
    row, key_row = i_b * L * H + i_h, i_b * M * G + i_g
    b_q8 = load_tile(p_q8 + row * D, start_m, L, H * D, D, D, BLOCK_M)
    o_m = tl.minimum(start_m + tl.arange(0, BLOCK_M), L - 1)
    p_token = (i_b * H + i_h) * L + o_m
    b_q_step = tl.load(p_q_step + p_token)
    p_k8, p_v = p_k8 + key_row * D, p_v + key_row * D
    p_k_step, p_extra = p_k_step + (i_b * G + i_g) * M, p_extra + (i_b * H + i_h) * M
    b_acc = tl.zeros([BLOCK_M, D], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    for block in range(M // BLOCK_N):
        b_acc, b_max, b_sum = _step(
            b_acc, b_max, b_sum, b_q8, b_q_step, p_k8, p_k_step, p_extra, p_v, block, G * D, M, D, BLOCK_N, HALF, False
        )
    for block in range(M // BLOCK_N, tl.cdiv(M, BLOCK_N)):
        b_acc, b_max, b_sum = _step(
            b_acc, b_max, b_sum, b_q8, b_q_step, p_k8, p_k_step, p_extra, p_v, block, G * D, M, D, BLOCK_N, HALF, True
        )
    # rows beyond the end repeat the last one, and write the same
    tl.store(p_lse + p_token, (b_max + tl.log2(b_sum)) * LN2 + tl.load(p_lse_extra + p_token))
    b_unit = tl.load(p_v_unit + (i_b * G + i_g) * D + tl.arange(0, D))
    store_tile(p_out + row * D, b_acc / b_sum[:, None] * b_unit[None, :], start_m, L, H * D, D, D, BLOCK_M)


_tuned_quantise = tuned(QUANTISE_TILES, key=[])(quantise_kernel)
_tuned_attention = tuned(TILES, key=["D", "GROUP", "L", "M"])(attention_int8_kernel)


def _quantised(
    x: Tensor, mean: Tensor, other_mean: Tensor, weight: Tensor, are_keys: bool, factor: float, extra_factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(x in 8 bits, contiguous; its scales times ``factor``, (B, H, L) fp32; of keys ``extra``, of queries what lse
    adds, one row for each query head)."""
    B, L, H, d = x.shape
    x8, step = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(B, H, L, dtype=torch.float32)
    group = other_mean.shape[1] // H if are_keys else H // other_mean.shape[1]
    extra = step.new_empty(B, H * group if are_keys else H, L)
    _tuned_quantise[lambda meta: (triton.cdiv(L, meta["ROWS"]), H, B)](
        x, mean, other_mean, weight, x8, step, extra, *x.stride()[:3], factor, extra_factor, L,
        GROUP=group, ARE_KEYS=are_keys, D=d,
    )  # fmt: skip
    return x8, step, extra


def _scaled(v: Tensor) -> tuple[Tensor, Tensor]:
    """(v in fp16, contiguous, each channel divided by a power of two; these powers, (B, 1, G, d) fp32)."""
    largest = torch.linalg.vector_norm(v, torch.inf, dim=1, keepdim=True)
    exponent = torch.frexp(largest.float()).exponent.clamp(min=-100) - V_BITS  # largest < 2^(exponent + V_BITS)
    unit = _power_of_two(exponent)
    return torch.div(v, unit, out=v.new_empty(v.shape, dtype=torch.float16)), unit


@operator("attention_int8")
def attention_int8_op(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse). Also allocates ``attention_int8_workspace``."""
    require_card("attention_int8", q)
    q, k = aligned(q), aligned(k)
    B, L, H, d = q.shape
    M, G = k.shape[1:3]
    with torch.cuda.device_of(q):
        q_mean, k_mean = (x.mean(1, dtype=torch.float32) for x in (q, k))
        q_weight, k_weight = _weights(q, k, q_mean, k_mean)
        q8, q_step, lse_extra = _quantised(q, q_mean, k_mean, q_weight, False, scale * LOG2E.value / d, scale)
        k8, k_step, extra = _quantised(k, k_mean, q_mean, k_weight, True, 1.0, scale * LOG2E.value)
        v16, v_unit = _scaled(v)
        out, lse = q.new_empty(q.shape), q_step.new_empty(B, H, L)
        _tuned_attention[lambda meta: (triton.cdiv(L, meta["BLOCK_M"]), H, B)](
            q8, k8, v16, q_step, k_step, extra, lse_extra, v_unit, out, lse, L, M, GROUP=H // G, D=d
        )
    return out, lse


@torch.library.register_fake(attention_int8_op)
def _(q, k, v, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)


def attention_int8_workspace(q: Tensor, k: Tensor, v: Tensor, scale: float) -> int:
    """Bytes that the op allocates beside its results: q and k in 8 bits, v in fp16, the scales of tokens, ``extra``
    and what lse adds in fp32. Not the means and weights, and copies of inputs that are not ``aligned``."""
    B, L, H, _ = q.shape
    M, G = k.shape[1:3]
    return q.numel() + k.numel() + 2 * v.numel() + 4 * B * (H * (2 * L + M) + G * M)


@register_flop_formula(torch.ops.lowmem_drf.attention_int8)
def _(q_shape, k_shape, *_, **__) -> int:
    """As for 16-bit attention; half of the products are integer ones."""
    B, L, H, d = q_shape
    return 4 * B * H * L * k_shape[1] * d


def attention_int8(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v with q and k in 8 bits. There is no gradient.

    Args:
        q: (B, L, H, d), bf16 or fp16.
        k: (B, M, G, d), the same dtype, H a multiple of G.
        v: as k.
        scale: positive; None: d ** -0.5.

    Returns:
        (B, L, H, d).

    Raises:
        TypeError: a dtype that the kernels do not have.
        ValueError: shapes or devices that do not match; an input requires a gradient while gradients are recorded.
    """
    return attention_int8_forward(q, k, v, scale)[0]


def attention_int8_forward(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse) of ``attention_int8``, lse (B, H, L) fp32, for callers that then call a backward of 16-bit attention,
    for example ``attention_backward``. Raises as ``attention_int8``."""
    tensors = {"q": q, "k": k, "v": v}
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors.values()):
        raise ValueError("attention_int8 has no gradient. Call it under torch.no_grad(), or take attention.")
    otherwise = "attention or attention_int8_naive"
    return attention_int8_op(q, k, v, check_attention(tensors, scale, DTYPES, HEAD_DIMS, otherwise))


def variants(card: int) -> Iterator[Variant]:
    """Both kernels with every tile of a card, in both dtypes, for Wan's 128 channels and for 64; quantisation of keys
    and of queries."""
    fp32 = (
        "p_mean",
        "p_other_mean",
        "p_weight",
        "p_step",
        "p_q_step",
        "p_k_step",
        "p_extra",
        "p_lse_extra",
        "p_v_unit",
        "p_lse",
    )
    kinds = dict.fromkeys((*fp32, "factor", "extra_factor"), "fp32") | dict.fromkeys(("p_x8", "p_q8", "p_k8"), "i8")
    for element in ("bf16", "fp16"):
        for d in HEAD_DIMS:
            constants = {"GROUP": 1, "D": d}
            for tile in tiles_for(QUANTISE_TILES, card):
                for are_keys in (False, True):
                    yield variant(quantise_kernel, tile, element, constants | {"ARE_KEYS": are_keys}, **kinds)
            for tile in tiles_for(TILES, card):
                yield variant(attention_int8_kernel, tile, element, constants, p_v="fp16", **kinds)
