"""The memory-bound rest of adaLN: LayerNorm with a scale and a shift per sequence, and a gated residual.

    norm_modulate:  y   = (x - mean(x)) / sqrt(var(x) + eps) * weight + shift    mean and var over a token's channels
                    dx  = rstd * (g - mean(g) - n * mean(g * n))                 g = dy * weight, n = (x - mean) * rstd
                    dweight = sum over tokens of dy * n,  dshift = sum over tokens of dy
    gate_residual:  out = x + y * gate,  dx = dout,  dy = dout * gate,  dgate = sum over tokens of dout * y

Shapes: x, y (B, L, D) in bf16, fp16 or fp32, any strides of batch and tokens; weight, shift, gate (B, D) or (1, D) in
fp32. Arithmetic is in fp32, rounded once. Saved for the backward: ``norm_modulate`` x and 8 bytes a token,
``gate_residual`` the gate, and y if the gate needs a gradient. Sums over tokens are made of partial sums, one row of D
floats per 64 tokens, which is the only extra memory: without atomics the same tile gives the same bits.

Source: adaLN-Zero of DiT (Peebles and Xie, arXiv 2212.09748) as in ``WanTransformerBlock.forward`` of diffusers 0.42:
norm1, norm2 (an affine LayerNorm: one row), norm3 and the two gates. Backward of LayerNorm: Ba et al., arXiv
1607.06450. The residual and the next norm cannot share a pass: the cross-attention, or the block's end, is between
them.
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

from lowmem_drf.kernels.tiles import CARDS, INTERPRETED, Tile, Variant, tiles_for, tuned

NORM_TILES = (
    Tile(
        {"BLOCK": 4096, "STAGES": 1},
        8,
        1,
        CARDS,
        "2 tokens of Wan-1.3B a step, for which scale and shift are read once; 64 registers, so 4 blocks on a processor",
    ),
    Tile({"BLOCK": 2048, "STAGES": 1}, 4, 1, CARDS, "1 token of Wan-1.3B a step: small blocks, sums over 4 warps only"),
    Tile(
        {"BLOCK": 4096, "STAGES": 2},
        8,
        1,
        CARDS,
        "the next tokens are on their way while these are summed: where a row is wide, few blocks fit beside each other",
    ),
    Tile(
        {"BLOCK": 8192, "STAGES": 2},
        16,
        1,
        CARDS,
        "the same, 16 values a thread for a row of Wan-14B (5120, padded to 8192)",
    ),
)
"""``BLOCK``: values of a row held in registers at once, padded to a power of two, so that x is read once. ``STAGES``:
of the loop over tokens."""

GATE_TILES = (
    Tile(
        {"BLOCK_L": 8, "BLOCK_D": 512},
        4,
        1,
        CARDS,
        "512 divides the widths of all Wan models; one gate for 8 tokens; 4 loads of 16 bytes a thread and tensor",
    ),
    Tile({"BLOCK_L": 4, "BLOCK_D": 512}, 4, 1, CARDS, "half of it in flight per block, twice the blocks"),
    Tile(
        {"BLOCK_L": 16, "BLOCK_D": 256},
        4,
        1,
        CARDS,
        "the gate for 16 tokens; lines of 512 bytes are still whole sectors",
    ),
)

TOKENS = 4
"""Tokens per block without sums: enough to reuse scale and shift, few enough to fill a card with 4,000 tokens."""
GATE_TOKENS = 16
TOKENS_OF_A_SUM = 64
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def norm_modulate_naive(x_BLD: Tensor, weight_BD: Tensor, shift_BD: Tensor, eps: float) -> Tensor:
    """The formula in plain PyTorch, with fp32 copies of the sequence (fp64 stays fp64). Differentiable in all
    tensors."""
    wide = x_BLD.to(torch.promote_types(x_BLD.dtype, torch.float32))
    return (F.layer_norm(wide, wide.shape[-1:], eps=eps) * weight_BD[:, None] + shift_BD[:, None]).to(x_BLD.dtype)


def gate_residual_naive(x_BLD: Tensor, y_BLD: Tensor, gate_BD: Tensor) -> Tensor:
    """The formula in plain PyTorch, with fp32 copies of the sequence (fp64 stays fp64). Differentiable in all
    tensors."""
    wide = torch.promote_types(x_BLD.dtype, torch.float32)
    return (x_BLD.to(wide) + y_BLD.to(wide) * gate_BD[:, None]).to(x_BLD.dtype)


@tuned(NORM_TILES, key=["WIDTH"])
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
        # [ROWS, BLOCK_D]
        b_x = tl.load(p_x + i_b * stride_xb + o_l[:, None].to(tl.int64) * stride_xl + o_d, mask=m_x, other=0.0).to(
            tl.float32
        )
        b_mean = tl.sum(b_x, axis=1) / WIDTH  # [ROWS]
        b_x = tl.where(m_d, b_x - b_mean[:, None], 0.0)
        b_rstd = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / WIDTH + eps)
        o_row = i_b * length + o_l
        tl.store(
            p_y + o_row[:, None] * WIDTH + o_d,
            (b_x * b_rstd[:, None] * b_weight + b_shift).to(p_y.dtype.element_ty),
            mask=m_x,
        )
        tl.store(p_mean + o_row, b_mean, mask=m_l)
        tl.store(p_rstd + o_row, b_rstd, mask=m_l)


@tuned(GATE_TILES, key=["WIDTH"])
@triton.jit
def gate_residual_forward_kernel(
    p_x, p_y, p_gate, p_out, length, stride_xb, stride_xl, stride_yb, stride_yl, stride_gate,
    WIDTH: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    columns: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    i_t = tl.program_id(0) // columns
    chunks = tl.cdiv(length, BLOCK_L)
    i_b = (i_t // chunks).to(tl.int64)
    o_l = (i_t % chunks) * BLOCK_L + tl.arange(0, BLOCK_L)[:, None].to(tl.int64)
    o_d = (tl.program_id(0) % columns) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    m_x = (o_l < length) & (o_d < WIDTH)
    b_x = tl.load(p_x + i_b * stride_xb + o_l * stride_xl + o_d, mask=m_x).to(tl.float32)  # [BLOCK_L, BLOCK_D]
    b_y = tl.load(p_y + i_b * stride_yb + o_l * stride_yl + o_d, mask=m_x).to(tl.float32)
    b_gate = tl.load(p_gate + i_b * stride_gate + o_d, mask=o_d < WIDTH)  # [1, BLOCK_D]
    tl.store(p_out + (i_b * length + o_l) * WIDTH + o_d, (b_x + b_y * b_gate).to(p_out.dtype.element_ty), mask=m_x)


@tuned(NORM_TILES, key=["WIDTH", "WANT_WEIGHT"])
@triton.jit
def norm_modulate_backward_kernel(
    p_d, p_x, p_weight, p_mean, p_rstd, p_dx, p_dweight, p_dshift, length, tokens, stride_db, stride_dl, stride_xb, stride_xl, stride_weight,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, WANT_X: tl.constexpr, WANT_WEIGHT: tl.constexpr, WANT_SHIFT: tl.constexpr,
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
        # [ROWS, BLOCK_D]
        b_d = tl.load(p_d + i_b * stride_db + o_l[:, None].to(tl.int64) * stride_dl + o_d, mask=m_x, other=0.0).to(
            tl.float32
        )
        if WANT_SHIFT:
            b_dshift += tl.sum(b_d, axis=0, keep_dims=True)
        if WANT_X or WANT_WEIGHT:
            o_row = i_b * length + o_l
            b_x = tl.load(p_x + i_b * stride_xb + o_l[:, None].to(tl.int64) * stride_xl + o_d, mask=m_x, other=0.0).to(
                tl.float32
            )
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


@tuned(GATE_TILES, key=["WIDTH", "WANT_GATE"])
@triton.jit
def gate_residual_backward_kernel(
    p_d, p_y, p_gate, p_dy, p_dgate, length, tokens, stride_db, stride_dl, stride_yb, stride_yl, stride_gate,
    WIDTH: tl.constexpr, WANT_Y: tl.constexpr, WANT_GATE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    columns: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    i_t = tl.program_id(0) // columns
    chunks = tl.cdiv(length, tokens)
    i_b = (i_t // chunks).to(tl.int64)
    first = (i_t % chunks) * tokens
    o_d = (tl.program_id(0) % columns) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    m_d = o_d < WIDTH
    b_gate = tl.load(p_gate + i_b * stride_gate + o_d, mask=m_d)  # [1, BLOCK_D]
    b_dgate = tl.zeros([1, BLOCK_D], tl.float32)
    for start in range(first, tl.minimum(first + tokens, length), BLOCK_L):
        o_l = start + tl.arange(0, BLOCK_L)[:, None].to(tl.int64)
        m_x = (o_l < length) & m_d
        # [BLOCK_L, BLOCK_D]
        b_d = tl.load(p_d + i_b * stride_db + o_l * stride_dl + o_d, mask=m_x, other=0.0).to(tl.float32)
        if WANT_Y:
            tl.store(p_dy + (i_b * length + o_l) * WIDTH + o_d, (b_d * b_gate).to(p_dy.dtype.element_ty), mask=m_x)
        if WANT_GATE:
            b_y = tl.load(p_y + i_b * stride_yb + o_l * stride_yl + o_d, mask=m_x, other=0.0).to(tl.float32)
            b_dgate += tl.sum(b_d * b_y, axis=0, keep_dims=True)
    if WANT_GATE:
        tl.store(p_dgate + i_t.to(tl.int64) * WIDTH + o_d, b_dgate, mask=m_d)


@torch.library.custom_op("lowmem_drf::norm_modulate_forward", mutates_args=())
def norm_modulate_forward(
    x_BLD: Tensor, weight_BD: Tensor, shift_BD: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and each token's mean and reciprocal standard deviation, (B, L) fp32."""
    _check_launchable("norm_modulate", x_BLD)
    batch, length, width = x_BLD.shape
    x, weight, shift = _rows(x_BLD), _rows(weight_BD), _rows(shift_BD)
    y = torch.empty((batch, length, width), dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty((batch, length), dtype=torch.float32, device=x.device) for _ in range(2))
    block_d = triton.next_power_of_2(width)
    tokens = _tokens(block_d, sums=False)
    with torch.cuda.device_of(x):
        norm_modulate_forward_kernel[(batch * triton.cdiv(length, tokens),)](
            x,
            weight,
            shift,
            y,
            mean,
            rstd,
            length,
            tokens,
            *x.stride()[:2],
            _row_stride(weight),
            _row_stride(shift),
            eps,
            WIDTH=width,
            BLOCK_D=block_d,
        )
    return y, mean, rstd


@norm_modulate_forward.register_fake
def _(x_BLD: Tensor, weight_BD: Tensor, shift_BD: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    statistics = [x_BLD.new_empty(x_BLD.shape[:2], dtype=torch.float32) for _ in range(2)]
    return x_BLD.new_empty(x_BLD.shape), statistics[0], statistics[1]


@torch.library.custom_op("lowmem_drf::norm_modulate_backward", mutates_args=())
def norm_modulate_backward(
    d_BLD: Tensor,
    x_BLD: Tensor,
    weight_BD: Tensor,
    mean_BL: Tensor,
    rstd_BL: Tensor,
    want_x: bool,
    want_weight: bool,
    want_shift: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, dshift; unwanted ones are empty. The last two allocate L / 64 rows of D floats each."""
    _check_launchable("norm_modulate", d_BLD)
    batch, length, width = x_BLD.shape
    d, x, weight = _rows(d_BLD), _rows(x_BLD), _rows(weight_BD)
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
            d, x, weight, mean_BL, rstd_BL, dx, dweight, dshift, length, tokens, *d.stride()[:2], *x.stride()[:2], _row_stride(weight),
            WIDTH=width, BLOCK_D=block_d, WANT_X=want_x, WANT_WEIGHT=want_weight, WANT_SHIFT=want_shift,
        )  # fmt: skip
    if want_weight:
        dweight = _sum(dweight, weight_BD.shape)
    if want_shift:
        dshift = _sum(dshift, weight_BD.shape)
    return dx, dweight, dshift


@norm_modulate_backward.register_fake
def _(
    d_BLD: Tensor,
    x_BLD: Tensor,
    weight_BD: Tensor,
    mean_BL: Tensor,
    rstd_BL: Tensor,
    want_x: bool,
    want_weight: bool,
    want_shift: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = [weight_BD.new_empty(weight_BD.shape if want else 0) for want in (want_weight, want_shift)]
    return x_BLD.new_empty(x_BLD.shape if want_x else 0), rows[0], rows[1]


@torch.library.custom_op("lowmem_drf::gate_residual_forward", mutates_args=())
def gate_residual_forward(x_BLD: Tensor, y_BLD: Tensor, gate_BD: Tensor) -> Tensor:
    """x + y * gate."""
    _check_launchable("gate_residual", x_BLD)
    batch, length, width = x_BLD.shape
    x, y, gate = _rows(x_BLD), _rows(y_BLD), _rows(gate_BD)
    out = torch.empty((batch, length, width), dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        gate_residual_forward_kernel[
            lambda tile: (batch * triton.cdiv(length, tile["BLOCK_L"]) * triton.cdiv(width, tile["BLOCK_D"]),)
        ](x, y, gate, out, length, *x.stride()[:2], *y.stride()[:2], _row_stride(gate), WIDTH=width)
    return out


@gate_residual_forward.register_fake
def _(x_BLD: Tensor, y_BLD: Tensor, gate_BD: Tensor) -> Tensor:
    return x_BLD.new_empty(x_BLD.shape)


@torch.library.custom_op("lowmem_drf::gate_residual_backward", mutates_args=())
def gate_residual_backward(d_BLD: Tensor, y_BLD: Tensor | None, gate_BD: Tensor, want_y: bool) -> tuple[Tensor, Tensor]:
    """dy and, if y is given, dgate; unwanted ones are empty. dgate allocates L / 64 rows of D floats."""
    _check_launchable("gate_residual", d_BLD)
    batch, length, width = d_BLD.shape
    d, gate = _rows(d_BLD), _rows(gate_BD)
    y = d if y_BLD is None else _rows(y_BLD)
    want_gate = y_BLD is not None
    tokens = TOKENS_OF_A_SUM if want_gate else GATE_TOKENS
    chunks = batch * triton.cdiv(length, tokens)
    dy = torch.empty((batch, length, width) if want_y else 0, dtype=d.dtype, device=d.device)
    dgate = torch.empty((chunks, width) if want_gate else 0, dtype=torch.float32, device=d.device)
    with torch.cuda.device_of(d):
        gate_residual_backward_kernel[lambda tile: (chunks * triton.cdiv(width, tile["BLOCK_D"]),)](
            d,
            y,
            gate,
            dy,
            dgate,
            length,
            tokens,
            *d.stride()[:2],
            *y.stride()[:2],
            _row_stride(gate),
            WIDTH=width,
            WANT_Y=want_y,
            WANT_GATE=want_gate,
        )
    return dy, _sum(dgate, gate_BD.shape) if want_gate else dgate


@gate_residual_backward.register_fake
def _(d_BLD: Tensor, y_BLD: Tensor | None, gate_BD: Tensor, want_y: bool) -> tuple[Tensor, Tensor]:
    return d_BLD.new_empty(d_BLD.shape if want_y else 0), gate_BD.new_empty(0 if y_BLD is None else gate_BD.shape)


def _rows(tensor: Tensor) -> Tensor:
    """Contiguous channels, as the kernels need; the strides of batch and tokens are free."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _row_stride(rows_BD: Tensor) -> int:
    return rows_BD.stride(0) if len(rows_BD) > 1 else 0


def _tokens(block_d: int, sums: bool) -> int:
    """Tokens per block: a power of two, at least the number that any tile takes at a time."""
    return max(TOKENS_OF_A_SUM if sums else TOKENS, max(tile.sizes["BLOCK"] for tile in NORM_TILES) // block_d)


def _sum(partial_PD: Tensor, shape: torch.Size) -> Tensor:
    """Sums partial sums by batch element, or all of them for a shared row: (B, D) or (1, D)."""
    return partial_PD.view(shape[0], -1, shape[1]).sum(1)


def _check_launchable(op: str, tensor: Tensor) -> None:
    if tensor.device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"{op}: tensors on {tensor.device}; Triton needs a CUDA card. Take {op}_naive, or set TRITON_INTERPRET=1 before Triton is imported"
        )


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


class _GateResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BLD: Tensor, y_BLD: Tensor, gate_BD: Tensor) -> Tensor:
        ctx.save_for_backward(y_BLD if ctx.needs_input_grad[2] else None, gate_BD)
        return gate_residual_forward(x_BLD, y_BLD, gate_BD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_BLD: Tensor) -> tuple[Tensor | None, ...]:
        want_x, want_y, want_gate = ctx.needs_input_grad
        y, gate = ctx.saved_tensors
        dy, dgate = gate_residual_backward(d_BLD, y, gate, want_y) if want_y or want_gate else (None, None)
        return d_BLD if want_x else None, dy if want_y else None, dgate if want_gate else None


def norm_modulate(x_BLD: Tensor, weight_BD: Tensor, shift_BD: Tensor, eps: float) -> Tensor:
    """LayerNorm without parameters, times ``weight`` plus ``shift``. Differentiable in all three.

    Args:
        x_BLD: (B, L, D) in bf16, fp16 or fp32; a slice of a longer sequence is not copied.
        weight_BD: (B, D) or (1, D) in fp32: 1 + scale of an adaLN, or the weight of an affine LayerNorm.
        shift_BD: the same shape, fp32.
        eps: added to the variance.

    Returns:
        (B, L, D) in the dtype of ``x``.

    Raises:
        TypeError: another dtype. ``norm_modulate_naive`` takes fp64.
        ValueError: shapes or devices that do not fit.
    """
    _check("norm_modulate", {"x": x_BLD}, {"weight": weight_BD, "shift": shift_BD})
    return _NormModulate.apply(x_BLD, weight_BD, shift_BD, eps)


def gate_residual(x_BLD: Tensor, y_BLD: Tensor, gate_BD: Tensor) -> Tensor:
    """``x + y * gate``, differentiable in all three.

    Args:
        x_BLD: (B, L, D) in bf16, fp16 or fp32; a slice of a longer sequence is not copied.
        y_BLD: the same shape and dtype.
        gate_BD: (B, D) or (1, D) in fp32.

    Returns:
        (B, L, D) in the dtype of ``x``.

    Raises:
        TypeError: another dtype. ``gate_residual_naive`` takes fp64.
        ValueError: shapes or devices that do not fit.
    """
    _check("gate_residual", {"x": x_BLD, "y": y_BLD}, {"gate": gate_BD})
    return _GateResidual.apply(x_BLD, y_BLD, gate_BD)


def _check(op: str, sequences: dict[str, Tensor], rows: dict[str, Tensor]) -> None:
    x = sequences["x"]
    if x.dtype not in DTYPES:
        raise TypeError(
            f"{op}: x is {x.dtype}; the kernel takes bfloat16, float16 and float32. For others there is {op}_naive"
        )
    for name, tensor in (sequences | rows).items():
        if tensor.dtype != (wanted := x.dtype if name in sequences else torch.float32):
            raise TypeError(f"{op}: {name} is {tensor.dtype}; it must be {wanted}")
        if tensor.device != x.device or x.device.type == "meta":
            raise ValueError(
                f"{op}: {name} is on {tensor.device} and x on {x.device}; all must be on one device that holds values"
            )
    if x.dim() != 3:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; it must be (B, L, D)")
    for name, tensor in sequences.items():
        if tensor.shape != x.shape:
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; it must be that of x, {tuple(x.shape)}")
    for name, tensor in rows.items():
        if tensor.dim() != 2 or tensor.shape[0] not in (1, x.shape[0]) or tensor.shape[1] != x.shape[2]:
            raise ValueError(
                f"{op}: {name} has shape {tuple(tensor.shape)}; for x {tuple(x.shape)} it must be (B, D) or (1, D)"
            )
    if len({tensor.shape for tensor in rows.values()}) > 1:
        raise ValueError(
            f"{op}: {' and '.join(rows)} have shapes {[tuple(tensor.shape) for tensor in rows.values()]}; they must agree"
        )


def variants(card: int) -> Iterator[Variant]:
    """What a card may launch: of Wan's widths the smallest and the largest, with gradients of x and y, and with all;
    other dtypes only in the most demanding case, with all gradients. Everything between takes fewer registers."""
    for tile in tiles_for(NORM_TILES, card):
        for element, width, sums in (
            ("bf16", 1536, False),
            ("bf16", 5120, False),
            ("bf16", 5120, True),
            ("fp16", 1536, True),
            ("fp32", 1536, True),
        ):
            padded = {"WIDTH": width, "BLOCK_D": triton.next_power_of_2(width)}
            if not sums:
                yield _variant(norm_modulate_forward_kernel.fn, tile, element, padded)
            yield _variant(
                norm_modulate_backward_kernel.fn,
                tile,
                element,
                padded | {"WANT_X": True, "WANT_WEIGHT": sums, "WANT_SHIFT": sums},
            )
    for tile in tiles_for(GATE_TILES, card):
        for element, sums in (("bf16", False), ("bf16", True), ("fp16", True), ("fp32", True)):
            if not sums:
                yield _variant(gate_residual_forward_kernel.fn, tile, element, {"WIDTH": 5120})
            yield _variant(
                gate_residual_backward_kernel.fn, tile, element, {"WIDTH": 5120, "WANT_Y": True, "WANT_GATE": sums}
            )


def _variant(kernel: Any, tile: Tile, element: str, constants: dict[str, Any]) -> Variant:
    wide = ("p_weight", "p_shift", "p_gate", "p_mean", "p_rstd", "p_dweight", "p_dshift", "p_dgate", "eps")
    kinds = {
        name: "fp32" if name in wide else element if name.startswith("p_") else "i32"
        for name in kernel.arg_names
        if not name.isupper()
    }
    return Variant(
        kernel, tile, {name: f"*{kind}" if name.startswith("p_") else kind for name, kind in kinds.items()}, constants
    )
