"""The VAE of Stable Diffusion 3 as a ``types.Decoder`` of clips of one frame.

Group norms and an attention see the whole picture, so no part of it can be decoded alone: tiles, which
``AutoencoderKL`` has too, are blended and make another picture. Memory is saved along the depth. The decoder is a row
of segments: a residual block, the attention, an upsampling, or the convolution at either end. The backward goes through
them last to first, and recomputes each from what entered it: one segment has its graph alive. A trace is what entered
each segment.

Arithmetic as in ``Decoder`` of diffusers 0.42.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from lowmem_drf.memory.host import Held, HostStore
from lowmem_drf.models.clamp import InwardClamp

if TYPE_CHECKING:
    from torch import Tensor, nn

Trace = tuple[Any, ...]
"""The input of each segment, on the card or the host."""
Segment = Callable[["Tensor"], "Tensor"]
"""(B, C, h, w) -> (B, C', h', w')."""


class SD3Decoder:
    """``types.Decoder`` for an ``AutoencoderKL``. Latents are the transformer's; frames are in [0, 1], in the VAE's
    dtype.

    Args:
        vae: ``decode`` and ``chunk`` run in its dtype.
        grad_dtype: dtype of ``chunk_backward`` and of the trace. ``None``: the VAE's.
        strips: not used.
        caches: ``"host"``: what enters the segments waits in host memory for the backward.
        store: the run's host memory.
        norm_silu: not used.
    """

    causal, group = False, 1
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
        self.vae = vae
        self.spatial_factor: int = 2 ** (len(vae.config.block_out_channels) - 1)
        self._grad_dtype, self._waits = grad_dtype or vae.dtype, caches == "host"
        self._host = store or HostStore(vae.device)
        self._segments = _segments_of(vae.decoder)

    def decode(self, latents_BC1hw: Tensor) -> Tensor:
        """(B, C, 1, h, w) -> (B, 1, 3, H, W) in [0, 1]; bitwise those of ``vae.decode``. Differentiable, as one
        graph."""
        return self._run(latents_BC1hw, self.vae.dtype)[0]

    def start(self, batch: int) -> tuple[Any, ...]:
        """There are no caches."""
        return ()

    def store(self, caches: tuple[Any, ...]) -> tuple[Any, ...]:
        return caches

    def chunk(self, latents_BC1hw: Tensor, caches: Sequence[Any]) -> tuple[Tensor, tuple[Any, ...]]:
        """As ``decode``."""
        return self.decode(latents_BC1hw), ()

    @torch.no_grad()
    def recorded_chunk(self, latents_BC1hw: Tensor, caches: Sequence[Any]) -> tuple[Tensor, tuple[Any, ...], Trace]:
        """As ``chunk`` without gradient, and the trace, on the host."""
        frames, trace = self._run(latents_BC1hw, self.vae.dtype, self._put)
        self._host.settle()
        return frames, (), trace

    @torch.no_grad()
    def advance(
        self, latents_BC1hw: Tensor, caches: Sequence[Any], keep: Literal["nothing", "trace", "last"]
    ) -> tuple[tuple[Any, ...], Trace | None]:
        """The trace, recomputed in the dtype of the gradient. On the host with ``caches = "host"``, or if its backward
        does not follow at once."""
        if keep == "nothing":
            return (), None
        put = self._put if self._waits or keep == "trace" else lambda x: x
        return (), self._run(latents_BC1hw, self._grad_dtype, put, to_the_end=False)[1]

    def chunk_backward(
        self,
        latents_BC1hw: Tensor,
        trace: Trace,
        local: Sequence[int],
        d_made_BTCHW: Tensor,
        d_handed: tuple[Any, ...],
        hands_back: bool,
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """The gradient at the latents (B, C, 1, h, w), from that at the frame, if ``local`` has it."""
        if not local:
            return torch.zeros_like(latents_BC1hw), ()
        z, inputs = latents_BC1hw.detach().requires_grad_(), [*trace]
        with torch.enable_grad():
            into = self._into(z, self._grad_dtype)
        d = d_made_BTCHW[:, 0].to(into.dtype)
        for segment in reversed(self._segments):
            leaf = _get(inputs.pop()).to(into.dtype).detach().requires_grad_()
            if inputs and isinstance(inputs[-1], Held):
                inputs[-1].prefetch()
            with torch.enable_grad():
                out = segment(leaf)
            (d,) = torch.autograd.grad(out, leaf, d)
            del out, leaf
        return torch.autograd.grad(into, z, d)[0], ()

    def _run(
        self,
        latents_BC1hw: Tensor,
        dtype: torch.dtype,
        put: Callable[[Tensor], Any] | None = None,
        to_the_end: bool = True,
    ) -> tuple[Tensor, Trace]:
        """Frames and trace. Without ``to_the_end`` the last segment is left out."""
        x, trace = self._into(latents_BC1hw, dtype), []
        for place, segment in enumerate(self._segments):
            if put is not None:
                trace.append(put(x))
            if to_the_end or place + 1 < len(self._segments):
                x = segment(x)
        return x[:, None], tuple(trace)

    def _into(self, latents_BC1hw: Tensor, dtype: torch.dtype) -> Tensor:
        """Undoes the normalisation, as ``StableDiffusion3Pipeline`` does."""
        config = self.vae.config
        return (latents_BC1hw[:, :, 0] / config.scaling_factor + config.shift_factor).to(dtype)

    def _put(self, x: Tensor) -> Any:
        """On the host, in the dtype of the gradient if that has fewer bytes."""
        fewer = self._grad_dtype.itemsize < x.dtype.itemsize
        return self._host.put(x.to(self._grad_dtype) if fewer else x)


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


def _get(value: Any) -> Tensor:
    made: Tensor = value.get() if isinstance(value, Held) else value
    return made
