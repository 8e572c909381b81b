"""The pieces of the Wan decoder for a run with kernels: the functions of diffusers' modules, with less memory, on those
modules' own weights.

diffusers 0.42.1 (``autoencoder_kl_wan.py``: ``WanResidualBlock``, ``WanResample``, ``WanCausalConv3d``). Values and
gradients are the same but for rounding. What is left out:

- ``F.normalize`` and ``SiLU``, with all they keep for the backward: ``norm_silu`` keeps their input.
- What a convolution reads: with frozen weights its gradient does not depend on it. And the copy with zeros around it:
  cuDNN pads by itself.
- Values that only a graph is made for: of the last convolution of a block, and of all that is linear (``Wants.GRAPH``).
- The fp32 copy around the doubling of rows and columns, which only copies values.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from torch import Tensor

NormSilu = Callable[["Tensor", "Tensor"], "Tensor"]
"""(x_BCTHW, gamma_C) -> silu(x / |x| * sqrt(C) * gamma), where |x| is over the channels: ``WanRMS_norm`` and
``SiLU``."""


class Wants(Enum):
    """What a segment is called for. Whoever asks for less may get more."""

    ALL = "the output and the caches handed on"
    OUTPUT = "the output"
    GRAPH = "the graph from either back to the inputs: their values may be left out"


class Residual(nn.Module):
    """Of a ``WanResidualBlock`` without dropout."""

    def __init__(self, block: Any, norm_silu: NormSilu) -> None:
        super().__init__()
        self.block, self.norm_silu = block, norm_silu

    def forward(self, x: Tensor, caches: list[Any], first: bool, shortcut: Tensor | None, wants: Wants) -> Tensor:
        block, makes = self.block, wants is not Wants.GRAPH
        residual = (
            x if isinstance(block.conv_shortcut, nn.Identity) else convolved(x, block.conv_shortcut, makes=makes)[0]
        )
        h, caches[0] = normed_and_convolved(
            x, block.norm1, block.conv1, caches[0], self.norm_silu, hands=wants is Wants.ALL
        )
        out, caches[1] = normed_and_convolved(
            h, block.norm2, block.conv2, caches[1], self.norm_silu, residual, makes, wants is Wants.ALL
        )
        return out


class Upsample(nn.Module):
    """Of a ``WanResample`` that doubles rows, columns and, with mode ``upsample3d``, frames; and of Wan 2.2's shortcut
    around the block."""

    def __init__(self, resample: Any, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.resample, self.shortcut = resample, shortcut

    def forward(self, x: Tensor, caches: list[Any], first: bool, shortcut: Tensor | None, wants: Wants) -> Tensor:
        makes, in_time = wants is not Wants.GRAPH, bool(caches) and caches[0] is not None
        if in_time:
            entering = caches[0] if isinstance(caches[0], torch.Tensor) else None  # after the marker "Rep": zeros
            x, caches[0] = convolved(
                _Joined.apply(x, entering), self.resample.time_conv, None, 2, makes, wants is Wants.ALL
            )
        elif caches:
            caches[0] = "Rep"  # of the first frame no second is made
        conv = self.resample.resample[1]
        residual = None if self.shortcut is None else self.shortcut(shortcut, first_chunk=first)
        return cast("Tensor", _Doubled.apply(x, residual, conv.weight, conv.bias, in_time, makes))


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
    """``conv(silu(norm(x)), cache) + residual``, and the cache handed on: of the first frame one, later two."""
    # nothing else holds the normed x, so the convolution runs without it
    joined = _Joined.apply(norm_silu(x, norm.gamma.flatten()), cache)
    return convolved(joined, conv, residual, 1 if cache is None and x.shape[2] == 1 else 2, makes, hands)


def convolved(
    x: Tensor, conv: Any, residual: Tensor | None = None, last: int = 0, makes: bool = True, hands: bool = True
) -> tuple[Tensor, Tensor]:
    """``conv(x) + residual`` without padding in time, and the ``last`` frames of ``x``."""
    return cast("tuple[Tensor, Tensor]", _Convolved.apply(x, residual, conv.weight, conv.bias, last, makes, hands))


class _Joined(torch.autograd.Function):
    """The two frames that a causal convolution looks back on, zeros where there are none, and those of ``x``.

    As ``torch.cat``, but that the gradient at the cache is no view: a view would keep the whole gradient of the joined
    frames.
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


class _Convolved(torch.autograd.Function):
    """A convolution with frozen weights: keeps nothing of its input, and makes only those values that are asked for."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, last: int, makes: bool, hands: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weight)
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.last = x.shape, last
        handed = x[:, :, x.shape[2] - last :]
        handed = handed.clone() if hands else _hollow(x, handed.shape)
        if not makes:
            return _hollow(x, (len(x), len(weight), x.shape[2] - weight.shape[2] + 1, *x.shape[3:])), handed
        out = torch.ops.aten.convolution(x, weight, bias, *_form(weight))
        return out if residual is None else out.add_(residual), handed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_handed: Tensor | None) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        d_x = (
            _pulled_back(d_out, ctx.shape, weight)
            if d_out is not None
            else None
            if d_handed is None
            else d_handed.new_zeros(ctx.shape)
        )
        if d_x is not None and d_handed is not None:
            d_x[:, :, d_x.shape[2] - ctx.last :] += d_handed
        return d_x, d_out if ctx.needs_input_grad[1] else None, None, None, None, None, None


class _Doubled(torch.autograd.Function):
    """Rows and columns doubled by repetition, then a convolution of each frame with frozen weights, plus ``residual``.

    ``in_time``: the channels of a frame are those of two frames.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, in_time: bool, makes: bool
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.times = x.shape, 2 if in_time else 1
        batch, channels, frames, height, width = x.shape
        if not makes:
            return _hollow(x, (batch, len(weight), frames * ctx.times, 2 * height, 2 * width))
        x = (
            x.view(batch, ctx.times, channels // ctx.times, frames, height, width)
            .permute(0, 3, 1, 2, 4, 5)
            .flatten(0, 2)
        )
        x = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest-exact")
        out = torch.ops.aten.convolution(x, weight, bias, *_form(weight)).unflatten(0, (batch, -1)).transpose(1, 2)
        return out if residual is None else out.add_(residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        batch, channels, frames, height, width = ctx.shape
        shape = (batch * frames * ctx.times, weight.shape[1], 2 * height, 2 * width)
        d_x = _pulled_back(d_out.transpose(1, 2).flatten(0, 1), shape, weight)
        d_x = (
            d_x.unflatten(3, (width, 2)).unflatten(2, (height, 2)).sum((3, 5)).unflatten(0, (batch, frames, ctx.times))
        )
        return (
            d_x.permute(0, 2, 3, 1, 4, 5).reshape(ctx.shape),
            d_out if ctx.needs_input_grad[1] else None,
            None,
            None,
            None,
            None,
        )


def _form(weight: Tensor) -> tuple[Any, ...]:
    """What ``aten::convolution`` is told besides: rows and columns stay as many, frames become fewer."""
    kernel = weight.shape[2:]
    padding = [0 if i == len(kernel) - 3 else size // 2 for i, size in enumerate(kernel)]
    ones = [1] * len(kernel)
    return ones, padding, ones, False, [0] * len(kernel), 1


def _pulled_back(d: Tensor, shape: Any, weight: Tensor) -> Tensor:
    """The gradient at the input of a convolution, whose values do not matter."""
    hollow = _hollow(d, shape)
    return cast(
        "Tensor", torch.ops.aten.convolution_backward(d, hollow, weight, None, *_form(weight), (True, False, False))[0]
    )


def _hollow(like: Tensor, shape: Any) -> Tensor:
    """A tensor of this shape, without values, in one element of memory."""
    return like.new_zeros(()).expand(shape)
