"""The Wan video VAE as a ``types.Decoder``: whole, or one latent frame at a time with its caches as values.

diffusers 0.42.1, ``AutoencoderKLWan._decode``, already decodes one latent frame at a time; between chunks it keeps, in a mutable list, the
last two input frames of every causal convolution. Here that list is an argument and a result, so that any chunk can be computed again from
what entered it. Encoding is not needed by the method and not here.

A pixel past the range is clamped, as in diffusers, but its gradient is not always zero: see ``wan_vae.InwardClamp``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

import torch

from lowmem_drf.errors import BadInputError
from lowmem_drf.memory.host import Held, HostStore
from lowmem_drf.models.sources import complete, loading
from lowmem_drf.models.wan_vae import Caches, pull_back, segments_of, strips_of

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan
    from torch import Tensor

ON_THE_WAY = 1024**3
"""Bytes on their way to the card for the next segment while the present one computes. All that the backward of a segment of Wan 2.1 needs at 832x480
in bf16, half of it in fp32."""


def load_vae(folder_or_id: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> AutoencoderKLWan:
    """The VAE in subfolder ``vae`` of a diffusers model: frozen, eval. Raises BadInputError if it cannot be loaded."""
    from diffusers import AutoencoderKLWan

    with loading("the VAE", folder_or_id):
        vae = complete(AutoencoderKLWan.from_pretrained(folder_or_id, subfolder="vae", torch_dtype=dtype, output_loading_info=True))
    return vae.to(device).eval().requires_grad_(False)


class WanDecoder:
    """``types.Decoder`` on an ``AutoencoderKLWan``. Latents are the transformer's; frames are in [0, 1], in the VAE's dtype.

    Args:
        vae: its dtype is that of ``decode`` and ``chunk``, whose frames the critic sees.
        grad_dtype: of ``chunk_backward`` and of the caches that are stored for it. ``None``: the VAE's.
        strips: of rows, in which ``chunk_backward`` recomputes the largest pieces of the decoder, those of full resolution; smaller ones are cut
            into fewer, so that no strip is larger (``wan_vae.strips_of``). The gradient is the same.
        caches: ``"host"``: the running caches of a decode, and in ``chunk_backward`` the inputs of the segments and the gradients of the caches,
            wait in host memory between their uses, and the card holds those of one segment (and of the next, on their way).
        store: the host memory of the run. What ``store`` keeps for the backward is there in any case.

    Raises:
        BadInputError: fewer than one strip.
    """

    def __init__(
        self,
        vae: AutoencoderKLWan,
        *,
        grad_dtype: torch.dtype | None = None,
        strips: int = 1,
        caches: Literal["card", "host"] = "card",
        store: HostStore | None = None,
    ) -> None:
        if strips < 1:
            raise BadInputError(f"memory.vae_strips is {strips}: it must be 1 or more")
        self.vae = vae
        self.temporal_factor: int = vae.config.scale_factor_temporal
        self.spatial_factor: int = vae.config.scale_factor_spatial
        self._grad_dtype = grad_dtype or vae.dtype
        self._strips, self._waits = strips, caches == "host"
        self._host = store or HostStore(vae.device)
        self._segments = segments_of(vae.decoder, vae.config.patch_size)
        ends = list(accumulate(segment.slots for segment in self._segments))
        self._slots = [slice(end - segment.slots, end) for segment, end in zip(self._segments, ends, strict=True)]

    def decode(self, latents_BCFhw: Tensor) -> Tensor:
        """(B, C, F, h, w) -> (B, T, 3, H, W) in [0, 1], bitwise those of ``vae.decode``. Differentiable, as one graph."""
        x = self._into(latents_BCFhw, self.vae.dtype)
        caches, made = self.start(x.shape[0]), []
        for frame in range(x.shape[2]):
            y, caches = self._run(x[:, :, frame : frame + 1], caches)
            made.append(y)
        return _frames(torch.cat(made, dim=2))

    def start(self, batch: int) -> Caches:
        """The caches that enter the first chunk. ``batch`` is part of the contract; Wan's caches start empty whatever it is."""
        return (None,) * self._slots[-1].stop

    def chunk(self, latents_BC1hw: Tensor, caches: Caches) -> tuple[Tensor, Caches]:
        """(B, C, 1, h, w) and the caches that enter -> frames (B, 1 or 4, 3, H, W) in [0, 1] and the caches handed on.

        Pure: ``caches`` is not changed. Differentiable in the latents and in every tensor of ``caches``. Bitwise the frames of ``decode``.
        """
        y, handed = self._run(self._into(latents_BC1hw, self.vae.dtype), caches)
        return _frames(y), handed

    @torch.no_grad()
    def advance(self, latents_BC1hw: Tensor, caches: Caches) -> Caches:
        """What ``chunk`` hands on, in the dtype of the gradient: half the time and the room where that is bf16."""
        return self._run(self._into(latents_BC1hw, self._grad_dtype), caches)[1]

    def store(self, caches: Caches) -> Caches:
        """What ``chunk`` handed on, as it waits for ``chunk_backward``: on the host, in its dtype."""
        if self._grad_dtype == self.vae.dtype:
            return tuple(self._host.put(cache) if isinstance(cache, torch.Tensor) else cache for cache in caches)
        return tuple(self._host.put(_get(cache).to(self._grad_dtype)) if isinstance(cache, torch.Tensor | Held) else cache for cache in caches)

    def chunk_backward(
        self,
        latents_BC1hw: Tensor,
        caches: Caches,
        local: Sequence[int],
        d_made_BtCHW: Tensor,
        d_handed: Caches,
        hands_back: bool,
    ) -> tuple[Tensor, Caches]:
        """See ``types.Decoder``. One forward without gradient, that keeps what enters each segment; then the segments in reverse, each recomputed
        with gradient, the large ones in strips of rows. One segment's graph is live at a time."""
        first, dtype = _is_first(caches), self._grad_dtype
        z = latents_BC1hw.detach().requires_grad_()
        with torch.enable_grad():
            stem = self._into(z, dtype)
        inputs, sizes = self._inputs(stem.detach(), caches, first)
        d_x = None
        if len(local):
            frames = 1 if first else self.temporal_factor
            d_x = d_made_BtCHW.new_zeros(len(z), d_made_BtCHW.shape[2], frames, *d_made_BtCHW.shape[3:], dtype=dtype)
            d_x[:, :, list(local)] = 0.5 * d_made_BtCHW.transpose(1, 2).to(dtype)
        d_handed = d_handed or (None,) * len(caches)
        d_caches: list[Any] = [None] * len(caches)
        d_shortcut = None
        for i in reversed(range(len(self._segments))):
            segment, slots = self._segments[i], self._slots[i]
            opener = max((j for j in range(i) if self._segments[j].opens_shortcut), default=0)
            x = _get(inputs.pop())
            shortcut = _get(inputs[opener]) if segment.ends_shortcut else None
            entering, d_out = tuple(map(_get, caches[slots])), tuple(map(_get, d_handed[slots]))
            if i:
                before = self._slots[i - 1]
                _prefetch([inputs[-1], *caches[before], *d_handed[before]])
            strips = strips_of(segment, sizes[i], max(sizes), self._strips)
            d_x, d_end, made = pull_back(segment, x, entering, first, shortcut, d_x, d_out, hands_back, strips)
            del x, shortcut, entering, d_out
            d_caches[slots] = [self._wait(d) for d in made]
            del made
            if segment.ends_shortcut:
                d_shortcut = d_end
            if segment.opens_shortcut and d_shortcut is not None:
                d_x = d_shortcut if d_x is None else d_x + d_shortcut
                d_shortcut = None
        if d_x is None:
            return torch.zeros_like(z), tuple(d_caches) if hands_back else ()
        return torch.autograd.grad(stem, z, d_x)[0], tuple(d_caches) if hands_back else ()

    @torch.no_grad()
    def _inputs(self, x: Tensor, caches: Caches, first: bool) -> tuple[list[Any], list[int]]:
        """What enters each segment, and the elements of its input or output, whichever is larger."""
        inputs, sizes, shortcut = [], [], None
        for i, (segment, slots) in enumerate(zip(self._segments, self._slots, strict=True)):
            inputs.append(self._wait(x))
            sizes.append(x.numel())
            if i:
                sizes[i - 1] = max(sizes[i - 1], x.numel())
            if i == len(self._segments) - 1:  # the frames are not needed
                break
            if segment.opens_shortcut:
                shortcut = x
            entering = tuple(map(_get, caches[slots]))
            _prefetch(caches[self._slots[i + 1]])
            # as it comes back from the host: upsampling leaves other strides, and sums over channels depend on them in their last bit
            x = segment(x, entering, first, shortcut)[0].contiguous()
            if segment.ends_shortcut:
                shortcut = None
        return inputs, sizes

    def _run(self, x: Tensor, caches: Caches) -> tuple[Tensor, Caches]:
        """All segments of one chunk."""
        first, handed, shortcut = _is_first(caches), [], None
        for i, (segment, slots) in enumerate(zip(self._segments, self._slots, strict=True)):
            if segment.opens_shortcut:
                shortcut = x
            entering = tuple(cache.to(x) if isinstance(cache, torch.Tensor) else cache for cache in map(_get, caches[slots]))
            if i + 1 < len(self._segments):
                _prefetch(caches[self._slots[i + 1]])
            x, made = segment(x, entering, first, shortcut)
            del entering
            handed += [self._wait(cache) for cache in made]
            del made
            if segment.ends_shortcut:
                shortcut = None
        return x, tuple(handed)

    def _wait(self, value: Any) -> Any:
        """Where a tensor is until it is used again. A graph's tensors stay."""
        return self._host.put(value) if self._waits and isinstance(value, torch.Tensor) and not value.requires_grad else value

    def _into(self, latents_BCFhw: Tensor, dtype: torch.dtype) -> Tensor:
        """What enters the decoder."""
        conv = self.vae.post_quant_conv
        weights = {name: weight.to(dtype) for name, weight in conv.named_parameters()}
        return torch.func.functional_call(conv, weights, (self._to_vae(latents_BCFhw.to(dtype)),))

    def _to_vae(self, x_BCFhw: Tensor) -> Tensor:
        """Undoes the normalisation, in WanPipeline's own arithmetic (division by the inverse), so that its clips are reproduced to the bit."""
        mean = torch.tensor(self.vae.config.latents_mean).view(1, -1, 1, 1, 1).to(x_BCFhw)
        inverse_std = (1.0 / torch.tensor(self.vae.config.latents_std).view(1, -1, 1, 1, 1)).to(x_BCFhw)
        return x_BCFhw / inverse_std + mean


def _is_first(caches: Caches) -> bool:
    return all(cache is None for cache in caches)


def _get(value: Any) -> Any:
    return value.get() if isinstance(value, Held) else value


def _prefetch(values: Sequence[Any]) -> None:
    """Starts the way to the card of the first of these, as many as ``ON_THE_WAY`` allows."""
    waiting = [value for value in values if isinstance(value, Held)]
    for value, nbytes in zip(waiting, accumulate(value.nbytes for value in waiting), strict=True):
        if nbytes <= ON_THE_WAY:
            value.prefetch()


def _frames(x_BCTHW: Tensor) -> Tensor:
    """[-1, 1] -> (B, T, C, H, W) in [0, 1]."""
    return (x_BCTHW * 0.5 + 0.5).transpose(1, 2)
