"""The CogVideoX VAE as a ``types.Decoder``.

Its group norms take the statistics of all frames that are decoded together: two latent frames, as it was trained, and
three at the beginning of a clip. So a chunk is these, and no part of it can be decoded alone. Between chunks pass the
last two frames that entered each causal convolution.

A chunk is a row of segments: a residual block, an upsampling, or the end on either side (``strips.py``). Its trace is
what entered each segment, and its caches. The backward goes through the segments last to first; the graph of one strip
of rows of one half of a residual block is alive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

import torch

from lowmem_drf.errors import BadInputError
from lowmem_drf.memory.host import Held, HostStore
from lowmem_drf.method.frames import latents_of_chunk
from lowmem_drf.models.clamp import InwardClamp
from lowmem_drf.models.cogvideox.strips import NormConv, Residual, Segment, Upsample

if TYPE_CHECKING:
    from torch import Tensor

Caches = tuple[Any, ...]


@dataclass
class Trace:
    """What a chunk's backward needs of its forward, on the card or the host. The backward empties it on the way."""

    first: bool
    """Whether the chunk begins a clip."""
    inputs: list[Any] = field(default_factory=list)
    """Of each segment."""
    caches: list[Any] = field(default_factory=list)
    """That entered."""


class CogVideoXDecoder:
    """``types.Decoder`` for an ``AutoencoderKLCogVideoX``. Latents are the transformer's; frames are in [0, 1], in the
    VAE's dtype.

    Args:
        vae: ``decode`` and ``chunk`` run in its dtype.
        grad_dtype: dtype of ``chunk_backward``, of the trace and of stored caches. ``None``: the VAE's.
        strips: strips of rows in which the largest segments run; smaller ones in fewer. Frames and gradients are the
            same up to rounding.
        caches: ``"host"``: the caches, and in a backward what entered the segments and the gradients of the caches,
            wait in host memory between uses.
        store: the run's host memory.
        norm_silu: not used.

    Raises BadInputError: fewer than one strip.
    """

    causal, group = True, 2

    def __init__(
        self,
        vae: Any,
        *,
        grad_dtype: torch.dtype | None = None,
        strips: int = 1,
        caches: Literal["card", "host"] = "card",
        store: HostStore | None = None,
        norm_silu: Any = None,
    ) -> None:
        if strips < 1:
            raise BadInputError(f"memory.vae_strips is {strips}: it must be 1 or more")
        self.vae = vae
        self.temporal_factor: int = vae.config.temporal_compression_ratio
        self.spatial_factor: int = 2 ** (len(vae.config.block_out_channels) - 1)
        self._grad_dtype, self._strips, self._waits = grad_dtype or vae.dtype, strips, caches == "host"
        self._host = store or HostStore(vae.device)
        self._segments = _segments_of(vae.decoder)
        ends = list(accumulate(segment.slots for segment in self._segments))
        self._slots = [slice(end - one.slots, end) for one, end in zip(self._segments, ends, strict=True)]

    def decode(self, latents_BCFhw: Tensor) -> Tensor:
        """(B, C, F, h, w) -> (B, T, 3, H, W) in [0, 1]; with one strip bitwise those of ``vae.decode``. Differentiable,
        as one graph. F is odd."""
        caches, made = self.start(len(latents_BCFhw)), []
        for chunk in range(max(1, latents_BCFhw.shape[2] // self.group)):
            frames, caches = self.chunk(latents_BCFhw[:, :, latents_of_chunk(chunk, self.group)], caches)
            made.append(frames)
        return torch.cat(made, dim=1)

    def start(self, batch: int) -> Caches:
        """None at the beginning of a clip, for any ``batch``."""
        return (None,) * self._slots[-1].stop

    def store(self, caches: Caches) -> Caches:
        """On the host, in the dtype of the gradient."""
        copies = tuple(map(self._put, caches))
        self._host.settle()
        return copies

    def chunk(self, latents_BCFhw: Tensor, caches: Sequence[Any]) -> tuple[Tensor, Caches]:
        """See ``types.Decoder``."""
        return self._run(self._into(latents_BCFhw, self.vae.dtype), caches)

    @torch.no_grad()
    def recorded_chunk(self, latents_BCFhw: Tensor, caches: Sequence[Any]) -> tuple[Tensor, Caches, Trace]:
        """As ``chunk`` without gradient, and the trace, on the host."""
        trace = Trace(_is_first(caches), caches=[*map(self._put, caches)])
        z = self._into(latents_BCFhw, self.vae.dtype)
        frames, handed = self._run(z, caches, lambda x: trace.inputs.append(self._put(x)))
        self._host.settle()
        return frames, handed, trace

    @torch.no_grad()
    def advance(
        self, latents_BCFhw: Tensor, caches: Sequence[Any], keep: Literal["nothing", "trace", "last"]
    ) -> tuple[Caches, Trace | None]:
        """See ``types.Decoder``. The trace is on the host with ``caches = "host"``, or if its backward does not follow
        at once."""
        z = self._into(latents_BCFhw, self._grad_dtype)
        if keep == "nothing":
            return self._run(z, caches)[1], None
        put = self._put if self._waits or keep == "trace" else lambda x: x
        trace = Trace(_is_first(caches), caches=[*map(put, caches)])
        handed = self._run(z, caches, lambda x: trace.inputs.append(put(x)), to_the_end=keep == "trace")[1]
        return () if keep == "last" else handed, trace

    def chunk_backward(
        self,
        latents_BCFhw: Tensor,
        trace: Trace,
        local: Sequence[int],
        d_made_BTCHW: Tensor,
        d_handed: Caches,
        hands_back: bool,
    ) -> tuple[Tensor, Caches]:
        """See ``types.Decoder``."""
        leaf = latents_BCFhw.detach().requires_grad_()
        with torch.enable_grad():
            z = self._into(leaf, self._grad_dtype)
        strips, count = self._counts(z), len(trace.caches)
        d_handed, d_caches = d_handed or (None,) * count, [None] * count
        d_x, d_z = self._d_frames(z, trace.first, local, d_made_BTCHW), torch.zeros_like(z)
        for place in reversed(range(len(self._segments))):
            x, slots = self._back(trace.inputs.pop()), self._slots[place]
            entering, ahead = [*map(self._back, trace.caches[slots])], [*map(self._back, d_handed[slots])]
            trace.caches[slots] = [None] * len(entering)
            if place and isinstance(trace.inputs[-1], Held):
                trace.inputs[-1].prefetch()
            if d_x is None and all(d is None for d in ahead):
                continue
            d_x, d, made = self._segments[place].backward(x, z.detach(), entering, d_x, ahead, strips[place])
            d_z += d
            if hands_back:
                d_caches[slots] = [*map(self._wait, made, d_handed[slots])]
            del x, d, entering, ahead, made
        if d_x is not None:
            d_z += d_x
        return torch.autograd.grad(z, leaf, d_z)[0], tuple(d_caches) if hands_back else ()

    def _d_frames(self, z: Tensor, first: bool, local: Sequence[int], d_made_BTCHW: Tensor) -> Tensor | None:
        """The gradient at all frames of the chunk, (B, 3, T, H, W)."""
        if not len(local):
            return None
        frames = (z.shape[2] - first) * self.temporal_factor + first
        d = d_made_BTCHW.new_zeros(len(z), d_made_BTCHW.shape[2], frames, *d_made_BTCHW.shape[3:], dtype=z.dtype)
        d[:, :, list(local)] = d_made_BTCHW.transpose(1, 2).to(z.dtype)
        return d

    def _run(
        self, z: Tensor, caches: Sequence[Any], trace: Callable[[Tensor], None] | None = None, to_the_end: bool = True
    ) -> tuple[Tensor, Caches]:
        """Frames (B, T, 3, H, W) and the caches handed on. Without ``to_the_end`` the last segment is left out.
        ``trace`` is called with what enters each segment."""
        x, handed, left = z, [], caches if isinstance(caches, list) else [*caches]
        strips = self._counts(z)
        for place, segment in enumerate(self._segments):
            entering = [_as(left.pop(0), z.dtype) for _ in range(segment.slots)]
            if trace is not None:
                trace(x)
            if to_the_end or place + 1 < len(self._segments):
                x, made = segment.run(x, z, entering, strips[place])
                handed += [self._host.put(one) if self._waits and not one.requires_grad else one for one in made]
        return x.transpose(1, 2), tuple(handed)

    def _counts(self, z: Tensor) -> list[int]:
        """Strips of each segment, so that none is larger than those of the largest."""
        frames, height, sizes, heights = z.shape[2], z.shape[3], [], []
        for segment in self._segments:
            if isinstance(segment, Upsample):
                frames, height = sum(segment.counts(frames)), 2 * height
            heights.append(height)
            sizes.append(segment.channels * frames * height**2)
        return [
            min(rows, max(1, math.ceil(self._strips * size / max(sizes))))
            for size, rows in zip(sizes, heights, strict=True)
        ]

    def _into(self, latents_BCFhw: Tensor, dtype: torch.dtype) -> Tensor:
        """Undoes the scaling, as ``CogVideoXPipeline`` does."""
        return 1 / self.vae.config.scaling_factor * latents_BCFhw.to(dtype)

    def _put(self, value: Any) -> Any:
        """A tensor on the host, in the dtype of the gradient if that has fewer bytes."""
        if not isinstance(value, torch.Tensor):
            return value
        fewer = self._grad_dtype.itemsize < value.dtype.itemsize
        return self._host.put(value.to(self._grad_dtype) if fewer else value)

    def _wait(self, d: Any, before: Any) -> Any:
        """The gradient at a cache until the next backward: on the host, or in the memory of the one before it."""
        if d is None or self._waits:
            return self._put(d)
        return d if before is None else before.copy_(d)

    def _back(self, value: Any) -> Any:
        """In the dtype of the gradient."""
        return _as(value, self._grad_dtype)


def _segments_of(decoder: Any) -> list[Segment]:
    """Of a ``CogVideoXDecoder3D``."""
    found: list[Segment] = [NormConv(decoder.conv_in)]
    for block in (decoder.mid_block, *decoder.up_blocks):
        found += [Residual(resnet) for resnet in block.resnets]
        found += [Upsample(upsampler) for upsampler in getattr(block, "upsamplers", None) or ()]
    return [*found, NormConv(decoder.conv_out, decoder.norm_out, _pixels)]


def _pixels(x: Tensor) -> Tensor:
    made: Tensor = InwardClamp.apply(x * 0.5 + 0.5, 0.0, 1.0)
    return made


def _is_first(caches: Sequence[Any]) -> bool:
    return all(cache is None for cache in caches)


def _as(value: Any, dtype: torch.dtype) -> Any:
    value = value.get() if isinstance(value, Held) else value
    return value.to(dtype) if isinstance(value, torch.Tensor) else value
