"""The layers of CogVideoX's VAE decoder, whole or in strips of rows, and their backward.

Group norms take mean and variance of a whole chunk. In strips these are computed first; the backward of the strips sums
up their gradients, and adds to that of the input what comes through them. Frames and gradients are the same up to
rounding; in one strip the arithmetic is that of ``CogVideoXDecoder3D`` of diffusers 0.42.1.

Weights are frozen, and cast to the dtype of the input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

Maybe = Tensor | None
"""``None``: a cache at the beginning of a clip; a gradient that is zero."""


class Segment(Protocol):
    """A part of the decoder: (B, C, F, h, w) and the chunk's latents, which every norm takes, -> (B, D, G, H, W)."""

    @property
    def slots(self) -> int:
        """Caches that it takes and hands on: each the last two frames that entered a convolution, (B, C, 2, h, w)."""
        ...

    @property
    def channels(self) -> int:
        """The most that enter or leave it."""
        ...

    def run(self, x: Tensor, z: Tensor, caches: Sequence[Maybe], strips: int) -> tuple[Tensor, list[Tensor]]:
        """The result, and the caches handed on."""
        ...

    def backward(
        self, x: Tensor, z: Tensor, caches: Sequence[Maybe], d_out: Maybe, d_handed: Sequence[Maybe],
        strips: int,
    ) -> tuple[Tensor, Tensor, list[Maybe]]:  # fmt: skip
        """The gradients at ``x``, ``z`` and ``caches``, with one strip's graph at a time."""
        ...


@dataclass(frozen=True)
class NormConv:
    """Norm, SiLU and causal convolution. Without ``norm``: the convolution alone. ``end`` acts on its result."""

    conv: Any
    norm: Any = None
    end: Callable[[Tensor], Tensor] | None = None
    slots = 1

    @property
    def channels(self) -> int:
        return _channels(self.conv.conv)

    def run(self, x: Tensor, z: Tensor, caches: Sequence[Maybe], strips: int) -> tuple[Tensor, list[Tensor]]:
        strips = 1 if torch.is_grad_enabled() else strips  # the moments carry no gradient
        zq, (cache,) = self._spread(z, x), caches
        moments = self._moments(x, strips)
        whole: list[Tensor] = []
        for rows in _rows(x.shape[3], strips):
            made = self._rows(x, zq, cache, moments, rows)
            if strips == 1:
                return made[0], [made[1]]
            whole = whole or [one.new_empty(*one.shape[:3], x.shape[3], one.shape[4]) for one in made]
            for total, one in zip(whole, made, strict=True):
                total[:, :, :, rows] = one
        return whole[0], whole[1:]

    def backward(
        self, x: Tensor, z: Tensor, caches: Sequence[Maybe], d_out: Maybe, d_handed: Sequence[Maybe],
        strips: int,
    ) -> tuple[Tensor, Tensor, list[Maybe]]:  # fmt: skip
        (cache,), (d_cache_out,) = caches, d_handed
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            zq = self._spread(z, x)
        moments = self._moments(x, strips)
        d_x, d_zq = torch.zeros_like(x), torch.zeros_like(zq)
        d_cache = None if cache is None else torch.zeros_like(cache)
        d_moments = [torch.zeros_like(one) for one in moments]
        for rows in _rows(x.shape[3], strips):
            near = _halo(rows, x.shape[3])
            whole = [(x, d_x), (zq, d_zq), *([] if cache is None or d_cache is None else [(cache, d_cache)])]
            leaves = [one[:, :, :, near].detach().requires_grad_() for one, _ in whole]
            free = [one.detach().requires_grad_() for one in moments]
            with torch.enable_grad():
                out, handed = self._part(leaves[0], leaves[1], leaves[2] if leaves[2:] else None, free, rows, near)
            pairs = [(out, d_out), (handed, d_cache_out)]
            some = [(one, d[:, :, :, rows].to(one.dtype)) for one, d in pairs if d is not None]
            made, d_made = zip(*some, strict=True)
            d_leaves = torch.autograd.grad(made, [*leaves, *free], d_made, materialize_grads=True)
            del out, handed, pairs, some, made, d_made
            for (_, total), d in zip(whole, d_leaves, strict=False):
                total[:, :, :, near] += d
            for total, d in zip(d_moments, d_leaves[len(leaves) :], strict=True):
                total += d
            del d_leaves
        if moments:
            self._through_moments(x, moments, d_moments, d_x, strips)
        d_z = torch.autograd.grad(zq, z, d_zq)[0] if self.norm is not None else torch.zeros_like(z)
        return d_x, d_z, [d_cache]

    def _rows(
        self, x: Tensor, zq: Tensor, cache: Maybe, moments: Sequence[Tensor], rows: slice
    ) -> tuple[Tensor, Tensor]:
        near = _halo(rows, x.shape[3])
        before = None if cache is None else cache[:, :, :, near]
        return self._part(x[:, :, :, near], zq[:, :, :, near], before, moments, rows, near)

    def _part(
        self, x: Tensor, zq: Tensor, cache: Maybe, moments: Sequence[Tensor], rows: slice, near: slice
    ) -> tuple[Tensor, Tensor]:
        """Rows ``rows`` of the result and of the cache handed on, from rows ``near`` of what enters."""
        y = x if self.norm is None else F.silu(self._normed(x, zq, moments))
        y = torch.cat([y[:, :, :1], y[:, :, :1], y] if cache is None else [cache, y], dim=2)
        above, below = 1 - (rows.start - near.start), 1 - (near.stop - rows.stop)
        conv = self.conv.conv
        weight, bias = conv.weight.to(y.dtype), conv.bias.to(y.dtype)
        if above and below:
            out = F.conv3d(y, weight, bias, padding=(0, 1, 1))
        else:
            out = F.conv3d(F.pad(y, (0, 0, above, below)), weight, bias, padding=(0, 0, 1))
        handed = y[:, :, -2:, rows.start - near.start :][:, :, :, : rows.stop - rows.start].clone()
        return out if self.end is None else self.end(out), handed

    def _normed(self, x: Tensor, zq: Tensor, moments: Sequence[Tensor]) -> Tensor:
        own = self.norm.norm_layer
        weight, bias = own.weight.to(x.dtype), own.bias.to(x.dtype)
        if moments:
            mean, rstd = moments
            grouped = (x.to(mean.dtype).unflatten(1, (own.num_groups, -1)) - mean) * rstd
            side = (1, -1, 1, 1, 1)
            normed = (grouped.flatten(1, 2) * weight.view(side) + bias.view(side)).to(x.dtype)
        else:
            normed = F.group_norm(x, own.num_groups, weight, bias, own.eps)
        scale, shift = (
            F.conv3d(zq, one.conv.weight.to(x.dtype), one.conv.bias.to(x.dtype))
            for one in (self.norm.conv_y, self.norm.conv_b)
        )
        return normed * scale + shift

    def _spread(self, z: Tensor, x: Tensor) -> Tensor:
        """The latents at the places of ``x``. Of an odd number of frames, the first keeps to the first."""
        if self.norm is None:
            return z
        (frames, height, width) = x.shape[2:]
        if frames > 1 and frames % 2:
            first = F.interpolate(z[:, :, :1], size=(1, height, width))
            return torch.cat([first, F.interpolate(z[:, :, 1:], size=(frames - 1, height, width))], dim=2)
        return F.interpolate(z, size=(frames, height, width))

    @torch.no_grad()
    def _moments(self, x: Tensor, strips: int) -> list[Tensor]:
        """Mean and reciprocal deviation of each group, (B, groups, 1, 1, 1, 1), in fp32 or more. None for one strip:
        the norm takes them itself."""
        if self.norm is None or strips == 1:
            return []
        own = self.norm.norm_layer
        parts = [self._grouped(x[:, :, :, rows]) for rows in _rows(x.shape[3], strips)]
        count = x.numel() // (len(x) * own.num_groups)
        mean = sum(_total(part.to(_exact(x))) for part in parts) / count
        variance = sum(_total((part.to(_exact(x)) - mean).square()) for part in parts) / count
        return [mean, (variance + own.eps).rsqrt()]

    def _grouped(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.norm.norm_layer.num_groups, -1))

    @torch.no_grad()
    def _through_moments(
        self, x: Tensor, moments: Sequence[Tensor], d_moments: Sequence[Tensor], d_x: Tensor, strips: int
    ) -> None:
        """Adds to ``d_x`` what comes through mean and deviation."""
        (mean, rstd), (d_mean, d_rstd) = moments, d_moments
        count = x.numel() // (len(x) * self.norm.norm_layer.num_groups)
        for rows in _rows(x.shape[3], strips):
            away = self._grouped(x[:, :, :, rows]).to(mean.dtype) - mean
            d = (d_mean - d_rstd * rstd**3 * away) / count
            d_x[:, :, :, rows] += d.flatten(1, 2).to(d_x.dtype)


@dataclass(frozen=True)
class Residual:
    """A residual block. Its middle is recomputed in the backward."""

    block: Any
    slots = 2

    @property
    def channels(self) -> int:
        return max(self.block.in_channels, self.block.out_channels)

    def run(self, x: Tensor, z: Tensor, caches: Sequence[Maybe], strips: int) -> tuple[Tensor, list[Tensor]]:
        first, second = self._halves()
        middle, one = first.run(x, z, caches[:1], strips)
        out, other = second.run(middle, z, caches[1:], strips)
        del middle
        if strips == 1 or torch.is_grad_enabled():
            return out + self._shortcut(x), [*one, *other]
        for rows in _rows(out.shape[3], strips):
            out[:, :, :, rows] += self._shortcut(x[:, :, :, rows])
        return out, [*one, *other]

    def backward(
        self, x: Tensor, z: Tensor, caches: Sequence[Maybe], d_out: Maybe, d_handed: Sequence[Maybe],
        strips: int,
    ) -> tuple[Tensor, Tensor, list[Maybe]]:  # fmt: skip
        first, second = self._halves()
        with torch.no_grad():
            middle = first.run(x, z, caches[:1], strips)[0]
        d_middle, d_z, d_second = second.backward(middle, z, caches[1:], d_out, d_handed[1:], strips)
        del middle
        d_x, d_z_first, d_first = first.backward(x, z, caches[:1], d_middle, d_handed[:1], strips)
        del d_middle
        conv = self._projection
        for rows in _rows(x.shape[3], strips):
            if d_out is None:
                break
            d = d_out[:, :, :, rows]
            d_x[:, :, :, rows] += d if conv is None else F.conv3d(d, conv.weight.to(d.dtype).transpose(0, 1))
        return d_x, d_z + d_z_first, [*d_first, *d_second]

    def _halves(self) -> tuple[NormConv, NormConv]:
        return NormConv(self.block.conv1, self.block.norm1), NormConv(self.block.conv2, self.block.norm2)

    @property
    def _projection(self) -> Any:
        return getattr(self.block, "conv_shortcut", None)

    def _shortcut(self, x: Tensor) -> Tensor:
        conv = self._projection
        return x if conv is None else F.conv3d(x, conv.weight.to(x.dtype), conv.bias.to(x.dtype))


@dataclass(frozen=True)
class Upsample:
    """Twice as many rows and columns; with ``grows`` twice as many frames, but for the first of an odd number. It is
    linear. Frames that the library makes twice are made once, and repeated."""

    module: Any
    slots = 0

    @property
    def channels(self) -> int:
        return _channels(self.module.conv)

    def run(self, x: Tensor, z: Tensor, caches: Sequence[Maybe], strips: int) -> tuple[Tensor, list[Tensor]]:
        made = [[self._frame(x[:, :, frame])] * count for frame, count in enumerate(self.counts(x.shape[2]))]
        return torch.stack([one for copies in made for one in copies], dim=2), []

    def backward(
        self, x: Tensor, z: Tensor, caches: Sequence[Maybe], d_out: Maybe, d_handed: Sequence[Maybe],
        strips: int,
    ) -> tuple[Tensor, Tensor, list[Maybe]]:  # fmt: skip
        assert d_out is not None
        d_x, start = torch.empty_like(x), 0
        for frame, count in enumerate(self.counts(x.shape[2])):
            leaf = x[:, :, frame].detach().requires_grad_()
            with torch.enable_grad():
                made = self._frame(leaf)
            d_x[:, :, frame] = torch.autograd.grad(made, leaf, d_out[:, :, start : start + count].sum(dim=2))[0]
            start += count
        return d_x, torch.zeros_like(z), []

    def _frame(self, x_BChw: Tensor) -> Tensor:
        conv = self.module.conv
        x, weight, bias = F.interpolate(x_BChw, scale_factor=2.0), conv.weight.to(x_BChw.dtype), conv.bias
        return F.conv2d(x, weight, bias.to(x.dtype), padding=conv.padding)

    def counts(self, frames: int) -> list[int]:
        """How often each frame is in the result."""
        if not self.module.compress_time:
            return [1] * frames
        return [1] * (frames % 2) + [2] * (frames - frames % 2)


def _channels(conv: Any) -> int:
    return max(conv.in_channels, conv.out_channels)


def _rows(height: int, strips: int) -> Iterator[slice]:
    ends = [height * i // strips for i in range(strips + 1)]
    yield from (slice(a, b) for a, b in zip(ends, ends[1:], strict=False))


def _halo(rows: slice, height: int) -> slice:
    """The rows that a convolution to ``rows`` takes."""
    return slice(max(0, rows.start - 1), min(height, rows.stop + 1))


def _total(x: Tensor) -> Tensor:
    return x.sum(dim=(2, 3, 4, 5), keepdim=True)


def _exact(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
