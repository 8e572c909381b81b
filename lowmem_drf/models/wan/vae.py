"""The decoder of the Wan video VAE (2.1 and 2.2) as a list of segments: pure functions of one latent frame's
activations and of caches.

diffusers 0.42.1, ``WanDecoder3d.forward``, cut where a chunk's activations are one tensor (two inside a residual
up-block of Wan 2.2, whose shortcut leads around its residual blocks). The segments call diffusers' own modules, so that
values stay what diffusers makes of them, bit by bit; or, for a run with kernels, the same functions on less memory
(``wan_fused``), with these modules' weights.

Above the attention of the middle block a segment is a convolution or two: rows of its output depend on the same rows of
its input and of its caches, and on ``halo`` rows besides. ``wan_strips`` uses that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowmem_drf.models.wan import vae_fused as wan_fused
from lowmem_drf.models.wan.vae_fused import NormSilu, Wants

if TYPE_CHECKING:
    from torch import Tensor

Caches = tuple[Any, ...]
"""An entry per causal convolution with a cache: a tensor (B, C, 1 or 2, H, W), ``None`` (nothing yet) or the marker
``"Rep"`` (upsampling in time skips the first latent frame)."""


@dataclass(frozen=True)
class Segment:
    """A piece of the decoder. All its caches have the rows of its input."""

    module: nn.Module
    """Called with (x, its caches as a list that it writes into, first chunk?, shortcut or None, what is wanted)."""
    slots: int
    """Caches it reads and hands on."""
    channels: int | None = None
    """Of the output. ``None``: as many as the input has."""
    halo: int | None = None
    """Rows of the input on either side that rows of the output depend on. ``None``: on all of them."""
    row_scale: int = 1
    """Rows of the output per row of the input, and columns per column."""
    frame_scale: int = 1
    """Frames of the output per frame of the input, but for the first chunk, which has one."""
    opens_shortcut: bool = False
    """Its input is the shortcut too, that ends at the next segment with ``ends_shortcut``."""
    ends_shortcut: bool = False
    unread: Mapping[int, int] = field(default_factory=dict)
    """Caches whose values ``wan_strips.pull_back`` does not read, only their shape: by their place, their channels."""
    cheap: bool = False
    """Its output is better computed again than kept."""

    def __call__(
        self,
        x_BCTHW: Tensor,
        caches: Caches,
        first: bool,
        shortcut_BCTHW: Tensor | None = None,
        wants: Wants = Wants.ALL,
    ) -> tuple[Tensor, Caches]:
        """The output and the caches handed on, in the dtype of ``x_BCTHW``, in which the weights are cast for the call
        if they have another: they are small (the largest segment of Wan 2.1 has 8 million), and no second copy has to
        be kept or parked."""
        handed = list(caches)
        arguments = (x_BCTHW, handed, first, shortcut_BCTHW, wants)
        if all(weight.dtype == x_BCTHW.dtype for weight in self.module.parameters()):
            return self.module(*arguments), tuple(handed)
        weights = {name: weight.to(x_BCTHW.dtype) for name, weight in self.module.named_parameters()}
        return torch.func.functional_call(self.module, weights, arguments), tuple(handed)


def segments_of(decoder: Any, patch_size: int | None, norm_silu: NormSilu | None = None) -> tuple[Segment, ...]:
    """The segments of a ``WanDecoder3d``, in order.

    Args: patch_size: of the VAE's configuration. norm_silu: takes the place of the norms and the SiLU behind them, and
        ``wan_fused`` that of what stands around them. ``None``: diffusers' own modules, whose values stay what they are
        bit by bit.
    """

    def residual(block: Any, opens_shortcut: bool = False) -> Segment:
        channels = block.conv2.out_channels
        if norm_silu is None:
            return Segment(_Block(block, _with_caches), 2, channels, halo=2, opens_shortcut=opens_shortcut)
        module = wan_fused.Residual(block, norm_silu)
        return Segment(module, 2, channels, halo=2, opens_shortcut=opens_shortcut, unread={1: block.conv2.in_channels})

    def upsample(block: Any, shortcut: nn.Module | None, opens_next: bool) -> Segment:
        module = (_Upsample if norm_silu is None else wan_fused.Upsample)(block, shortcut)
        times, channels = (2 if block.mode == "upsample3d" else 1), block.resample[1].out_channels
        cheap = norm_silu is not None and not opens_next
        return Segment(
            module,
            times - 1,
            channels,
            1,
            row_scale=2,
            frame_scale=times,
            ends_shortcut=shortcut is not None,
            cheap=cheap,
        )

    middle, shortcuts = decoder.mid_block, [getattr(block, "avg_shortcut", None) for block in decoder.up_blocks]
    found = [
        Segment(_Block(decoder.conv_in, _cached), 1, decoder.conv_in.out_channels, halo=1),
        residual(middle.resnets[0]),
    ]
    for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
        found += [Segment(_Block(attention, lambda block, x, caches: block(x)), slots=0), residual(resnet)]
    for block, shortcut, following in zip(decoder.up_blocks, shortcuts, [*shortcuts[1:], None], strict=True):
        found += [residual(resnet, shortcut is not None and i == 0) for i, resnet in enumerate(block.resnets)]
        # Wan 2.1's block has a list of one, Wan 2.2's the module; the last block of either has None
        upsampler = block.upsampler if hasattr(block, "upsampler") else (block.upsamplers or [None])[0]
        if upsampler is not None:
            found.append(upsample(upsampler, shortcut, following is not None))
    patch = patch_size or 1
    found.append(
        Segment(
            _Head(decoder, patch_size, norm_silu), 1, decoder.conv_out.out_channels // patch**2, halo=1, row_scale=patch
        )
    )
    return tuple(found)


def _cached(conv: nn.Module, x: Tensor, caches: list[Any]) -> Tensor:
    """A causal convolution outside of a block, as ``WanDecoder3d.forward`` has it: the last two input frames are handed
    on."""
    entering = caches[0]
    last_two = x[:, :, -2:].clone()
    if last_two.shape[2] < 2 and entering is not None:
        last_two = torch.cat([entering[:, :, -1:], last_two], dim=2)
    caches[0] = last_two
    return conv(x, entering)


def _with_caches(block: nn.Module, x: Tensor, caches: list[Any]) -> Tensor:
    """A block of diffusers that reads its caches and writes what it hands on in their place."""
    return block(x, feat_cache=caches, feat_idx=[0])


class _Block(nn.Module):
    """One of diffusers' modules, called by ``run(module, x, caches)``.

    It needs neither the shortcut nor to know which chunk this is.
    """

    def __init__(self, block: nn.Module, run: Callable[[nn.Module, Tensor, list[Any]], Tensor]) -> None:
        super().__init__()
        self.block, self._run = block, run

    def forward(self, x: Tensor, caches: list[Any], first: bool, shortcut: Tensor | None, wants: Wants) -> Tensor:
        return self._run(self.block, x, caches)


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
        self.norm_silu = norm_silu
        self.norm, self.nonlinearity, self.conv, self.patch_size = (
            decoder.norm_out,
            decoder.nonlinearity,
            decoder.conv_out,
            patch_size,
        )

    def forward(self, x: Tensor, caches: list[Any], first: bool, shortcut: Tensor | None, wants: Wants) -> Tensor:
        """Pixels in [-1, 1]."""
        if self.norm_silu is None:
            x = _cached(self.conv, self.nonlinearity(self.norm(x)), caches)
        else:
            x, caches[0] = wan_fused.normed_and_convolved(
                x, self.norm, self.conv, caches[0], self.norm_silu, hands=wants is Wants.ALL
            )
        if self.patch_size is not None:
            from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

            x = unpatchify(x, patch_size=self.patch_size)
        return InwardClamp.apply(x, -1.0, 1.0)


class InwardClamp(torch.autograd.Function):
    """``x.clamp(low, high)``, whose gradient beyond a limit passes where a step of descent leads back, and is zero
    where it leads further out.

    With the clamp's own gradient, zero on either side, a pixel that is once too bright or too dark is lost to training:
    nothing ever asks it to come back. With the gradient of the identity, what the critic cannot see would be pushed
    ever further out. This is the rule of ``ClampWithGrad`` in K. Crowson's VQGAN+CLIP (2021). Where no value is beyond
    a limit it is the clamp's gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.low, ctx.high = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        outwards = ((x > ctx.high) & (d < 0)) | ((x < ctx.low) & (d > 0))
        return d.masked_fill(outwards, 0), None, None
