"""A residual whose branch has a gate per sequence: ``x + y * gate``.

    dx = dout,  dy = dout * gate,  dgate = sum over tokens of dout * y

Shapes: x, y (B, L, D) in bf16, fp16 or fp32, batch and tokens with any stride; gate (B, D) or (1, D) in fp32. Computes
in fp32 and rounds once. The backward keeps the gate, and y only if the gate needs a gradient. The sum over tokens adds
up partial sums, one row of D floats per 64 tokens: there are no atomics, so the same tile gives the same bits. Nothing
else is allocated.

Source: the two gates of adaLN-Zero in DiT (Peebles and Xie, arXiv 2212.09748), as in ``WanTransformerBlock.forward`` of
diffusers 0.42. Not done: the residual and the next norm in one pass, because the attention to the text, or the end of
the block, lies between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowmem_drf.kernels.checks import TOKENS_OF_A_SUM, aligned, check_rows, require_card, row_stride, sum_rows
from lowmem_drf.kernels.operators import operator
from lowmem_drf.kernels.tiles import CARDS, Tile, Variant, tiles_for, tuned, variant

TILES = (
    Tile({"BLOCK_L": 8, "BLOCK_D": 512}, 4, 1, CARDS,
         "512 divides the widths of all Wan models; one gate for 8 tokens; 4 loads of 16 bytes a thread and tensor"),
    Tile({"BLOCK_L": 4, "BLOCK_D": 512}, 4, 1, CARDS, "half of it in flight per block, twice the blocks"),
    Tile({"BLOCK_L": 16, "BLOCK_D": 256}, 4, 1, CARDS,
         "the gate for 16 tokens; lines of 512 bytes are still whole sectors"),
)  # fmt: skip

TOKENS = 16
"""Of a program of the backward without a sum over tokens."""


def gate_residual_naive(x_BLD: Tensor, y_BLD: Tensor, gate_BD: Tensor) -> Tensor:
    """The formula in plain PyTorch, with fp32 copies of the sequence (fp64 stays fp64). Differentiable in all
    tensors."""
    wide = torch.promote_types(x_BLD.dtype, torch.float32)
    return (x_BLD.to(wide) + y_BLD.to(wide) * gate_BD[:, None]).to(x_BLD.dtype)


@tuned(TILES, key=["WIDTH"])
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


@tuned(TILES, key=["WIDTH", "WANT_GATE"])
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


@operator("gate_residual_forward")
def gate_residual_forward(x_BLD: Tensor, y_BLD: Tensor, gate_BD: Tensor) -> Tensor:
    """x + y * gate."""
    require_card("gate_residual", x_BLD)
    batch, length, width = x_BLD.shape
    x, y, gate = aligned(x_BLD), aligned(y_BLD), aligned(gate_BD)
    out = torch.empty((batch, length, width), dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        gate_residual_forward_kernel[
            lambda tile: (batch * triton.cdiv(length, tile["BLOCK_L"]) * triton.cdiv(width, tile["BLOCK_D"]),)
        ](x, y, gate, out, length, *x.stride()[:2], *y.stride()[:2], row_stride(gate), WIDTH=width)
    return out


@torch.library.register_fake(gate_residual_forward)
def _(x_BLD: Tensor, y_BLD: Tensor, gate_BD: Tensor) -> Tensor:
    return x_BLD.new_empty(x_BLD.shape)


@operator("gate_residual_backward")
def gate_residual_backward(d_BLD: Tensor, y_BLD: Tensor | None, gate_BD: Tensor, want_y: bool) -> tuple[Tensor, Tensor]:
    """dy and, if y is given, dgate; unwanted gradients are empty tensors. For dgate also allocates L / 64 rows of D
    floats."""
    require_card("gate_residual", d_BLD)
    batch, length, width = d_BLD.shape
    d, gate = aligned(d_BLD), aligned(gate_BD)
    y = d if y_BLD is None else aligned(y_BLD)
    want_gate = y_BLD is not None
    tokens = TOKENS_OF_A_SUM if want_gate else TOKENS
    chunks = batch * triton.cdiv(length, tokens)
    dy = torch.empty((batch, length, width) if want_y else 0, dtype=d.dtype, device=d.device)
    dgate = torch.empty((chunks, width) if want_gate else 0, dtype=torch.float32, device=d.device)
    with torch.cuda.device_of(d):
        gate_residual_backward_kernel[lambda tile: (chunks * triton.cdiv(width, tile["BLOCK_D"]),)](
            d, y, gate, dy, dgate, length, tokens, *d.stride()[:2], *y.stride()[:2], row_stride(gate),
            WIDTH=width, WANT_Y=want_y, WANT_GATE=want_gate,
        )  # fmt: skip
    return dy, sum_rows(dgate, gate_BD.shape) if want_gate else dgate


@torch.library.register_fake(gate_residual_backward)
def _(d_BLD: Tensor, y_BLD: Tensor | None, gate_BD: Tensor, want_y: bool) -> tuple[Tensor, Tensor]:
    return d_BLD.new_empty(d_BLD.shape if want_y else 0), gate_BD.new_empty(0 if y_BLD is None else gate_BD.shape)


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


def gate_residual(x_BLD: Tensor, y_BLD: Tensor, gate_BD: Tensor) -> Tensor:
    """``x + y * gate``.

    Args:
        x_BLD: `(B, L, D)` in bf16, fp16 or fp32; a slice of a longer sequence is not copied.
        y_BLD: the same shape and dtype.
        gate_BD: `(B, D)` or `(1, D)` in fp32.

    Returns:
        `(B, L, D)` in the dtype of ``x``. Gradients for x, y and gate.

    Raises:
        TypeError: another dtype. fp64 is for ``gate_residual_naive``.
        ValueError: shapes or devices that do not fit.
    """
    check_rows("gate_residual", {"x": x_BLD, "y": y_BLD}, {"gate": gate_BD})
    return _GateResidual.apply(x_BLD, y_BLD, gate_BD)


def variants(card: int) -> Iterator[Variant]:
    """Wan's largest width, with the gradient of y alone and with all; the other dtypes with all."""
    fp32 = {"p_gate": "fp32", "p_dgate": "fp32"}
    for tile in tiles_for(TILES, card):
        for element, sums in (("bf16", False), ("bf16", True), ("fp16", True), ("fp32", True)):
            if not sums:
                yield variant(gate_residual_forward_kernel.fn, tile, element, {"WIDTH": 5120}, **fp32)
            constants = {"WIDTH": 5120, "WANT_Y": True, "WANT_GATE": sums}
            yield variant(gate_residual_backward_kernel.fn, tile, element, constants, **fp32)
