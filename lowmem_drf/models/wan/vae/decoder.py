"""The Wan video VAE as a ``types.Decoder``: as a whole, or latent frame by latent frame with explicit caches.

``AutoencoderKLWan._decode`` of diffusers 0.42.1 also decodes one latent frame at a time; between chunks it keeps the
last two input frames of every causal convolution in a mutable list. Here that list is an argument and a result, so that
any chunk can be recomputed from its entering caches. The method needs no encoding.

Entering caches that come as a list are emptied on the way: each segment takes its own, which are freed when it has
handed on the new ones.

The backward of a chunk reads its trace: what entered each segment. A forward without gradient makes it: that of the
decode, or one more before the backward.

A pixel out of range is clamped, as in diffusers, but its gradient is not always zero: see ``clamp.InwardClamp``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from lowmem_drf.errors import BadInputError
from lowmem_drf.memory.host import Held, HostStore
from lowmem_drf.models import folders
from lowmem_drf.models.wan.vae.fused import NormSilu, Wants
from lowmem_drf.models.wan.vae.segments import Caches, Segment, segments_of
from lowmem_drf.models.wan.vae.strips import in_strips, segment_backward, sizes_of, strips_of

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan
    from torch import Tensor

ON_THE_WAY = 1024**3
"""Limit, in bytes, on prefetches for the next segment while the present one computes. At 832x480 it fits all that the
backward of one segment of Wan 2.1 needs in bf16, half of it in fp32."""


load_vae = partial(folders.load_vae, "AutoencoderKLWan")


def drop_encoder(vae: AutoencoderKLWan) -> None:
    """Frees the weights that only encoding needs, nearly half of the Wan VAE's. ``decode`` still works."""
    vae.encoder = vae.quant_conv = None


@dataclass
class Trace:
    """What a chunk's backward reads of its forward. Tensors of 4 bytes wait in the dtype of the gradient, if that has
    fewer; others as they were made."""

    first: bool
    """Of the clip."""
    inputs: list[Any] = field(default_factory=list)
    """By segment, on the card or the host; ``None``: cheaper to recompute than to keep."""
    caches: list[Any] = field(default_factory=list)
    """The entering caches, on the host; placeholders for those of which the backward reads only the shape."""


class WanDecoder:
    """``types.Decoder`` for an ``AutoencoderKLWan``. Latents are the transformer's; frames are in [0, 1], in the VAE's
    dtype.

    Args:
        vae: ``decode`` and ``chunk``, which make the critic's frames, run in its dtype.
        grad_dtype: dtype of ``chunk_backward`` and of the caches stored for it. ``None``: the VAE's.
        strips: strips of rows in which ``chunk_backward`` recomputes the largest segments, those of full resolution;
            smaller ones are cut into fewer, none larger (``strips.strips_of``). The gradient is the same. With
            ``norm_silu`` passes without gradient run in these strips too.
        caches: with ``"host"`` the running caches of a decode, and in ``chunk_backward`` the inputs of the segments and
            the gradients of the caches, wait in host memory between uses; the card holds one segment's, and prefetches
            the next one's.
        store: the run's host memory. Caches stored for the backward, and traces of chunks whose backward does not
            follow at once, are there in any case.
        norm_silu: kernel for (x_BCTHW, gamma_C) -> silu(WanRMS_norm(x)). With it the decoder takes less memory
            (``fused``); frames and gradients are the same up to rounding. ``None``: diffusers' modules.

    Raises:
        BadInputError: fewer than one strip.
        ValueError: ``norm_silu`` with trainable weights: they would get no gradient.
    """

    causal, group = True, 1

    def __init__(
        self,
        vae: AutoencoderKLWan,
        *,
        grad_dtype: torch.dtype | None = None,
        strips: int = 1,
        caches: Literal["card", "host"] = "card",
        store: HostStore | None = None,
        norm_silu: NormSilu | None = None,
    ) -> None:
        if norm_silu is not None and any(weight.requires_grad for weight in vae.decoder.parameters()):
            raise ValueError(
                "norm_silu gives the decoder's weights no gradient: freeze them, vae.requires_grad_(False)"
            )
        if strips < 1:
            raise BadInputError(f"memory.vae_strips is {strips}: it must be 1 or more")
        self.vae = vae
        self.temporal_factor: int = vae.config.scale_factor_temporal
        self.spatial_factor: int = vae.config.scale_factor_spatial
        self._grad_dtype = grad_dtype or vae.dtype
        self._strips, self._waits, self._fused = strips, caches == "host", norm_silu is not None
        self._host = store or HostStore(vae.device)
        self._segments = segments_of(vae.decoder, vae.config.patch_size, norm_silu)
        ends = list(accumulate(segment.slots for segment in self._segments))
        self._slots = [slice(end - segment.slots, end) for segment, end in zip(self._segments, ends, strict=True)]

    def decode(self, latents_BCFhw: Tensor) -> Tensor:
        """(B, C, F, h, w) -> (B, T, 3, H, W) in [0, 1], bitwise those of ``vae.decode``. Differentiable, as one
        graph."""
        x = self._into(latents_BCFhw, self.vae.dtype)
        caches, made = [*self.start(x.shape[0])], []
        for frame in range(x.shape[2]):
            y, caches[:] = self._run(x[:, :, frame : frame + 1], caches)
            made.append(y)
        return _frames(torch.cat(made, dim=2))

    def start(self, batch: int) -> Caches:
        """The caches that enter the first chunk. Wan's are empty for any ``batch``."""
        return (None,) * self._slots[-1].stop

    def chunk(self, latents_BC1hw: Tensor, caches: Sequence[Any]) -> tuple[Tensor, Caches]:
        """(B, C, 1, h, w) and the entering caches -> frames (B, 1 or 4, 3, H, W) in [0, 1] and the caches handed on.

        Pure (but a list of caches is emptied), and differentiable in the latents and in every tensor of ``caches``. The
        frames are bitwise those of ``decode``, unless ``norm_silu`` and several strips round differently.
        """
        y, handed = self._run(self._into(latents_BC1hw, self.vae.dtype), caches)
        return _frames(y), handed

    @torch.no_grad()
    def recorded_chunk(self, latents_BC1hw: Tensor, caches: Sequence[Any]) -> tuple[Tensor, Caches, Trace]:
        """As ``chunk`` without gradient, and the chunk's trace, on the host."""
        trace = Trace(_is_first(caches))
        y, handed = self._run(self._into(latents_BC1hw, self.vae.dtype), caches, trace)
        self._host.settle()
        return _frames(y), handed, trace

    @torch.no_grad()
    def advance(
        self, latents_BC1hw: Tensor, caches: Sequence[Any], keep: Literal["nothing", "trace", "last"]
    ) -> tuple[Caches, Trace | None]:
        """The caches that ``chunk`` hands on, in the dtype of the gradient (in bf16 half the time and memory), and the
        chunk's trace. ``"last"``: the caller hands nothing on, and the chunk's backward follows."""
        x = self._into(latents_BC1hw, self._grad_dtype)
        if keep == "nothing":
            return self._run(x, caches)[1], None
        trace = Trace(_is_first(caches))
        handed = self._run(x, caches, trace, keep == "last")[1]
        self._host.settle()
        return handed, trace

    def store(self, caches: Caches) -> Caches:
        """Moves caches to the host, in the form of a trace's."""
        as_made = self._grad_dtype.itemsize >= self.vae.dtype.itemsize
        copies = tuple(cache if as_made and isinstance(cache, Held) else self._put(_get(cache)) for cache in caches)
        self._host.settle()  # no cast cache, on its way to the host, stays on the card for the chunk that follows
        return copies

    def _put(self, value: Any) -> Any:
        """A tensor on the host, in the dtype of the gradient if that has fewer bytes: a cast of the same size would be
        one more tensor on the card until it has arrived."""
        if not isinstance(value, torch.Tensor):
            return value
        fewer = self._grad_dtype.itemsize < value.dtype.itemsize
        return self._host.put(value.to(self._grad_dtype) if fewer else value)

    def _back(self, value: Any) -> Any:
        """A tensor from the host, in the dtype of the gradient."""
        value = _get(value)
        return value.to(self._grad_dtype) if isinstance(value, torch.Tensor) else value

    def chunk_backward(
        self,
        latents_BC1hw: Tensor,
        trace: Trace,
        local: Sequence[int],
        d_made_BtCHW: Tensor,
        d_handed: Caches,
        hands_back: bool,
    ) -> tuple[Tensor, Caches]:
        """See ``types.Decoder``. The segments are recomputed with gradient in reverse order, large ones in strips of
        rows. One segment's graph is live at a time. Gradients at the caches reuse the memory of ``d_handed``."""
        first, inputs, dtype = trace.first, trace.inputs, self._grad_dtype
        z = latents_BC1hw.detach().requires_grad_()
        with torch.enable_grad():
            stem = self._into(z, dtype)
        counts = self._counts(stem.shape, first)
        d_x = None
        if len(local):
            frames = 1 if first else self.temporal_factor
            d_x = d_made_BtCHW.new_zeros(len(z), d_made_BtCHW.shape[2], frames, *d_made_BtCHW.shape[3:], dtype=dtype)
            d_x[:, :, list(local)] = 0.5 * d_made_BtCHW.transpose(1, 2).to(dtype)
        d_handed = d_handed or (None,) * len(trace.caches)
        d_caches: list[Any] = [None] * len(trace.caches)
        d_shortcut = None
        for i in reversed(range(len(self._segments))):
            segment, slots = self._segments[i], self._slots[i]
            x, shortcut = self._input(i, trace, counts), self._shortcut(i, inputs)
            inputs.pop()
            entering, d_out = tuple(map(self._back, trace.caches[slots])), tuple(map(_get, d_handed[slots]))
            if i:
                start, before = -2 if inputs[-1] is None else -1, self._slots[i - 1]
                _prefetch([*inputs[start:], *trace.caches[before], *d_handed[before]])
            d_x, d_end, made = segment_backward(
                segment, x, entering, first, shortcut, d_x, d_out, hands_back, counts[i]
            )
            del x, shortcut, entering, d_out
            trace.caches[slots] = [None] * segment.slots
            d_caches[slots] = [self._wait(d) for d in made]
            del made
            if segment.ends_shortcut:
                d_shortcut = d_end
            if segment.opens_shortcut and d_shortcut is not None:
                d_x = d_shortcut if d_x is None else d_x + d_shortcut
                d_shortcut = None
        d_z = torch.zeros_like(z) if d_x is None else torch.autograd.grad(stem, z, d_x)[0]
        return d_z, tuple(d_caches) if hands_back else ()

    def _counts(self, shape_BCTHW: Sequence[int], first: bool) -> list[int]:
        """The number of strips of each segment, if the first segment's input has this shape."""
        sizes = sizes_of(self._segments, shape_BCTHW, first)
        sized = zip(self._segments, sizes, strict=True)
        return [strips_of(segment, size, max(sizes), self._strips) for segment, size in sized]

    def _input(self, i: int, trace: Trace, counts: Sequence[int]) -> Tensor:
        """The input of a segment, kept or recomputed, contiguous in either case: upsampling leaves other strides, which
        change the last bit of sums over channels."""
        if trace.inputs[i] is not None:
            return cast("Tensor", self._back(trace.inputs[i]))
        before, x, shortcut = (
            self._segments[i - 1],
            self._back(trace.inputs[i - 1]),
            self._shortcut(i - 1, trace.inputs),
        )
        entering, strips = tuple(map(self._back, trace.caches[self._slots[i - 1]])), counts[i - 1] if self._fused else 1
        with torch.no_grad():
            return in_strips(before, x, entering, trace.first, shortcut, strips, Wants.OUTPUT)[0].contiguous()

    def _shortcut(self, i: int, inputs: Sequence[Any]) -> Tensor | None:
        """The shortcut that ends at a segment, if there is one."""
        if not self._segments[i].ends_shortcut:
            return None
        return cast("Tensor", self._back(inputs[max(j for j in range(i) if self._segments[j].opens_shortcut)]))

    def _run(
        self, x: Tensor, caches: Sequence[Any], trace: Trace | None = None, last: bool = False
    ) -> tuple[Tensor, Caches]:
        """All segments of one chunk. It fills ``trace``; with ``last`` it makes neither frames nor caches."""
        first, handed, shortcut = _is_first(caches), [], None
        left = caches if isinstance(caches, list) else [*caches]
        in_parts = self._fused and not torch.is_grad_enabled()
        counts = self._counts(x.shape, first) if in_parts else [1] * len(self._segments)
        for i, segment in enumerate(self._segments):
            if segment.opens_shortcut:
                shortcut = x
            waiting = [left.pop(0) for _ in range(segment.slots)]
            values = map(_get, waiting)
            entering = tuple(cache.to(x) if isinstance(cache, torch.Tensor) else cache for cache in values)
            if trace is not None:
                keep = self._wait if last else self._put
                kept = None if i and self._segments[i - 1].cheap else keep(x.contiguous())
                trace.inputs.append(kept)
                pairs = zip(waiting, entering, strict=True)
                trace.caches += [self._traced(segment, slot, *pair) for slot, pair in enumerate(pairs)]
                del kept
            del waiting
            if last and i + 1 == len(self._segments):
                break
            if i + 1 < len(self._segments):
                _prefetch(left[: self._segments[i + 1].slots])
            x, made = in_strips(segment, x, entering, first, shortcut, counts[i], Wants.OUTPUT if last else Wants.ALL)
            del entering
            handed += [self._wait(cache) for cache in made]
            del made
            if segment.ends_shortcut:
                shortcut = None
        return x, tuple(handed)

    def _traced(self, segment: Segment, slot: int, waiting: Any, cache: Any) -> Any:
        """An entering cache as a trace keeps it."""
        if slot in segment.shape_only and isinstance(cache, torch.Tensor):
            return cache.new_zeros((), dtype=self._grad_dtype).expand(cache.shape)
        stays = isinstance(waiting, Held) and self._grad_dtype.itemsize >= cache.dtype.itemsize
        return waiting if stays else self._put(cache)

    def _wait(self, value: Any) -> Any:
        """The tensor, or its copy on the host until it is used again. A graph's tensors stay."""
        goes = self._waits and isinstance(value, torch.Tensor) and not value.requires_grad
        return self._host.put(value) if goes else value

    def _into(self, latents_BCFhw: Tensor, dtype: torch.dtype) -> Tensor:
        """The decoder's input."""
        conv = self.vae.post_quant_conv
        weights = {name: weight.to(dtype) for name, weight in conv.named_parameters()}
        return torch.func.functional_call(conv, weights, (self._to_vae(latents_BCFhw.to(dtype)),))

    def _to_vae(self, x_BCFhw: Tensor) -> Tensor:
        """Undoes the normalisation with WanPipeline's arithmetic (division by the inverse), to reproduce its clips bit
        by bit."""
        mean = torch.tensor(self.vae.config.latents_mean).view(1, -1, 1, 1, 1).to(x_BCFhw)
        inverse_std = (1.0 / torch.tensor(self.vae.config.latents_std).view(1, -1, 1, 1, 1)).to(x_BCFhw)
        return x_BCFhw / inverse_std + mean


def _is_first(caches: Sequence[Any]) -> bool:
    return all(cache is None for cache in caches)


def _get(value: Any) -> Any:
    return value.get() if isinstance(value, Held) else value


def _prefetch(values: Sequence[Any]) -> None:
    """Starts to copy the first of these to the card, as many as ``ON_THE_WAY`` allows."""
    waiting = [value for value in values if isinstance(value, Held)]
    for value, nbytes in zip(waiting, accumulate(value.nbytes for value in waiting), strict=True):
        if nbytes <= ON_THE_WAY:
            value.prefetch()


def _frames(x_BCTHW: Tensor) -> Tensor:
    """[-1, 1] -> (B, T, C, H, W) in [0, 1]."""
    return (x_BCTHW * 0.5 + 0.5).transpose(1, 2)
