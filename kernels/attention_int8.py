"""Attention that computes q k^T in 8-bit integers, for passes without gradient (SageAttention: Zhang et al. 2024, arXiv
2410.02367)::

    k'  = k - mean of k over the tokens     adds the same to all scores of a query, which the softmax cancels
    q   = s_q q8,  k' = s_k k8              s: largest |element| / 127, over 128 queries or 64 keys of a head;
                                            halves are rounded away from 0
    out = softmax(scale s_q s_k q8 k8^T) v  q8 k8^T exact in int32, softmax in fp32,
                                            p v in the dtype of the inputs with fp32 sums

Tensor cores run integer products at least twice as fast as 16-bit ones, and k8 has half the bytes of k. Subtracting the
mean matters because rotary embeddings and normalised keys leave channels in which all keys are far from zero; these
would waste most of the 8 bits.

Shapes as in ``attention.py``: q and out (B, L, H, d); k, v (B, M, G, d), H a multiple of G; bf16 or fp16; d is 64 or
128. Every query sees every key.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from lowmem_drf.kernels.attention_common import LOG2E, UPCAST, dot, load_tile, store_tile
from lowmem_drf.kernels.checks import aligned, check_attention, require_card
from lowmem_drf.kernels.operators import operator
from lowmem_drf.kernels.tiles import CARDS, Tile, Variant, tiles_for, tuned, variant

HEAD_DIMS = (64, 128)
QUERIES, KEYS = tl.constexpr(128), tl.constexpr(64)
"""Rows that share a scale."""

QUANTISE_TILES = (
    Tile({}, 8, 1, CARDS,
         "the rows of one scale at a time, at most 32 KiB: 64 registers a thread keep them from maximum to rounding"),
)  # fmt: skip
TILES = (
    Tile({"BLOCK_M": 128, "BLOCK_N": 64}, 8, 3, CARDS,
         "a block of keys with one scale; 16 rows a warp; 64 KiB, 89 on Hopper"),
    Tile({"BLOCK_M": 128, "BLOCK_N": 32}, 8, 4, (80, 86, 89, 120),
         "52 KiB, and few enough registers for two blocks on a multiprocessor of an A100"),
    Tile({"BLOCK_M": 64, "BLOCK_N": 64}, 4, 3, (90,),
         "one warp group, two blocks on a multiprocessor: one multiplies, the other one exponentiates; 81 KiB"),
)  # fmt: skip


def attention_int8_naive(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """The formula in plain PyTorch, with the (L, M) matrix. Computes in fp32 (fp64 inputs: in fp64)."""
    B, L, H, d = q.shape
    M, G = k.shape[1:3]
    q_BLHd, k_BMGd, v_BMGd = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
    q_BLHd = _rounded(q_BLHd, QUERIES.value)
    k_BMGd = _rounded(k_BMGd - k_BMGd.mean(1, keepdim=True), KEYS.value)
    q_BLGHd = q_BLHd.unflatten(2, (G, H // G)) * (d**-0.5 if scale is None else scale)
    p_BGHLM = torch.einsum("blghd,bmgd->bghlm", q_BLGHd, k_BMGd).softmax(-1)
    return torch.einsum("bghlm,bmgd->blghd", p_BGHLM, v_BMGd).flatten(2, 3).to(q.dtype)


def _rounded(x_BLHd: Tensor, rows: int) -> Tensor:
    """x quantised to 8 bits and back."""
    groups = F.pad(x_BLHd, (0, 0, 0, 0, 0, -x_BLHd.shape[1] % rows)).unflatten(1, (-1, rows))
    step = groups.abs().amax((2, 4), keepdim=True).clamp(min=1e-12) / 127
    return ((groups / step + groups.sign() / 2).trunc() * step).flatten(1, 2)[:, : x_BLHd.shape[1]]


@triton.jit
def quantise_kernel(
    p_x, p_mean, p_x8, p_step, stride_xb, stride_xl, stride_xh, factor, L, ROWS: tl.constexpr, D: tl.constexpr
):
    i, i_h, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    H = tl.num_programs(1)
    p_x += i_b * stride_xb + i_h * stride_xh
    b_x = load_tile(p_x, i * ROWS, L, stride_xl, D, D, ROWS).to(tl.float32)  # [ROWS, D]
    if p_mean is not None:
        b_x -= tl.load(p_mean + (i_b * H + i_h) * D + tl.arange(0, D))[None, :]
    step = tl.maximum(tl.max(tl.max(tl.abs(b_x), 1), 0), 1e-12) / 127
    b_x = b_x / step
    b_x8 = (b_x + tl.where(b_x < 0, -0.5, 0.5)).to(tl.int8)
    store_tile(p_x8 + (i_b * L * H + i_h) * D, b_x8, i * ROWS, L, H * D, D, D, ROWS)
    tl.store(p_step + (i_b * H + i_h) * tl.num_programs(0) + i, step * factor)


@triton.jit
def _step(
    b_acc, b_max, b_sum, b_q8, q_step, p_k8, p_k_step, p_v, block, stride_kl, stride_vl, M,
    D: tl.constexpr, BLOCK_N: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Adds one block of keys to the weighted values, the maximum (of scores in units of log 2) and the sum of
    exponentials."""
    start_n = block * BLOCK_N
    b_k8 = tl.trans(load_tile(p_k8, start_n, M, stride_kl, D, D, BLOCK_N))  # [D, BN]
    b_v = load_tile(p_v, start_n, M, stride_vl, D, D, BLOCK_N)
    b_s = dot(b_q8, b_k8) if UPCAST else tl.dot(b_q8, b_k8).to(tl.float32)  # [BM, BN]
    step = q_step * tl.load(p_k_step + start_n // KEYS)
    if RAGGED:
        b_s = tl.where((start_n + tl.arange(0, BLOCK_N) < M)[None, :], b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * step)
    b_p = tl.exp2(tl.fma(b_s, step, -b_new[:, None]))
    b_old = tl.exp2(b_max - b_new)
    b_sum = b_sum * b_old + tl.sum(b_p, 1)
    b_acc = dot(b_p.to(b_v.dtype), b_v, b_acc * b_old[:, None])
    return b_acc, b_new, b_sum


@triton.jit
def attention_int8_kernel(
    p_q8, p_k8, p_v, p_q_step, p_k_step, p_out, stride_vb, stride_vl, stride_vh, L, M,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_h, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    H = tl.num_programs(1)
    i_g, G = i_h // GROUP, H // GROUP
    start_m = tl.program_id(0) * BLOCK_M
    row = i_b * L * H + i_h
    b_q8 = load_tile(p_q8 + row * D, start_m, L, H * D, D, D, BLOCK_M)
    q_step = tl.load(p_q_step + (i_b * H + i_h) * tl.cdiv(L, QUERIES) + start_m // QUERIES)
    p_k8 += (i_b * M * G + i_g) * D
    p_k_step += (i_b * G + i_g) * tl.cdiv(M, KEYS)
    p_v += i_b * stride_vb + i_g * stride_vh
    b_acc = tl.zeros([BLOCK_M, D], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    for block in range(M // BLOCK_N):
        b_acc, b_max, b_sum = _step(
            b_acc, b_max, b_sum, b_q8, q_step, p_k8, p_k_step, p_v, block, G * D, stride_vl, M, D, BLOCK_N, False
        )
    for block in range(M // BLOCK_N, tl.cdiv(M, BLOCK_N)):
        b_acc, b_max, b_sum = _step(
            b_acc, b_max, b_sum, b_q8, q_step, p_k8, p_k_step, p_v, block, G * D, stride_vl, M, D, BLOCK_N, True
        )
    store_tile(p_out + row * D, b_acc / b_sum[:, None], start_m, L, H * D, D, D, BLOCK_M)


_tuned_quantise = tuned(QUANTISE_TILES, key=[])(quantise_kernel)
_tuned_attention = tuned(TILES, key=["D", "GROUP", "L", "M"])(attention_int8_kernel)


def _quantised(x: Tensor, mean: Tensor | None, rows: int, factor: float) -> tuple[Tensor, Tensor]:
    """(x in 8 bits, contiguous; its scales times ``factor``, (B, H, ceil(L / rows)) fp32)."""
    B, L, H, d = x.shape
    blocks = triton.cdiv(L, rows)
    x8, step = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(B, H, blocks, dtype=torch.float32)
    _tuned_quantise[(blocks, H, B)](x, mean, x8, step, *x.stride()[:3], factor, L, ROWS=rows, D=d)
    return x8, step


@operator("attention_int8")
def attention_int8_op(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Also allocates one byte per element of q and k, and the fp32 scales."""
    require_card("attention_int8", q)
    q, k, v = (aligned(x) for x in (q, k, v))
    B, L, H, d = q.shape
    M, G = k.shape[1:3]
    with torch.cuda.device_of(q):
        q8, q_step = _quantised(q, None, QUERIES.value, scale * LOG2E.value)
        k8, k_step = _quantised(k, k.mean(1, dtype=torch.float32), KEYS.value, 1.0)
        out = q.new_empty(q.shape)
        _tuned_attention[lambda meta: (triton.cdiv(L, meta["BLOCK_M"]), H, B)](
            q8, k8, v, q_step, k_step, out, *v.stride()[:3], L, M, GROUP=H // G, D=d
        )
    return out


@torch.library.register_fake(attention_int8_op)
def _(q, k, v, scale):
    return q.new_empty(q.shape)


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
    tensors = {"q": q, "k": k, "v": v}
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors.values()):
        raise ValueError("attention_int8 has no gradient. Call it under torch.no_grad(), or take attention.")
    dtypes, otherwise = (torch.bfloat16, torch.float16), "attention or attention_int8_naive"
    return attention_int8_op(q, k, v, check_attention(tensors, scale, dtypes, HEAD_DIMS, otherwise))


def variants(card: int) -> Iterator[Variant]:
    """Both kernels with every tile of a card, in both dtypes, for Wan's 128 channels and for 64; quantisation of keys
    (with their mean) and of queries."""
    kinds = dict.fromkeys(("p_mean", "p_step", "p_q_step", "p_k_step", "factor"), "fp32")
    kinds |= dict.fromkeys(("p_x8", "p_q8", "p_k8"), "i8")
    for element in ("bf16", "fp16"):
        for d in HEAD_DIMS:
            for tile in tiles_for(QUANTISE_TILES, card):
                for constants in ({"ROWS": KEYS.value, "D": d}, {"p_mean": None, "ROWS": QUERIES.value, "D": d}):
                    yield variant(quantise_kernel, tile, element, constants, **kinds)
            for tile in tiles_for(TILES, card):
                yield variant(attention_int8_kernel, tile, element, {"GROUP": 1, "D": d}, **kinds)
