"""A frozen linear layer in 8-bit integers (W8A8), forward and gradient at its input::

    x  = s_x x8                  s_x: of each row, for each group of 128 channels: largest |element| / 127; halves are
                                 rounded to even
    W  = s_w w8                  s_w = scale / 127, of each output channel, as ``model.quant = "int8"`` stores it
    y  = s_w sum(s_x x8 w8) + b  a group's sum is exact in int32; groups, scales and bias in fp32, rounded once
    dx = sum(s_g g8 w8)          g = dy s_w, quantised like x: dy W = (dy s_w) w8, so the scales of W, which lie along
                                 the sum here, need no second copy of W

One channel that is much larger than the others, as transformers have, takes the precision of its group alone.
``python -m bench.accuracy.int8_products`` prints what the integers cost. Tensor cores run integer products twice (A100,
Hopper) or four times (GeForce) as fast as 16-bit ones with fp32 sums.

Suffixes: N rows (tokens), K channels that are summed over, M channels of the result, G groups of K. ``stored``: w8 is
(M, K), in the forward; else (K, M).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from lowmem_drf.kernels.checks import aligned, require_card
from lowmem_drf.kernels.operators import operator
from lowmem_drf.kernels.tiles import CARDS, INTERPRETED, Tile, Variant, tiles_for, tuned, variant

LEAST = tl.constexpr(1e-30)
"""At least this is taken for the largest element of a row; one of zeros stays zero."""
ROUND = tl.constexpr(12582912.0)
"""1.5 * 2^23: added to a small fp32 number and subtracted again, it rounds to a whole number, halves to even."""
TOGETHER = tl.constexpr(8)
"""Blocks of rows that read a block of W one after another, while it is in the L2 cache."""
INTERPRETER = tl.constexpr(INTERPRETED)
GROUP = tl.constexpr(128)
"""Channels that share a scale in a row."""

QUANTISE_TILES = (
    Tile({}, 4, 1, CARDS, "1,536 channels: 16 elements a thread"),
    Tile({}, 16, 1, CARDS, "13,824 channels: 32 elements a thread"),
)  # fmt: skip
TILES = (
    Tile({"BLOCK_N": 128, "BLOCK_M": 128}, 8, 3, (80, 86, 89, 120),
         "64 sums a thread, and as many of the present group; 64 KiB. On Hopper ragged sizes would spill"),
    Tile({"BLOCK_N": 128, "BLOCK_M": 64}, 4, 3, CARDS,
         "blocks of 4 warps, two on a multiprocessor: one adds to its sums while the other one multiplies"),
)  # fmt: skip
EVEN_M = 128
"""Results whose width divides by it have no ragged block in any tile."""


def _quantise_in_pytorch(x_NK: Tensor, scale_K: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The formula in plain PyTorch, in fp32 (fp64 inputs: in fp64)."""
    wide = x_NK.to(torch.promote_types(x_NK.dtype, torch.float32))
    if scale_K is not None:
        wide = wide * (scale_K / 127)
    N, K = wide.shape
    groups = F.pad(wide, (0, -K % GROUP.value)).view(N, -1, GROUP.value)
    largest = groups.abs().amax(2)
    x8 = (groups * (127 / largest.clamp(min=LEAST.value))[..., None]).round_().nan_to_num_().to(torch.int8)
    return x8.view(N, -1)[:, :K].contiguous(), (largest / 127).t().contiguous()


def _multiply_in_pytorch(
    x8_NK: Tensor, step_GN: Tensor, w8: Tensor, scale_M: Tensor | None, bias_M: Tensor | None,
    dtype: torch.dtype, stored: bool,
) -> Tensor:  # fmt: skip
    """The formula in plain PyTorch."""
    wide = x8_NK * step_GN.t().repeat_interleave(GROUP.value, 1)[:, : x8_NK.shape[1]]
    y = wide @ (w8.t() if stored else w8).to(wide.dtype)
    y = y if scale_M is None else y * (scale_M / 127)
    return (y if bias_M is None else y + bias_M).to(dtype)


@triton.jit
def quantise_rows_kernel(p_x, p_scale, p_x8, p_step, stride_n, N, K, GROUPS: tl.constexpr):
    i_n = tl.program_id(0).to(tl.int64)
    o_g = tl.arange(0, GROUPS)
    o_k = o_g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # [G, GROUP]
    b_x = tl.load(p_x + i_n * stride_n + o_k, mask=o_k < K, other=0.0).to(tl.float32)
    if p_scale is not None:
        b_x *= tl.load(p_scale + o_k, mask=o_k < K, other=0.0) / 127
    # of positive floats the bits are in their order, with NaN above all
    largest = tl.max(tl.abs(b_x).to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)
    b_x = b_x * (127 / tl.maximum(largest, LEAST))[:, None]
    tl.store(p_x8 + i_n * K + o_k, ((b_x + ROUND) - ROUND).to(tl.int8), mask=o_k < K)
    tl.store(p_step + o_g * N + i_n, largest / 127, mask=o_g * GROUP < K)


@triton.jit
def int8_product_kernel(
    p_x8, p_step, p_w8, p_scale, p_bias, p_y, N, M, K,
    STORED: tl.constexpr, EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """EVEN: no block of M and no group of K is ragged."""
    blocks_n, blocks_m = tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M)
    i_part, i_in = tl.program_id(0) // (TOGETHER * blocks_m), tl.program_id(0) % (TOGETHER * blocks_m)
    height = tl.minimum(blocks_n - i_part * TOGETHER, TOGETHER)
    i_n, i_m = i_part * TOGETHER + i_in % height, i_in // height
    o_n, o_m, o_k = i_n * BLOCK_N + tl.arange(0, BLOCK_N), i_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, GROUP)
    # rows and channels beyond the end repeat the last one
    o_row = tl.minimum(o_n, N - 1)
    p_x8 += o_row.to(tl.int64)[:, None] * K + o_k[None, :]  # [BN, GROUP]
    o_w = (o_m if EVEN else tl.minimum(o_m, M - 1)).to(tl.int64)
    if STORED:
        p_w8 += o_w[None, :] * K + o_k[:, None]  # [GROUP, BM]
    else:
        p_w8 += o_k.to(tl.int64)[:, None] * M + o_w[None, :]
    p_step += o_row
    b_y = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(0, K, GROUP):
        if EVEN:
            b_x8, b_w8 = tl.load(p_x8), tl.load(p_w8)
        else:
            b_x8 = tl.load(p_x8, mask=(o_k < K - start)[None, :], other=0)
            b_w8 = tl.load(p_w8, mask=(o_k < K - start)[:, None], other=0)
        if INTERPRETER:  # whose product of integers is slow
            b_sum = tl.dot(b_x8.to(tl.float32), b_w8.to(tl.float32), input_precision="ieee")
        else:
            # an empty instruction: else Triton (3.9) reads the next pass's numbers from shared memory early and carries
            # them over byte by byte, which takes more instructions than the product
            nothing = tl.zeros([BLOCK_N, GROUP], tl.int8)
            b_x8 = tl.inline_asm_elementwise(
                "mov.b32 $0, $2;", "=r,r,r", [nothing, b_x8], dtype=tl.int8, is_pure=True, pack=4
            )
            b_sum = tl.dot(b_x8, b_w8).to(tl.float32)
        b_y += b_sum * tl.load(p_step)[:, None]
        p_x8 += GROUP
        p_w8 += GROUP if STORED else GROUP * M
        p_step += N
    m_n, m_m = o_n < N, o_m < M
    if p_scale is not None:
        b_y *= (tl.load(p_scale + o_m, mask=m_m, other=0.0) / 127)[None, :]
    if p_bias is not None:
        b_y += tl.load(p_bias + o_m, mask=m_m, other=0.0).to(tl.float32)[None, :]
    p_y += o_n.to(tl.int64)[:, None] * M + o_m[None, :]
    tl.store(p_y, b_y.to(p_y.dtype.element_ty), mask=m_n[:, None] & m_m[None, :])


_tuned_quantise = tuned(QUANTISE_TILES, key=["p_scale", "GROUPS"])(quantise_rows_kernel)
_tuned_product = tuned(TILES, key=["STORED", "EVEN", "N", "M", "K"])(int8_product_kernel)


def quantise_rows(x_NK: Tensor, scale_K: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The kernel for ``quantise_rows_op``."""
    require_card("int8_linear", x_NK)
    x_NK = aligned(x_NK)
    N, K = x_NK.shape
    groups = triton.cdiv(K, GROUP.value)
    x8, step = x_NK.new_empty(N, K, dtype=torch.int8), x_NK.new_empty(groups, N, dtype=torch.float32)
    with torch.cuda.device_of(x_NK):
        _tuned_quantise[(N,)](x_NK, scale_K, x8, step, x_NK.stride(0), N, K, GROUPS=triton.next_power_of_2(groups))
    return x8, step


def int8_product(
    x8_NK: Tensor, step_GN: Tensor, w8: Tensor, scale_M: Tensor | None, bias_M: Tensor | None,
    dtype: torch.dtype, stored: bool,
) -> Tensor:  # fmt: skip
    """The kernel for ``int8_product_op``."""
    require_card("int8_linear", x8_NK)
    x8_NK, w8 = x8_NK.contiguous(), aligned(w8).contiguous()
    (N, K), M = x8_NK.shape, w8.shape[0 if stored else 1]
    y = x8_NK.new_empty(N, M, dtype=dtype)
    with torch.cuda.device_of(x8_NK):
        _tuned_product[lambda tile: (triton.cdiv(N, tile["BLOCK_N"]) * triton.cdiv(M, tile["BLOCK_M"]),)](
            x8_NK, step_GN, w8, scale_M, bias_M, y, N, M, K,
            STORED=stored, EVEN=K % GROUP.value == 0 and M % EVEN_M == 0,
        )  # fmt: skip
    return y


def _in_plain_pytorch(x: Tensor, dtype: torch.dtype) -> bool:
    """On a CPU, also where Triton is interpreted, which is slow; and in fp64."""
    return x.device.type != "cuda" or dtype is torch.float64


@operator("quantise_rows")
def quantise_rows_op(x_NK: Tensor, scale_K: Tensor | None) -> tuple[Tensor, Tensor]:
    """x, or x times scale / 127, as 8-bit integers (N, K) and the value of one unit, (G, N) in fp32 (fp64 of fp64)."""
    return (_quantise_in_pytorch if _in_plain_pytorch(x_NK, x_NK.dtype) else quantise_rows)(x_NK, scale_K)


@torch.library.register_fake(quantise_rows_op)
def _(x, scale):
    (n, k), wide = x.shape, torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(n, k, dtype=torch.int8), x.new_empty(-(-k // GROUP.value), n, dtype=wide)


@operator("int8_product")
def int8_product_op(
    x8_NK: Tensor, step_GN: Tensor, w8: Tensor, scale_M: Tensor | None, bias_M: Tensor | None,
    dtype: torch.dtype, stored: bool,
) -> Tensor:  # fmt: skip
    """(N, M) in ``dtype``; ``scale_M`` and ``bias_M`` may be left out."""
    run = _multiply_in_pytorch if _in_plain_pytorch(x8_NK, dtype) else int8_product
    return run(x8_NK, step_GN, w8, scale_M, bias_M, dtype, stored)


@torch.library.register_fake(int8_product_op)
def _(x8, step, w8, scale, bias, dtype, stored):
    return x8.new_empty(x8.shape[0], w8.shape[0 if stored else 1], dtype=dtype)


@register_flop_formula(torch.ops.lowmem_drf.int8_product)
def _(x8_shape, step_shape, w8_shape, *_, **__) -> int:
    return 2 * x8_shape[0] * w8_shape[0] * w8_shape[1]


def int8_forward(x_NI: Tensor, w8_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None) -> Tensor:
    """As ``int8_linear``, without a graph."""
    return cast(Tensor, int8_product_op(*quantise_rows_op(x_NI, None), w8_OI, scale_O, bias_O, x_NI.dtype, True))


def int8_backward(d_NO: Tensor, w8_OI: Tensor, scale_O: Tensor) -> Tensor:
    """The gradient at x, for one at the result."""
    return cast(Tensor, int8_product_op(*quantise_rows_op(d_NO, scale_O), w8_OI, None, None, d_NO.dtype, False))


class _Int8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_NI: Tensor, w8_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None, forward: Any, backward: Any
    ) -> Tensor:
        ctx.backward_of = backward
        ctx.save_for_backward(w8_OI, scale_O)
        return cast(Tensor, forward(x_NI, w8_OI, scale_O, bias_O))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_NO: Tensor) -> tuple[Tensor | None, ...]:
        d_x = ctx.backward_of(d_NO, *ctx.saved_tensors) if ctx.needs_input_grad[0] else None
        return d_x, *[None] * 5


def int8_linear(x_NI: Tensor, w8_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + b in 8-bit integers, on a CPU in plain PyTorch. Only x gets a gradient.

    Args:
        x_NI: (N, in), bf16, fp16 or fp32; fp64 in plain PyTorch.
        w8_OI: (out, in), int8.
        scale_O: (out,), fp32: W = w8 scale / 127.
        bias_O: (out,).

    Returns:
        (N, out) in the dtype of x.
    """
    return cast(Tensor, _Int8Linear.apply(x_NI, w8_OI, scale_O, bias_O, int8_forward, int8_backward))


def int8_linear_naive(x_NI: Tensor, w8_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """``int8_linear`` in plain PyTorch, on any device."""

    def forward(x: Tensor, w8: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        return _multiply_in_pytorch(*_quantise_in_pytorch(x), w8, scale, bias, x.dtype, True)

    def backward(d: Tensor, w8: Tensor, scale: Tensor) -> Tensor:
        return _multiply_in_pytorch(*_quantise_in_pytorch(d, scale), w8, None, None, d.dtype, False)

    return cast(Tensor, _Int8Linear.apply(x_NI, w8_OI, scale_O, bias_O, forward, backward))


def variants(card: int) -> Iterator[Variant]:
    """Rows of Wan-14B's feed-forward, the longest; products in both directions, of even and of ragged sizes."""
    kinds = dict.fromkeys(("p_step", "p_scale"), "fp32") | dict.fromkeys(("p_x8", "p_w8"), "i8")
    for tile in tiles_for(QUANTISE_TILES, card):
        for element, scale in (("bf16", {"p_scale": None}), ("bf16", {}), ("fp16", {}), ("fp32", {})):
            yield variant(quantise_rows_kernel, tile, element, {**scale, "GROUPS": 128}, K="i32:16", **kinds)
    for tile in tiles_for(TILES, card):
        for stored, even in ((True, True), (False, True), (True, False), (False, False)):
            constants = {"STORED": stored, "EVEN": even} | ({} if stored else {"p_scale": None, "p_bias": None})
            sizes = dict.fromkeys("MK", "i32:16")
            yield variant(int8_product_kernel, tile, "bf16", constants, **kinds, **sizes)
