"""The pieces of the Wan decoder for a run with kernels: the functions of diffusers' modules in less memory, on the same
weights.

After ``WanResidualBlock``, ``WanResample`` and ``WanCausalConv3d`` of diffusers 0.42.1. Values and gradients are the
same up to rounding. They do without:

- The intermediate tensors of ``F.normalize`` and ``SiLU``: ``norm_silu`` saves their input.
- The saved input of a convolution: with frozen weights its gradient does not depend on it. And its zero-padded copy:
  cuDNN pads.
- Values that nobody reads in a pass for the graph alone: of a block's last convolution and of linear functions
  (``Wants.GRAPH``).
- The upsampled picture, and more than half of the products of the convolution that reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from torch import Tensor

NormSilu = Callable[..., "Tensor"]
"""(x_BCTHW, gamma_C, before=, past_BCTHW=) -> silu(x / |x| * sqrt(C) * gamma) behind past frames, with |x| over the
channels: ``WanRMS_norm`` and ``SiLU``."""


class Wants(Enum):
    """What the caller of a segment needs. It may get more."""

    ALL = "the output and the caches handed on"
    OUTPUT = "the output"
    GRAPH = "the graph from either back to the inputs: their values may be left out"


class Residual(nn.Module):
    """A ``WanResidualBlock`` without dropout."""

    def __init__(self, block: Any, norm_silu: NormSilu) -> None:
        super().__init__()
        self.block, self.norm_silu = block, norm_silu

    def forward(self, x: Tensor, caches: list[Any], first: bool, shortcut: Tensor | None, wants: Wants) -> Tensor:
        block, silu = self.block, self.norm_silu
        makes, hands = wants is not Wants.GRAPH, wants is Wants.ALL
        plain = isinstance(block.conv_shortcut, nn.Identity)
        residual = x if plain else convolved(x, block.conv_shortcut, makes=makes)[0]
        h, caches[0] = normed_and_convolved(x, block.norm1, block.conv1, caches[0], silu, hands=hands)
        out, caches[1] = normed_and_convolved(h, block.norm2, block.conv2, caches[1], silu, residual, makes, hands)
        return out


class Upsample(nn.Module):
    """A ``WanResample`` that doubles rows, columns and, in mode ``upsample3d``, frames; with Wan 2.2's shortcut around
    the block."""

    def __init__(self, resample: Any, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.resample, self.shortcut = resample, shortcut

    def forward(self, x: Tensor, caches: list[Any], first: bool, shortcut: Tensor | None, wants: Wants) -> Tensor:
        makes, in_time = wants is not Wants.GRAPH, bool(caches) and caches[0] is not None
        if in_time:
            entering = caches[0] if isinstance(caches[0], torch.Tensor) else None  # after the marker "Rep": zeros
            conv, hands = self.resample.time_conv, wants is Wants.ALL
            x, caches[0] = convolved(_WithPastFrames.apply(x, entering), conv, None, 2, makes, hands)
        elif caches:
            caches[0] = "Rep"  # the first frame is not doubled
        conv = self.resample.resample[1]
        residual = None if self.shortcut is None else self.shortcut(shortcut, first_chunk=first)
        return cast("Tensor", _UpsampledConv.apply(x, residual, conv.weight, conv.bias, in_time, makes))


def normed_and_convolved(
    x: Tensor,
    norm: Any,
    conv: Any,
    cache: Tensor | None,
    norm_silu: NormSilu,
    residual: Tensor | None = None,
    makes: bool = True,
    hands: bool = True,
) -> tuple[Tensor, Tensor]:
    """``conv(silu(norm(x)), cache) + residual``, and the cache handed on: one frame of the first chunk, later two."""
    joined = norm_silu(x, norm.gamma.flatten(), before=2, past_BCTHW=cache)  # nothing else holds it
    return convolved(joined, conv, residual, 1 if cache is None and x.shape[2] == 1 else 2, makes, hands)


def convolved(
    x: Tensor, conv: Any, residual: Tensor | None = None, last: int = 0, makes: bool = True, hands: bool = True
) -> tuple[Tensor, Tensor]:
    """``conv(x) + residual`` without padding in time, and the ``last`` frames of ``x``."""
    return cast("tuple[Tensor, Tensor]", _FrozenConv.apply(x, residual, conv.weight, conv.bias, last, makes, hands))


class _WithPastFrames(torch.autograd.Function):
    """The two frames before ``x`` that a causal convolution reads, zeros if there are none, and ``x``.

    Like ``torch.cat``, but the cache's gradient is a copy: a view would keep the gradient of all joined frames alive.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cache: Tensor | None) -> Tensor:
        ctx.frames = 0 if cache is None else cache.shape[2]
        before = [] if ctx.frames == 2 else [x.new_zeros(*x.shape[:2], 2 - ctx.frames, *x.shape[3:])]
        return torch.cat([*before, *([] if cache is None else [cache]), x], dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor | None]:
        return d[:, :, 2:], d[:, :, 2 - ctx.frames : 2].clone() if ctx.needs_input_grad[1] else None


class _FrozenConv(torch.autograd.Function):
    """A convolution with frozen weights: saves nothing of its input, and computes only the requested values."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, last: int, makes: bool, hands: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weight)
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.last = x.shape, last
        handed = x[:, :, x.shape[2] - last :]
        handed = handed.clone() if hands else _placeholder(x, handed.shape)
        if not makes:
            return _placeholder(x, (len(x), len(weight), x.shape[2] - weight.shape[2] + 1, *x.shape[3:])), handed
        out = torch.ops.aten.convolution(x, weight, bias, *_options(weight))
        return out if residual is None else out.add_(residual), handed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_handed: Tensor | None) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        d_x = None if d_out is None else _input_gradient(d_out, ctx.shape, weight)
        if d_handed is not None:
            d_x = d_handed.new_zeros(ctx.shape) if d_x is None else d_x
            d_x[:, :, d_x.shape[2] - ctx.last :] += d_handed
        return d_x, d_out if ctx.needs_input_grad[1] else None, *[None] * 5


class _UpsampledConv(torch.autograd.Function):
    """Nearest-neighbour upsampling of rows and columns, then a frozen convolution of each frame, plus ``residual``.

    Of the nine upsampled pixels that a pixel is made of, neighbours are equal. So the pixels of even and odd rows and
    columns are four convolutions of the small picture with 2x2 kernels, whose weights are sums: 16 products for 36.

    ``in_time``: each frame's channels hold two frames.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, in_time: bool, makes: bool
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.times = x.shape, 2 if in_time else 1
        batch, channels, frames, height, width = x.shape
        shape = (batch, len(weight), frames * ctx.times, 2 * height, 2 * width)
        if not makes:
            return _placeholder(x, shape)
        x = x.view(batch, ctx.times, channels // ctx.times, frames, height, width)
        x = x.permute(0, 3, 1, 2, 4, 5).flatten(0, 2)
        out = x.new_empty(len(x), *shape[1:2], *shape[3:])
        for row, column, kernel in _phases(weight):
            made = nn.functional.conv2d(x, kernel, bias, padding=1)
            out[:, :, row::2, column::2] = made[:, :, row : row + height, column : column + width]
        out = out.unflatten(0, (batch, -1)).transpose(1, 2)
        return out if residual is None else out.add_(residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        batch, channels, frames, height, width = ctx.shape
        d_frames = d_out.transpose(1, 2).flatten(0, 1)
        d_x = d_out.new_zeros(len(d_frames), weight.shape[1], height, width)
        for row, column, kernel in _phases(weight):
            d = nn.functional.conv_transpose2d(d_frames[:, :, row::2, column::2].contiguous(), kernel)
            d_x += d[:, :, 1 - row : 1 - row + height, 1 - column : 1 - column + width]
        d_x = d_x.unflatten(0, (batch, frames, ctx.times)).permute(0, 2, 3, 1, 4, 5).reshape(ctx.shape)
        return d_x, d_out if ctx.needs_input_grad[1] else None, *[None] * 4


def _phases(weight: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """(odd row?, odd column?, kernel (out, in, 2, 2)) of a 3x3 convolution behind an upsampling."""

    def halves(wide: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        first, middle, last = wide.unbind(dim)
        return torch.stack([first, middle + last], dim), torch.stack([first + middle, last], dim)

    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for row, rows in enumerate(halves(wide, 2)):
        for column, kernel in enumerate(halves(rows, 3)):
            yield row, column, kernel.to(weight.dtype)


def _options(weight: Tensor) -> tuple[Any, ...]:
    """Options of ``aten::convolution``: padded in rows and columns, not in time."""
    kernel = weight.shape[2:]
    padding = [0 if i == len(kernel) - 3 else size // 2 for i, size in enumerate(kernel)]
    ones = [1] * len(kernel)
    return ones, padding, ones, False, [0] * len(kernel), 1


def _input_gradient(d: Tensor, shape: Any, weight: Tensor) -> Tensor:
    """The gradient at the input of a convolution, which does not depend on its values."""
    x, wanted = _placeholder(d, shape), (True, False, False)
    result: Tensor = torch.ops.aten.convolution_backward(d, x, weight, None, *_options(weight), wanted)[0]
    return result


def _placeholder(like: Tensor, shape: Any) -> Tensor:
    """A tensor of this shape without values, in one element of memory."""
    return like.new_zeros(()).expand(shape)
