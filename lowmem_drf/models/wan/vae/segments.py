"""The decoder of the Wan video VAE (2.1 and 2.2) as a list of segments: pure functions of one latent frame's
activations and of caches.

``WanDecoder3d.forward`` of diffusers 0.42.1, cut where a chunk's activations are one tensor (two inside a residual
up-block of Wan 2.2, because of the shortcut around it). The segments call diffusers' modules, so values are bitwise the
same. For a run with kernels, ``fused`` computes the same functions from these modules' weights in less memory.

After the attention of the middle block a segment is one or two convolutions: rows of its output depend on the same rows
of its input and caches, plus ``halo`` rows on either side. ``strips`` uses that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowmem_drf.models.clamp import InwardClamp
from lowmem_drf.models.wan.vae import fused
from lowmem_drf.models.wan.vae.fused import NormSilu, Wants

if TYPE_CHECKING:
    from torch import Tensor

Caches = tuple[Any, ...]
"""One entry per causal convolution with a cache: a tensor (B, C, 1 or 2, H, W), ``None`` (nothing yet) or the marker
``"Rep"`` (upsampling in time skips the first latent frame)."""


@dataclass(frozen=True)
class Segment:
    """A piece of the decoder. Its caches have the rows of its input."""

    module: nn.Module
    """Called with (x, the caches as a list to write into, first chunk?, shortcut or None, wants)."""
    slots: int
    """Number of caches it reads and hands on."""
    channels: int | None = None
    """Of the output. ``None``: those of the input."""
    halo: int | None = None
    """Rows of the input on either side that rows of the output depend on. ``None``: all."""
    row_scale: int = 1
    """Output rows per input row, and columns per column."""
    frame_scale: int = 1
    """Output frames per input frame; 1 in the first chunk."""
    opens_shortcut: bool = False
    """Its input is also the shortcut, which ends at the next segment with ``ends_shortcut``."""
    ends_shortcut: bool = False
    shape_only: Mapping[int, int] = field(default_factory=dict)
    """Slot -> channels of the caches of which ``strips.segment_backward`` reads only the shape."""
    cheap: bool = False
    """Its output is cheaper to recompute than to keep."""

    def __call__(
        self,
        x_BCTHW: Tensor,
        caches: Caches,
        first: bool,
        shortcut_BCTHW: Tensor | None = None,
        wants: Wants = Wants.ALL,
    ) -> tuple[Tensor, Caches]:
        """The output and the caches handed on, in the dtype of ``x_BCTHW``. Weights of another dtype are cast for the
        call: they are small (at most 8 million per segment in Wan 2.1), and a second copy would have to be kept and
        parked."""
        handed = list(caches)
        arguments = (x_BCTHW, handed, first, shortcut_BCTHW, wants)
        if all(weight.dtype == x_BCTHW.dtype for weight in self.module.parameters()):
            return self.module(*arguments), tuple(handed)
        weights = {name: weight.to(x_BCTHW.dtype) for name, weight in self.module.named_parameters()}
        return torch.func.functional_call(self.module, weights, arguments), tuple(handed)


def segments_of(decoder: Any, patch_size: int | None, norm_silu: NormSilu | None = None) -> tuple[Segment, ...]:
    """The segments of a ``WanDecoder3d``, in order.

    Args:
        patch_size: from the VAE's configuration.
        norm_silu: replaces the norms with their SiLU, and ``fused`` the layers around them. ``None``: diffusers'
            modules, bitwise.
    """

    def residual(block: Any, opens_shortcut: bool = False) -> Segment:
        channels = block.conv2.out_channels
        if norm_silu is None:
            return Segment(_Plain(block, _with_caches), 2, channels, halo=2, opens_shortcut=opens_shortcut)
        module, shape_only = fused.Residual(block, norm_silu), {1: block.conv2.in_channels}
        return Segment(module, 2, channels, halo=2, opens_shortcut=opens_shortcut, shape_only=shape_only)

    def upsample(block: Any, shortcut: nn.Module | None, opens_next: bool) -> Segment:
        module = (_Upsample if norm_silu is None else fused.Upsample)(block, shortcut)
        times, channels = (2 if block.mode == "upsample3d" else 1), block.resample[1].out_channels
        ends, cheap = shortcut is not None, norm_silu is not None and not opens_next
        return Segment(module, times - 1, channels, 1, 2, frame_scale=times, ends_shortcut=ends, cheap=cheap)

    middle, shortcuts = decoder.mid_block, [getattr(block, "avg_shortcut", None) for block in decoder.up_blocks]
    found = [
        Segment(_Plain(decoder.conv_in, _cached), 1, decoder.conv_in.out_channels, halo=1),
        residual(middle.resnets[0]),
    ]
    for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
        found += [Segment(_Plain(attention, lambda block, x, caches: block(x)), slots=0), residual(resnet)]
    for block, shortcut, following in zip(decoder.up_blocks, shortcuts, [*shortcuts[1:], None], strict=True):
        found += [residual(resnet, shortcut is not None and i == 0) for i, resnet in enumerate(block.resnets)]
        # in Wan 2.1 a list of one module, in Wan 2.2 the module; None in the last block of either
        upsampler = block.upsampler if hasattr(block, "upsampler") else (block.upsamplers or [None])[0]
        if upsampler is not None:
            found.append(upsample(upsampler, shortcut, following is not None))
    head, patch = _Head(decoder, patch_size, norm_silu), patch_size or 1
    channels = decoder.conv_out.out_channels // patch**2
    return (*found, Segment(head, 1, channels, halo=1, row_scale=patch))


def _cached(conv: Any, x: Tensor, caches: list[Any]) -> Tensor:
    """A causal convolution outside of a block, as in ``WanDecoder3d.forward``: hands on its last two input frames."""
    entering = caches[0]
    last_two = x[:, :, -2:].clone()
    if last_two.shape[2] < 2 and entering is not None:
        last_two = torch.cat([entering[:, :, -1:], last_two], dim=2)
    caches[0] = last_two
    result: Tensor = conv(x, entering)
    return result


class _Plain(nn.Module):
    """One of diffusers' modules without a shortcut around it: ``call(module, x, caches)``."""

    def __init__(self, module: nn.Module, call: Callable[[Any, Tensor, list[Any]], Tensor]) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x: Tensor, caches: list[Any], first: bool, shortcut: Tensor | None, wants: Wants) -> Tensor:
        return self.call(self.module, x, caches)


def _with_caches(block: Any, x: Tensor, caches: list[Any]) -> Tensor:
    result: Tensor = block(x, feat_cache=caches, feat_idx=[0])
    return result


class _Upsample(nn.Module):
    def __init__(self, resample: nn.Module, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.resample, self.shortcut = resample, shortcut

    def forward(self, x: Tensor, caches: list[Any], first: bool, shortcut: Tensor | None, wants: Wants) -> Tensor:
        x = _with_caches(self.resample, x, caches)
        return x if self.shortcut is None else x + self.shortcut(shortcut, first_chunk=first)


class _Head(nn.Module):
    def __init__(self, decoder: Any, patch_size: int | None, norm_silu: NormSilu | None) -> None:
        super().__init__()
        self.norm_silu, self.patch_size = norm_silu, patch_size
        self.norm, self.nonlinearity, self.conv = decoder.norm_out, decoder.nonlinearity, decoder.conv_out

    def forward(self, x: Tensor, caches: list[Any], first: bool, shortcut: Tensor | None, wants: Wants) -> Tensor:
        """Pixels in [-1, 1]."""
        if self.norm_silu is None:
            x = _cached(self.conv, self.nonlinearity(self.norm(x)), caches)
        else:
            hands = wants is Wants.ALL
            x, caches[0] = fused.normed_and_convolved(x, self.norm, self.conv, caches[0], self.norm_silu, hands=hands)
        if self.patch_size is not None:
            from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

            x = unpatchify(x, patch_size=self.patch_size)
        return InwardClamp.apply(x, -1.0, 1.0)
