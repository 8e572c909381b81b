"""The LTX-Video VAE as a ``types.Decoder``.

Its convolutions look ahead in time. A frame depends on more than ten latents to either side, as much as a clip of five
seconds has, so no part of a clip can be decoded alone: the whole clip is one chunk. A part is also what
``AutoencoderKLLTXVideo`` decodes with ``use_framewise_decoding``; it blends parts, and makes other frames.

Memory is saved inside the chunk. A segment (``whole_clip.py``) is a residual block, an upsampling, or the convolution
at either end. Each of them sees one or two frames to either side. So it runs in slices of frames, each with that many
frames more, and gives the same result; in the backward one slice of one segment has its graph alive.

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
from lowmem_drf.memory.host import HostStore
from lowmem_drf.method.schedule import draw_noise
from lowmem_drf.models.clamp import InwardClamp
from lowmem_drf.models.whole_clip import WholeClipDecoder

if TYPE_CHECKING:
    from torch import Tensor, nn

DECODE_TIMESTEP, DECODE_NOISE_SCALE = 0.05, 0.025
"""Of a VAE with ``timestep_conditioning``: docs/source/en/api/pipelines/ltx_video.md of diffusers."""
_NOISE = 0
"""Seed of the noise that is mixed into its latents."""


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


class LTXDecoder(WholeClipDecoder[Segment]):
    """``types.Decoder`` for an ``AutoencoderKLLTXVideo``.

    Args:
        vae, grad_dtype, caches, store: as in ``WholeClipDecoder``.
        strips: slices of frames in which the largest segments run, at most one for each frame; smaller ones in fewer.
            Frames and gradients are the same up to rounding.
        norm_silu: not used.

    Raises BadInputError: fewer than one strip.
    """

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
        super().__init__(vae, _segments_of(vae.decoder), grad_dtype, caches, store)
        self.temporal_factor: int = vae.temporal_compression_ratio
        self.spatial_factor: int = vae.spatial_compression_ratio
        self._strips = strips

    def _through(self, segment: Segment, x: Tensor, latents_BCFhw: Tensor) -> Tensor:
        parts = list(segment.slices(x.shape[2], self._count(segment, x, self._largest(latents_BCFhw))))
        made = [segment.run(x[:, :, entering])[:, :, valid] for entering, valid, _ in parts]
        return made[0] if len(made) == 1 else torch.cat(made, dim=2)

    def _back_through(self, segment: Segment, x: Tensor, d_out: Tensor, latents_BCFhw: Tensor) -> Tensor:
        return _backward(segment, x, d_out, self._count(segment, x, self._largest(latents_BCFhw)))

    def _as_frames(self, made: Tensor) -> Tensor:
        return made.transpose(1, 2)

    def _d_made(self, latents_BCFhw: Tensor, local: Sequence[int], d_made_BTCHW: Tensor, dtype: torch.dtype) -> Tensor:
        frames = (latents_BCFhw.shape[2] - 1) * self.temporal_factor + 1
        batch, _, colors, *size = d_made_BTCHW.shape
        d = d_made_BTCHW.new_zeros(batch, colors, frames, *size, dtype=dtype)
        d[:, :, list(local)] = d_made_BTCHW.transpose(1, 2).to(dtype)
        return d

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
