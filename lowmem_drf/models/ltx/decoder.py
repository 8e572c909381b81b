"""The LTX-Video VAE as a ``types.Decoder``.

Its convolutions look ahead in time. A frame depends on more than ten latents to either side, as much as a clip of five
seconds has, so no part of a clip can be decoded alone: the whole clip is one chunk. A part is also what
``AutoencoderKLLTXVideo`` decodes with ``use_framewise_decoding``; it blends parts, and makes other frames.

Memory is saved inside the chunk. The decoder is a row of segments: a residual block, an upsampling, or the convolution
at either end. Each of them sees one or two frames to either side. So a segment runs in slices of frames, each with that
many frames more, and gives the same result. The backward goes through the segments last to first, and through the
slices of each: one slice of one segment has its graph alive. A trace is what entered each segment.

Arithmetic as in ``LTXVideoDecoder3d`` of diffusers 0.42.1. A VAE with ``timestep_conditioning`` decodes at a small
noise level, as the pipelines do: it mixes noise into the latents. That noise is the same for every clip (``_NOISE``),
so that a clip's frames are those of its latents alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from lowmem_drf.errors import BadInputError
from lowmem_drf.memory.host import Held, HostStore
from lowmem_drf.method.schedule import draw_noise
from lowmem_drf.models.clamp import InwardClamp

if TYPE_CHECKING:
    from torch import Tensor, nn

DECODE_TIMESTEP, DECODE_NOISE_SCALE = 0.05, 0.025
"""Of a VAE with ``timestep_conditioning``: docs/source/en/api/pipelines/ltx_video.md of diffusers."""
_NOISE = 0
"""Seed of the noise that is mixed into its latents."""
Trace = tuple[Any, ...]
"""The input of each segment, on the card or the host."""


@dataclass(frozen=True)
class Segment:
    """(B, C, F, h, w) -> the same frames, or twice as many but for the first."""

    run: Callable[[Tensor], Tensor]
    halo: int
    """Frames to either side that a frame depends on."""
    grows: bool = False

    def slices(self, frames: int, count: int) -> Iterator[tuple[slice, slice, slice]]:
        """(frames that enter, which of the frames made from them are valid, where these are in the whole result)."""
        ends = [frames * i // count for i in range(count + 1)]
        for a, b in zip(ends, ends[1:], strict=False):
            s, e = max(0, a - self.halo), min(frames, b + self.halo)
            low, high, start = (max(0, 2 * a - 1), 2 * b - 1, 2 * s) if self.grows else (a, b, s)
            yield slice(s, e), slice(low - start, high - start), slice(low, high)


class LTXDecoder:
    """``types.Decoder`` for an ``AutoencoderKLLTXVideo``. Latents are the transformer's; frames are in [0, 1], in the
    VAE's dtype.

    Args:
        vae: ``decode`` and ``chunk`` run in its dtype.
        grad_dtype: dtype of ``chunk_backward`` and of the trace. ``None``: the VAE's.
        strips: slices of frames in which the largest segments run, at most one for each frame; smaller ones in fewer.
            Frames and gradients are the same up to rounding.
        caches: ``"host"``: what enters the segments waits in host memory for the backward.
        store: the run's host memory.
        norm_silu: not used.

    Raises BadInputError: fewer than one strip.
    """

    causal, group = False, 1

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
        self.temporal_factor: int = vae.temporal_compression_ratio
        self.spatial_factor: int = vae.spatial_compression_ratio
        self._grad_dtype, self._strips, self._waits = grad_dtype or vae.dtype, strips, caches == "host"
        self._host = store or HostStore(vae.device)
        self._segments = _segments_of(vae.decoder)

    def decode(self, latents_BCFhw: Tensor) -> Tensor:
        """(B, C, F, h, w) -> (B, T, 3, H, W) in [0, 1]; with one strip bitwise those of ``vae.decode``. Differentiable,
        as one graph."""
        return self._run(latents_BCFhw, self.vae.dtype)[0]

    def start(self, batch: int) -> tuple[Any, ...]:
        """There are no caches."""
        return ()

    def store(self, caches: tuple[Any, ...]) -> tuple[Any, ...]:
        return caches

    def chunk(self, latents_BCFhw: Tensor, caches: Sequence[Any]) -> tuple[Tensor, tuple[Any, ...]]:
        """The whole clip, as ``decode``."""
        return self.decode(latents_BCFhw), ()

    @torch.no_grad()
    def recorded_chunk(self, latents_BCFhw: Tensor, caches: Sequence[Any]) -> tuple[Tensor, tuple[Any, ...], Trace]:
        """As ``chunk`` without gradient, and the trace, on the host."""
        frames, trace = self._run(latents_BCFhw, self.vae.dtype, self._put)
        self._host.settle()
        return frames, (), trace

    @torch.no_grad()
    def advance(
        self, latents_BCFhw: Tensor, caches: Sequence[Any], keep: Literal["nothing", "trace", "last"]
    ) -> tuple[tuple[Any, ...], Trace | None]:
        """The trace, recomputed in the dtype of the gradient. On the host with ``caches = "host"``, or if its backward
        does not follow at once."""
        if keep == "nothing":
            return (), None
        put = self._put if self._waits or keep == "trace" else lambda x: x
        return (), self._run(latents_BCFhw, self._grad_dtype, put, to_the_end=False)[1]

    def chunk_backward(
        self,
        latents_BCFhw: Tensor,
        trace: Trace,
        local: Sequence[int],
        d_made_BTCHW: Tensor,
        d_handed: tuple[Any, ...],
        hands_back: bool,
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """The gradient at the latents (B, C, F, h, w), from that at the frames ``local``."""
        z = latents_BCFhw.detach().requires_grad_()
        with torch.enable_grad():
            into = self._into(z, self._grad_dtype)
        inputs, largest = [*trace], self._largest(z)
        frames = (z.shape[2] - 1) * self.temporal_factor + 1
        d = d_made_BTCHW.new_zeros(len(z), d_made_BTCHW.shape[2], frames, *d_made_BTCHW.shape[3:], dtype=into.dtype)
        d[:, :, list(local)] = d_made_BTCHW.transpose(1, 2).to(into.dtype)
        for place in reversed(range(len(self._segments))):
            x = _get(inputs.pop()).to(into.dtype)
            if place and isinstance(inputs[-1], Held):
                inputs[-1].prefetch()
            d = _backward(self._segments[place], x, d, self._count(self._segments[place], x, largest))
            del x
        return torch.autograd.grad(into, z, d)[0], ()

    def _run(
        self,
        latents_BCFhw: Tensor,
        dtype: torch.dtype,
        put: Callable[[Tensor], Any] | None = None,
        to_the_end: bool = True,
    ) -> tuple[Tensor, Trace]:
        """Frames and trace. Without ``to_the_end`` the last segment is left out."""
        x, trace, largest = self._into(latents_BCFhw, dtype), [], self._largest(latents_BCFhw)
        for place, segment in enumerate(self._segments):
            if put is not None:
                trace.append(put(x))
            if to_the_end or place + 1 < len(self._segments):
                parts = list(segment.slices(x.shape[2], self._count(segment, x, largest)))
                made = [segment.run(x[:, :, entering])[:, :, valid] for entering, valid, _ in parts]
                x = made[0] if len(made) == 1 else torch.cat(made, dim=2)
                del made
        return x.transpose(1, 2), tuple(trace)

    def _count(self, segment: Segment, x_BCFhw: Tensor, largest: int) -> int:
        """Slices of a segment, so that none is larger than those of the largest."""
        size, frames = x_BCFhw.numel(), x_BCFhw.shape[2]
        if segment.grows:
            size = size // frames * (2 * frames - 1) * 4
        return min(frames, max(1, math.ceil(self._strips * size / largest)))

    def _largest(self, latents_BCFhw: Tensor) -> int:
        """Numbers in the result of the last residual block."""
        batch, _, frames, height, width = latents_BCFhw.shape
        side = self.spatial_factor // self.vae.config.patch_size
        frames = (frames - 1) * self.temporal_factor + 1
        channels: int = self.vae.decoder.conv_out.in_channels
        return batch * channels * frames * height * side * width * side

    def _into(self, latents_BCFhw: Tensor, dtype: torch.dtype) -> Tensor:
        """Undoes the normalisation, and mixes noise in, as ``LTXPipeline`` does."""
        mean, std = (x.view(1, -1, 1, 1, 1).to(latents_BCFhw) for x in (self.vae.latents_mean, self.vae.latents_std))
        z = latents_BCFhw * std / self.vae.config.scaling_factor + mean
        if self.vae.config.timestep_conditioning:
            noise = draw_noise(tuple(z.shape[1:]), [_NOISE]).to(z)
            z = (1 - DECODE_NOISE_SCALE) * z + DECODE_NOISE_SCALE * noise
        return z.to(dtype)

    def _put(self, x: Tensor) -> Any:
        """On the host, in the dtype of the gradient if that has fewer bytes."""
        fewer = self._grad_dtype.itemsize < x.dtype.itemsize
        return self._host.put(x.to(self._grad_dtype) if fewer else x)


def _backward(segment: Segment, x: Tensor, d_out: Tensor, count: int) -> Tensor:
    """The gradient at a segment's input, slice by slice."""
    d_x = torch.zeros_like(x) if count > 1 else None
    for entering, valid, made in segment.slices(x.shape[2], count):
        leaf = x[:, :, entering].detach().requires_grad_()
        with torch.enable_grad():
            out = segment.run(leaf)[:, :, valid]
        (d,) = torch.autograd.grad(out, leaf, d_out[:, :, made])
        del out
        if d_x is None:
            return d
        d_x[:, :, entering] += d
    assert d_x is not None
    return d_x


def _segments_of(decoder: Any) -> list[Segment]:
    """Of an ``LTXVideoDecoder3d``."""
    one = 2 if decoder.conv_in.is_causal else 1  # frames that a convolution sees; behind a frame, if it is causal
    found, scale = [Segment(partial(_call, decoder.conv_in), one)], decoder.timestep_scale_multiplier
    blocks = [decoder.mid_block, *decoder.up_blocks]
    for block in blocks:
        before, upsamplers = getattr(block, "conv_in", None), getattr(block, "upsamplers", None)
        at = None if scale is None else partial(_embedded, block.time_embedder, scale)
        found += [] if before is None else [Segment(partial(_call, before), 2 * one)]
        found += [Segment(partial(_call, upsampler), one, grows=True) for upsampler in upsamplers or ()]
        found += [Segment(partial(_call, resnet, at=at), 2 * one) for resnet in block.resnets]
    return [*found, Segment(partial(_pixels, decoder), one)]


def _call(module: nn.Module, *inputs: Any, at: Callable[[Tensor], Tensor] | None = None, **named: Any) -> Any:
    """With the module's weights in the dtype of the first input. ``at``: makes the second one of it."""
    x = inputs[0]
    weights = {name: weight.to(x.dtype) for name, weight in module.named_parameters()}
    return torch.func.functional_call(module, weights, inputs if at is None else (x, at(x)), named)


def _embedded(embedder: nn.Module, scale: Tensor, x_BCFhw: Tensor) -> Tensor:
    """A block's embedding of the timestep, (B, D, 1, 1, 1)."""
    batch, dtype = len(x_BCFhw), x_BCFhw.dtype
    timestep_B = torch.full((batch,), DECODE_TIMESTEP, dtype=dtype, device=x_BCFhw.device) * scale.to(dtype)
    made: Tensor = _call(embedder, timestep_B, resolution=None, aspect_ratio=None, batch_size=batch, hidden_dtype=dtype)
    return made[..., None, None, None]


def _pixels(decoder: Any, x_BCFhw: Tensor) -> Tensor:
    """The decoder's end: (B, 3, F, H, W) in [0, 1]."""
    x = decoder.norm_out(x_BCFhw.movedim(1, -1)).movedim(-1, 1)
    if decoder.time_embedder is not None:
        at_BDFhw = _embedded(decoder.time_embedder, decoder.timestep_scale_multiplier, x)
        table = decoder.scale_shift_table.to(x.dtype)[None, ..., None, None, None]
        shift, scale = (at_BDFhw.unflatten(1, (2, -1)) + table).unbind(1)
        x = x * (1 + scale) + shift
    x, side = _call(decoder.conv_out, decoder.conv_act(x)), decoder.patch_size
    x = x.unflatten(1, (-1, side, side)).permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)
    made: Tensor = InwardClamp.apply(x * 0.5 + 0.5, 0.0, 1.0)
    return made


def _get(value: Any) -> Tensor:
    made: Tensor = value.get() if isinstance(value, Held) else value
    return made
