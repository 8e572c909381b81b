"""The VAE of Stable Diffusion 3 as a ``types.Decoder`` of clips of one frame.

Group norms and an attention see the whole picture, so no part of it can be decoded alone: tiles, which
``AutoencoderKL`` has too, are blended and make another picture. A segment (``whole_clip.py``) is a residual block, the
attention, an upsampling, or the convolution at either end.

Arithmetic as in ``Decoder`` of diffusers 0.42.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from lowmem_drf.memory.host import HostStore
from lowmem_drf.models.clamp import InwardClamp
from lowmem_drf.models.whole_clip import WholeClipDecoder

if TYPE_CHECKING:
    from torch import Tensor, nn

Segment = Callable[["Tensor"], "Tensor"]
"""(B, C, h, w) -> (B, C', h', w')."""


class SD3Decoder(WholeClipDecoder[Segment]):
    """``types.Decoder`` for an ``AutoencoderKL``.

    Args:
        vae, grad_dtype, caches, store: as in ``WholeClipDecoder``.
        strips, norm_silu: not used.
    """

    temporal_factor = 1

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
        super().__init__(vae, _segments_of(vae.decoder), grad_dtype, caches, store)
        self.spatial_factor: int = 2 ** (len(vae.config.block_out_channels) - 1)

    def _through(self, segment: Segment, x: Tensor, latents_BC1hw: Tensor) -> Tensor:
        return segment(x)

    def _back_through(self, segment: Segment, x: Tensor, d_out: Tensor, latents_BC1hw: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            out = segment(leaf)
        return torch.autograd.grad(out, leaf, d_out)[0]

    def _as_frames(self, made: Tensor) -> Tensor:
        return made[:, None]

    def _d_made(self, latents_BC1hw: Tensor, local: Sequence[int], d_made_B1CHW: Tensor, dtype: torch.dtype) -> Tensor:
        return d_made_B1CHW[:, 0].to(dtype)

    def _into(self, latents_BC1hw: Tensor, dtype: torch.dtype) -> Tensor:
        """Undoes the normalisation, as ``StableDiffusion3Pipeline`` does."""
        config = self.vae.config
        return (latents_BC1hw[:, :, 0] / config.scaling_factor + config.shift_factor).to(dtype)


def _segments_of(decoder: Any) -> list[Segment]:
    """Of a ``Decoder``."""
    middle = decoder.mid_block
    modules = [decoder.conv_in, middle.resnets[0]]
    for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
        modules += [resnet] if attention is None else [attention, resnet]
    for block in decoder.up_blocks:
        modules += [*block.resnets, *(block.upsamplers or ())]
    return [*(partial(_call, module) for module in modules), partial(_pixels, decoder)]


def _call(module: nn.Module, x: Tensor) -> Tensor:
    """With the module's weights in the dtype of ``x``."""
    weights = {name: weight.to(x.dtype) for name, weight in module.named_parameters()}
    more = (None,) if hasattr(module, "time_emb_proj") else ()  # a residual block asks for a time
    made: Tensor = torch.func.functional_call(module, weights, (x, *more))
    return made


def _pixels(decoder: Any, x_BChw: Tensor) -> Tensor:
    """The decoder's end: (B, 3, H, W) in [0, 1]."""
    x = _call(decoder.conv_out, decoder.conv_act(_call(decoder.conv_norm_out, x_BChw)))
    made: Tensor = InwardClamp.apply(x * 0.5 + 0.5, 0.0, 1.0)
    return made
