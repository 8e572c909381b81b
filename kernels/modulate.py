"""LayerNorm with a scale and a shift per sequence.

    y       = (x - mean(x)) / sqrt(var(x) + eps) * weight + shift     mean and var over the channels of a token
    dx      = rstd * (g - mean(g) - n * mean(g * n))                  g = dy * weight, n = (x - mean) * rstd
    dweight = sum over tokens of dy * n,  dshift = sum over tokens of dy

Shapes: x (B, L, D) in bf16, fp16 or fp32, batch and tokens with any stride; weight, shift (B, D) or (1, D) in fp32.
Computes in fp32 and rounds once. The backward keeps x and 8 bytes a token. Sums over tokens add up partial sums, one
row of D floats per 64 tokens: there are no atomics, so the same tile gives the same bits. Nothing else is allocated.

Source: adaLN-Zero of DiT (Peebles and Xie, arXiv 2212.09748), as in ``WanTransformerBlock.forward`` of diffusers 0.42:
norm1, norm2 (an affine LayerNorm: one row for all sequences) and norm3. Backward of LayerNorm: Ba et al., arXiv
1607.06450.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lowmem_drf.kernels.checks import (
    aligned,
    check_rows,
    require_card,
    row_stride,
    sum_rows,
    tokens_of_a_program,
)
from lowmem_drf.kernels.operators import operator
from lowmem_drf.kernels.tiles import CARDS, Tile, Variant, tiles_for, tuned, variant

TILES = (
    Tile({"BLOCK": 4096, "STAGES": 1}, 8, 1, CARDS,
         "2 tokens of Wan-1.3B a step share one read of scale and shift; 64 registers, so 4 blocks on a processor"),
    Tile({"BLOCK": 2048, "STAGES": 1}, 4, 1, CARDS, "1 token of Wan-1.3B a step: small blocks, sums over 4 warps only"),
    Tile({"BLOCK": 4096, "STAGES": 2}, 8, 1, CARDS,
         "loads the next tokens while it sums these, for wide rows, of which few blocks fit on a processor"),
    Tile({"BLOCK": 8192, "STAGES": 2}, 16, 1, CARDS,
         "the same, 16 values a thread for a row of Wan-14B (5120, padded to 8192)"),
)  # fmt: skip
"""``BLOCK``: values at a time. Registers hold whole rows, padded to a power of two, so that x is read once. ``STAGES``:
of the loop over tokens."""


def norm_modulate_naive(x_BLD: Tensor, weight_BD: Tensor, shift_BD: Tensor, eps: float) -> Tensor:
    """The formula in plain PyTorch, with fp32 copies of the sequence (fp64 stays fp64). Differentiable in all
    tensors."""
    wide = x_BLD.to(torch.promote_types(x_BLD.dtype, torch.float32))
    return (F.layer_norm(wide, wide.shape[-1:], eps=eps) * weight_BD[:, None] + shift_BD[:, None]).to(x_BLD.dtype)


@tuned(TILES, key=["WIDTH"])
@triton.jit
def norm_modulate_forward_kernel(
    p_x, p_weight, p_shift, p_y, p_mean, p_rstd, length, tokens, stride_xb, stride_xl, stride_weight, stride_shift, eps,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = BLOCK // BLOCK_D if BLOCK > BLOCK_D else 1
    chunks = tl.cdiv(length, tokens)
    i_b = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * tokens
    o_d = tl.arange(0, BLOCK_D)[None, :]
    m_d = o_d < WIDTH
    b_weight = tl.load(p_weight + i_b * stride_weight + o_d, mask=m_d, other=0.0)  # [1, BLOCK_D]
    b_shift = tl.load(p_shift + i_b * stride_shift + o_d, mask=m_d, other=0.0)
    for start in tl.range(first, tl.minimum(first + tokens, length), ROWS, num_stages=STAGES):
        o_l = start + tl.arange(0, ROWS)
        m_l = o_l < length
        m_x = m_l[:, None] & m_d
        p_row = p_x + i_b * stride_xb + o_l[:, None].to(tl.int64) * stride_xl + o_d
        b_x = tl.load(p_row, mask=m_x, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
        b_mean = tl.sum(b_x, axis=1) / WIDTH  # [ROWS]
        b_x = tl.where(m_d, b_x - b_mean[:, None], 0.0)
        b_rstd = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / WIDTH + eps)
        o_row = i_b * length + o_l
        b_y = b_x * b_rstd[:, None] * b_weight + b_shift
        tl.store(p_y + o_row[:, None] * WIDTH + o_d, b_y.to(p_y.dtype.element_ty), mask=m_x)
        tl.store(p_mean + o_row, b_mean, mask=m_l)
        tl.store(p_rstd + o_row, b_rstd, mask=m_l)


@tuned(TILES, key=["WIDTH", "WANT_WEIGHT"])
@triton.jit
def norm_modulate_backward_kernel(
    p_d, p_x, p_weight, p_mean, p_rstd, p_dx, p_dweight, p_dshift, length, tokens,
    stride_db, stride_dl, stride_xb, stride_xl, stride_weight, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    WANT_X: tl.constexpr, WANT_WEIGHT: tl.constexpr, WANT_SHIFT: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = BLOCK // BLOCK_D if BLOCK > BLOCK_D else 1
    chunks = tl.cdiv(length, tokens)
    i_b = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * tokens
    o_d = tl.arange(0, BLOCK_D)[None, :]
    m_d = o_d < WIDTH
    b_weight = tl.load(p_weight + i_b * stride_weight + o_d, mask=m_d, other=0.0)  # [1, BLOCK_D]
    b_dweight = tl.zeros([1, BLOCK_D], tl.float32)
    b_dshift = tl.zeros([1, BLOCK_D], tl.float32)
    for start in tl.range(first, tl.minimum(first + tokens, length), ROWS, num_stages=STAGES):
        o_l = start + tl.arange(0, ROWS)
        m_l = o_l < length
        m_x = m_l[:, None] & m_d
        o_64 = o_l[:, None].to(tl.int64)
        # [ROWS, BLOCK_D]
        b_d = tl.load(p_d + i_b * stride_db + o_64 * stride_dl + o_d, mask=m_x, other=0.0).to(tl.float32)
        if WANT_SHIFT:
            b_dshift += tl.sum(b_d, axis=0, keep_dims=True)
        if WANT_X or WANT_WEIGHT:
            o_row = i_b * length + o_l
            b_x = tl.load(p_x + i_b * stride_xb + o_64 * stride_xl + o_d, mask=m_x, other=0.0).to(tl.float32)
            b_mean = tl.load(p_mean + o_row, mask=m_l, other=0.0)  # [ROWS]
            b_rstd = tl.load(p_rstd + o_row, mask=m_l, other=0.0)[:, None]
            b_n = (b_x - b_mean[:, None]) * b_rstd  # not 0 where padded, but b_d is
            b_dn = b_d * b_n
            if WANT_WEIGHT:
                b_dweight += tl.sum(b_dn, axis=0, keep_dims=True)
            if WANT_X:
                b_mean_g = tl.sum(b_d * b_weight, axis=1)[:, None] / WIDTH
                b_mean_gn = tl.sum(b_dn * b_weight, axis=1)[:, None] / WIDTH
                b_dx = (b_d * b_weight - b_mean_g - b_n * b_mean_gn) * b_rstd
                tl.store(p_dx + o_row[:, None] * WIDTH + o_d, b_dx.to(p_dx.dtype.element_ty), mask=m_x)
    if WANT_WEIGHT:
        tl.store(p_dweight + tl.program_id(0).to(tl.int64) * WIDTH + o_d, b_dweight, mask=m_d)
    if WANT_SHIFT:
        tl.store(p_dshift + tl.program_id(0).to(tl.int64) * WIDTH + o_d, b_dshift, mask=m_d)


@operator("norm_modulate_forward")
def norm_modulate_forward(
    x_BLD: Tensor, weight_BD: Tensor, shift_BD: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the mean and reciprocal standard deviation of each token, (B, L) fp32."""
    require_card("norm_modulate", x_BLD)
    batch, length, width = x_BLD.shape
    x, weight, shift = aligned(x_BLD), aligned(weight_BD), aligned(shift_BD)
    y = torch.empty((batch, length, width), dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty((batch, length), dtype=torch.float32, device=x.device) for _ in range(2))
    block_d = triton.next_power_of_2(width)
    tokens = _tokens(block_d, sums=False)
    with torch.cuda.device_of(x):
        norm_modulate_forward_kernel[(batch * triton.cdiv(length, tokens),)](
            x, weight, shift, y, mean, rstd, length, tokens,
            *x.stride()[:2], row_stride(weight), row_stride(shift), eps, WIDTH=width, BLOCK_D=block_d,
        )  # fmt: skip
    return y, mean, rstd


@torch.library.register_fake(norm_modulate_forward)
def _(x_BLD: Tensor, weight_BD: Tensor, shift_BD: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    statistics = [x_BLD.new_empty(x_BLD.shape[:2], dtype=torch.float32) for _ in range(2)]
    return x_BLD.new_empty(x_BLD.shape), statistics[0], statistics[1]


@operator("norm_modulate_backward")
def norm_modulate_backward(
    d_BLD: Tensor, x_BLD: Tensor, weight_BD: Tensor, mean_BL: Tensor, rstd_BL: Tensor,
    want_x: bool, want_weight: bool, want_shift: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dweight, dshift; unwanted gradients are empty tensors. For each of the last two also allocates L / 64 rows of
    D floats."""
    require_card("norm_modulate", d_BLD)
    batch, length, width = x_BLD.shape
    d, x, weight = aligned(d_BLD), aligned(x_BLD), aligned(weight_BD)
    block_d = triton.next_power_of_2(width)
    tokens = _tokens(block_d, sums=want_weight or want_shift)
    programs = batch * triton.cdiv(length, tokens)
    dx = torch.empty((batch, length, width) if want_x else 0, dtype=x.dtype, device=x.device)
    dweight, dshift = (
        torch.empty((programs, width) if want else 0, dtype=torch.float32, device=x.device)
        for want in (want_weight, want_shift)
    )
    with torch.cuda.device_of(x):
        norm_modulate_backward_kernel[(programs,)](
            d, x, weight, mean_BL, rstd_BL, dx, dweight, dshift, length, tokens,
            *d.stride()[:2], *x.stride()[:2], row_stride(weight),
            WIDTH=width, BLOCK_D=block_d, WANT_X=want_x, WANT_WEIGHT=want_weight, WANT_SHIFT=want_shift,
        )  # fmt: skip
    if want_weight:
        dweight = sum_rows(dweight, weight_BD.shape)
    if want_shift:
        dshift = sum_rows(dshift, weight_BD.shape)
    return dx, dweight, dshift


@torch.library.register_fake(norm_modulate_backward)
def _(
    d_BLD: Tensor, x_BLD: Tensor, weight_BD: Tensor, mean_BL: Tensor, rstd_BL: Tensor,
    want_x: bool, want_weight: bool, want_shift: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = [weight_BD.new_empty(weight_BD.shape if want else 0) for want in (want_weight, want_shift)]
    return x_BLD.new_empty(x_BLD.shape if want_x else 0), rows[0], rows[1]


def _tokens(block_d: int, sums: bool) -> int:
    return tokens_of_a_program(block_d, sums, max(tile.sizes["BLOCK"] for tile in TILES))


class _NormModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BLD: Tensor, weight_BD: Tensor, shift_BD: Tensor, eps: float) -> Tensor:
        y, mean, rstd = norm_modulate_forward(x_BLD, weight_BD, shift_BD, eps)
        ctx.save_for_backward(x_BLD, weight_BD, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_BLD: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:3]
        made = norm_modulate_backward(d_BLD, *ctx.saved_tensors, *wanted)
        return *(gradient if want else None for gradient, want in zip(made, wanted, strict=True)), None


def norm_modulate(x_BLD: Tensor, weight_BD: Tensor, shift_BD: Tensor, eps: float) -> Tensor:
    """LayerNorm without parameters, times ``weight`` plus ``shift``.

    Args:
        x_BLD: `(B, L, D)` in bf16, fp16 or fp32; a slice of a longer sequence is not copied.
        weight_BD: `(B, D)` or `(1, D)` in fp32: 1 + scale of an adaLN, or the weight of an affine LayerNorm.
        shift_BD: of the same shape, fp32.
        eps: added to the variance.

    Returns:
        `(B, L, D)` in the dtype of ``x``. Gradients for x, weight and shift.

    Raises:
        TypeError: another dtype. fp64 is for ``norm_modulate_naive``.
        ValueError: shapes or devices that do not fit.
    """
    check_rows("norm_modulate", {"x": x_BLD}, {"weight": weight_BD, "shift": shift_BD})
    return _NormModulate.apply(x_BLD, weight_BD, shift_BD, eps)


def variants(card: int) -> Iterator[Variant]:
    """Wan's least and largest width, with the gradient of x alone; the largest with all gradients; the other dtypes
    with all. What lies between takes fewer registers."""
    names = ("p_weight", "p_shift", "p_mean", "p_rstd", "p_dweight", "p_dshift", "eps")
    fp32 = dict.fromkeys(names, "fp32")
    bf16 = (("bf16", 1536, False), ("bf16", 5120, False), ("bf16", 5120, True))
    for tile in tiles_for(TILES, card):
        for element, width, sums in (*bf16, ("fp16", 1536, True), ("fp32", 1536, True)):
            padded = {"WIDTH": width, "BLOCK_D": triton.next_power_of_2(width)}
            if not sums:
                yield variant(norm_modulate_forward_kernel.fn, tile, element, padded, **fp32)
            switches = {"WANT_X": True, "WANT_WEIGHT": sums, "WANT_SHIFT": sums}
            yield variant(norm_modulate_backward_kernel.fn, tile, element, padded | switches, **fp32)
