"""The Wan VAE's RMSNorm and SiLU in one pass over memory.

    n = x / max(|x|, 1e-12)          |x|: over the C channels of a position, in fp32
    u = sqrt(C) * n * gamma
    y = silu(u) = u * sigmoid(u)     or u itself

Shapes: x and y (B, C, T, H, W), gamma (C). Dtypes: bf16, fp16 or fp32, independent of each other; y has the dtype of x.
Computes in fp32 and rounds once, at the end. Source: ``WanRMS_norm`` and ``SiLU`` in ``WanResidualBlock`` of diffusers
0.42.1 (``autoencoder_kl_wan.py``). There, ``F.normalize`` keeps x in fp32, its square, its norms and two quotients, and
``SiLU`` keeps its input.

The backward keeps x alone. A program holds all channels of its positions, so it recomputes their norm without another
read. With s = sigmoid(u) and v = sqrt(C) * gamma * d * s * (1 + u * (1 - s)), for an upstream gradient d:

    dx     = (v - n * sum_C(v * n)) / |x|        (v / 1e-12 where the norm is clamped)
    dgamma = sum over positions of v * n / gamma

Tiles are channels x positions. Positions are contiguous in memory, so a warp reads along them; in channels-last memory
the stride of the channels is 1, and the compiler transposes the tile. No tensor is copied: the kernels read strips of
rows and of frames in place, as long as H and W are one dimension of memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowmem_drf.kernels.checks import DTYPES, require_card
from lowmem_drf.kernels.operators import operator
from lowmem_drf.kernels.tiles import CARDS, Tile, Variant, tiles_for, tuned, variant

ELEMENTS = 8192
"""Values of a tile: all channels, padded to a power of two, times as many positions as fit. 96 channels leave 64
positions, in bf16 a cache line of 128 bytes; 384 channels leave 32 bytes, the least that memory transfers."""
TILES = (
    Tile({"ELEMENTS": ELEMENTS}, 8, 1, CARDS,
         "32 elements a thread, at most 128 registers: of two programs on a multiprocessor one loads, one computes"),
    Tile({"ELEMENTS": ELEMENTS}, 16, 1, CARDS,
         "16 elements a thread: twice the warps to compute while others wait, more of them to add up over"),
)  # fmt: skip
EPS = tl.constexpr(1e-12)
"""The bound of ``F.normalize``."""


def norm_silu_naive(
    x_BCTHW: Tensor, gamma_C: Tensor, silu: bool = True, before: int = 0, past_BCTHW: Tensor | None = None
) -> Tensor:
    """The formula in plain PyTorch."""
    exact = torch.promote_types(x_BCTHW.dtype, torch.float32)
    n = torch.nn.functional.normalize(x_BCTHW.to(exact), dim=1)
    u = n * x_BCTHW.shape[1] ** 0.5 * gamma_C.to(exact).view(-1, 1, 1, 1)
    y = (torch.nn.functional.silu(u) if silu else u).to(x_BCTHW.dtype)
    return torch.cat([*_before(x_BCTHW, before, past_BCTHW), y], dim=2) if before else y


def _before(x: Tensor, before: int, past: Tensor | None) -> list[Tensor]:
    """``before`` frames: zeros, and the last of them ``past``."""
    known = [] if past is None else [past]
    missing = before - sum(x.shape[2] for x in known)
    return [x.new_zeros(*x.shape[:2], missing, *x.shape[3:]), *known] if missing else known


@triton.jit
def _places(C, T, P, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """This program's batch element, frame, channels [BLOCK_C, 1] and positions [1, BLOCK_P], and the mask of those that
    exist."""
    blocks = tl.cdiv(P, BLOCK_P)
    i_bt = tl.program_id(0) // blocks
    o_c = tl.arange(0, BLOCK_C)[:, None]
    o_p = ((tl.program_id(0) % blocks) * BLOCK_P + tl.arange(0, BLOCK_P))[None, :]
    return (i_bt // T).to(tl.int64), (i_bt % T).to(tl.int64), o_c.to(tl.int64), o_p.to(tl.int64), (o_c < C) & (o_p < P)


@triton.jit
def _load_gamma(p_gamma, C, BLOCK_C: tl.constexpr):
    """[BLOCK_C, 1] in fp32. Loaded as a row: loading a column would set the layout of the whole computation to one
    position per warp."""
    o_c = tl.arange(0, BLOCK_C)
    return tl.load(p_gamma + o_c, mask=o_c < C, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _sigmoid(b_u):
    b_root = tl.math.rsqrt(1.0 + tl.exp(-b_u))
    # a division takes four times the instructions, and with the fastest memory they nearly limit this kernel
    return b_root * b_root


@tuned(TILES, key=["C"])
@triton.jit
def norm_silu_forward_kernel(
    p_x, p_gamma, p_y, C, T, P, root,
    stride_xb, stride_xc, stride_xt, step_x, stride_yb, stride_yc, stride_yt, step_y,
    SILU: tl.constexpr, BLOCK_C: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    i_b, i_t, o_c, o_p, m = _places(C, T, P, BLOCK_C, ELEMENTS // BLOCK_C)
    p_x += i_b * stride_xb + i_t * stride_xt
    b_x = tl.load(p_x + o_c * stride_xc + o_p * step_x, mask=m, other=0.0).to(tl.float32)  # [BLOCK_C, BLOCK_P]
    b_gamma = _load_gamma(p_gamma, C, BLOCK_C)
    b_norm = tl.sqrt(tl.sum(b_x * b_x, axis=0))[None, :]  # [1, BLOCK_P]
    b_y = b_x * (root / tl.maximum(b_norm, EPS)) * b_gamma
    if SILU:
        b_y = b_y * _sigmoid(b_y)
    p_y += i_b * stride_yb + i_t * stride_yt
    tl.store(p_y + o_c * stride_yc + o_p * step_y, b_y.to(p_y.dtype.element_ty), mask=m)


@tuned(TILES, key=["C"])
@triton.jit
def norm_silu_backward_kernel(
    p_d, p_x, p_gamma, p_dx, p_dgamma, C, T, P, root,
    stride_db, stride_dc, stride_dt, step_d, stride_xb, stride_xc, stride_xt, step_x,
    stride_dxb, stride_dxc, stride_dxt, step_dx,
    SILU: tl.constexpr, DX: tl.constexpr, DGAMMA: tl.constexpr, BLOCK_C: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    i_b, i_t, o_c, o_p, m = _places(C, T, P, BLOCK_C, ELEMENTS // BLOCK_C)
    p_x += i_b * stride_xb + i_t * stride_xt
    b_x = tl.load(p_x + o_c * stride_xc + o_p * step_x, mask=m, other=0.0).to(tl.float32)  # [BLOCK_C, BLOCK_P]
    p_d += i_b * stride_db + i_t * stride_dt
    b_d = tl.load(p_d + o_c * stride_dc + o_p * step_d, mask=m, other=0.0).to(tl.float32)  # [BLOCK_C, BLOCK_P]
    b_gamma = root * _load_gamma(p_gamma, C, BLOCK_C)
    b_norm = tl.sqrt(tl.sum(b_x * b_x, axis=0))[None, :]  # [1, BLOCK_P]
    b_inverse = 1.0 / tl.maximum(b_norm, EPS)
    b_n = b_x * b_inverse
    if SILU:
        b_u = b_n * b_gamma
        b_s = _sigmoid(b_u)
        b_d = b_d * b_s * (1.0 + b_u * (1.0 - b_s))
    if DGAMMA:
        o_row = tl.arange(0, BLOCK_C)
        tl.store(p_dgamma + tl.program_id(0).to(tl.int64) * C + o_row, root * tl.sum(b_d * b_n, axis=1), mask=o_row < C)
    if DX:
        b_v = b_d * b_gamma
        b_along = tl.where(b_norm > EPS, tl.sum(b_v * b_n, axis=0)[None, :], 0.0)
        b_dx = (b_v - b_n * b_along) * b_inverse
        p_dx += i_b * stride_dxb + i_t * stride_dxt
        tl.store(p_dx + o_c * stride_dxc + o_p * step_dx, b_dx.to(p_dx.dtype.element_ty), mask=m)


def _extent(*tensors: Tensor) -> tuple[int, int]:
    """Number of frames, and of positions per frame. Frames that are contiguous in all tensors count as one long
    frame."""
    _, _, frames, height, width = tensors[0].shape
    if all(frames == 1 or x.stride(2) == height * width * _strides(x)[3] for x in tensors):
        return 1, frames * height * width
    return frames, height * width


def _programs(x: Tensor, frames: int, positions: int) -> int:
    return x.shape[0] * frames * triton.cdiv(positions, ELEMENTS // _block_c(x))


def _block_c(x: Tensor) -> int:
    return triton.next_power_of_2(x.shape[1])


def _flat(x: Tensor) -> Tensor:
    """x with H and W as one dimension of memory: strips of columns and transposed frames are copied."""
    return x if x.shape[3] == 1 or x.shape[4] == 1 or x.stride(3) == x.shape[4] * x.stride(4) else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int, int, int]:
    """Strides of batch, channels, frames and positions."""
    return x.stride(0), x.stride(1), x.stride(2), x.stride(3 if x.shape[4] == 1 else 4)


@operator("norm_silu_forward")
def norm_silu_forward(
    x_BCTHW: Tensor, gamma_C: Tensor, silu: bool, before: int = 0, past_BCTHW: Tensor | None = None
) -> Tensor:
    """y behind ``before`` frames, with the memory layout of x if x has no gaps."""
    require_card("norm_silu", x_BCTHW)
    x, gamma = _flat(x_BCTHW), gamma_C.contiguous()
    joined = _empty_joined(x, before)
    y, known = joined[:, :, before:], 0 if past_BCTHW is None else past_BCTHW.shape[2]
    joined[:, :, : before - known].zero_()
    if past_BCTHW is not None:
        joined[:, :, before - known : before].copy_(past_BCTHW)
    if x.numel():
        frames, positions = _extent(x, y)
        with torch.cuda.device_of(x):
            norm_silu_forward_kernel[(_programs(x, frames, positions),)](
                x, gamma, y, x.shape[1], frames, positions, x.shape[1] ** 0.5, *_strides(x), *_strides(y),
                SILU=silu, BLOCK_C=_block_c(x),
            )  # fmt: skip
    return joined


@torch.library.register_fake(norm_silu_forward)
def _(x_BCTHW: Tensor, gamma_C: Tensor, silu: bool, before: int = 0, past_BCTHW: Tensor | None = None) -> Tensor:
    return _empty_joined(_flat(x_BCTHW), before)


def _empty_joined(x: Tensor, before: int) -> Tensor:
    """Room for x and ``before`` more frames: as x in memory, or contiguous in its order of dimensions."""
    if not before:
        return torch.empty_like(x)
    last = x.shape[1] > 1 and x.is_contiguous(memory_format=torch.channels_last_3d)
    shape = (*x.shape[:2], x.shape[2] + before, *x.shape[3:])
    memory = torch.channels_last_3d if last else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory)


@operator("norm_silu_backward")
def norm_silu_backward(
    d_BCTHW: Tensor, x_BCTHW: Tensor, gamma_C: Tensor, silu: bool, wants_x: bool, wants_gamma: bool
) -> tuple[Tensor, Tensor]:
    """dx, with the memory layout of x if x has no gaps, and dgamma; unwanted gradients are empty tensors. dgamma also
    allocates C floats per program: 1/64 of x in fp32 at 96 channels, 1/16 at 1024."""
    require_card("norm_silu", x_BCTHW)
    d, x, gamma = _flat(d_BCTHW), _flat(x_BCTHW), gamma_C.contiguous()
    dx = torch.empty_like(x) if wants_x else x.new_empty(0)
    frames, positions = _extent(d, x, *([dx] if wants_x else []))
    programs = _programs(x, frames, positions)
    rows = torch.empty(programs if wants_gamma else 0, x.shape[1], dtype=torch.float32, device=x.device)
    if x.numel():
        with torch.cuda.device_of(x):
            norm_silu_backward_kernel[(programs,)](
                d, x, gamma, dx, rows, x.shape[1], frames, positions, x.shape[1] ** 0.5,
                *_strides(d), *_strides(x), *(_strides(dx) if wants_x else (0, 0, 0, 0)),
                SILU=silu, DX=wants_x, DGAMMA=wants_gamma, BLOCK_C=_block_c(x),
            )  # fmt: skip
    return dx, rows.sum(0).to(gamma.dtype) if wants_gamma else gamma.new_empty(0)


@torch.library.register_fake(norm_silu_backward)
def _(
    d_BCTHW: Tensor, x_BCTHW: Tensor, gamma_C: Tensor, silu: bool, wants_x: bool, wants_gamma: bool
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(_flat(x_BCTHW)) if wants_x else x_BCTHW.new_empty(0)
    return dx, gamma_C.new_empty(gamma_C.shape if wants_gamma else 0)


class _NormSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, silu: bool, before: int, past: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, gamma)
        ctx.silu, ctx.before, ctx.known = silu, before, 0 if past is None else past.shape[2]
        return norm_silu_forward(x, gamma, silu, before, past)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        wants_x, wants_gamma, _, _, wants_past = ctx.needs_input_grad
        # a copy: a view would keep the gradient of all frames alive
        d_past = d[:, :, ctx.before - ctx.known : ctx.before].clone() if wants_past else None
        d_y = d[:, :, ctx.before :]
        dx, dgamma = norm_silu_backward(d_y, *ctx.saved_tensors, ctx.silu, wants_x, wants_gamma)
        return dx if wants_x else None, dgamma if wants_gamma else None, None, None, d_past


def norm_silu(
    x_BCTHW: Tensor, gamma_C: Tensor, silu: bool = True, before: int = 0, past_BCTHW: Tensor | None = None
) -> Tensor:
    """``silu(normalize(x_BCTHW, dim=1) * sqrt(C) * gamma_C)``, differentiable in all tensors.

    Args:
        x_BCTHW: bf16, fp16 or fp32, of up to 1024 channels.
        gamma_C: bf16, fp16 or fp32.
        silu: ``False``: the norm alone.
        before: number of frames in front of the result, which a causal convolution reads. The result is written
            behind them; ``torch.cat`` would read and write it once more.
        past_BCTHW: the last of these, at most ``before``, taken as they are; the others are zeros.

    Returns:
        (B, C, before + T, H, W) in the dtype of ``x_BCTHW``.

    Raises:
        TypeError: another dtype. fp64 is for ``norm_silu_naive``.
        ValueError: other shapes, or tensors that are not on one device, or not on a card (if Triton interprets: CPU or
            card).
    """
    for name, tensor in (("x_BCTHW", x_BCTHW), ("gamma_C", gamma_C)):
        if tensor.dtype not in DTYPES:
            known = "norm_silu takes bf16, fp16 and fp32"
            raise TypeError(f"{known}; {name} is {tensor.dtype}. norm_silu_naive takes fp64")
    if x_BCTHW.ndim != 5 or not 1 <= x_BCTHW.shape[1] <= 1024 or gamma_C.shape != (x_BCTHW.shape[1],):
        shapes = f"{tuple(x_BCTHW.shape)} and {tuple(gamma_C.shape)}"
        known = "norm_silu takes x of shape (B, C, T, H, W) with 1 to 1024 channels, and gamma of shape (C)"
        raise ValueError(f"{known}; it got {shapes}")
    past = x_BCTHW[:, :, :0] if past_BCTHW is None else past_BCTHW
    fits = past.shape[:2] == x_BCTHW.shape[:2] and past.shape[3:] == x_BCTHW.shape[3:] and past.shape[2] <= before
    if not fits or past.dtype != x_BCTHW.dtype or past.device != x_BCTHW.device:
        got = f"{tuple(past.shape)} {past.dtype} on {past.device}, of {before} frames"
        raise ValueError(f"norm_silu takes past frames of the shape, dtype and device of x; it got {got}")
    if x_BCTHW.device != gamma_C.device or x_BCTHW.device.type == "meta":
        devices = f"x is on {x_BCTHW.device}, gamma on {gamma_C.device}"
        raise ValueError(f"norm_silu takes tensors with values, on one device; {devices}")
    return _NormSilu.apply(x_BCTHW, gamma_C, silu, before, past_BCTHW)


def variants(card: int) -> Iterator[Variant]:
    """Every padded width of the VAEs of Wan 2.1 (96, 192 and 384 channels) and 2.2 (256, 512, 1024); frozen weights,
    contiguous positions."""
    kinds = {"C": "i32:16", "P": "i32:16", "root": "fp32", "p_dgamma": "fp32"}
    for kernel, tensors, switches in (
        (norm_silu_forward_kernel.fn, ("x", "y"), {}),
        (norm_silu_backward_kernel.fn, ("d", "x", "dx"), {"DX": True, "DGAMMA": False}),
    ):
        constants = {"SILU": True} | switches | {f"step_{tensor}": 1 for tensor in tensors}
        for element, block_c in itertools.product(("bf16", "fp32"), (128, 256, 512, 1024)):
            for tile in tiles_for(TILES, card):
                yield variant(kernel, tile, element, constants | {"BLOCK_C": block_c}, **kinds)
