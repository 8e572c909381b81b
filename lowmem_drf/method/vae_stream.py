"""The VAE's part of the relay: the decode in chunks, and its backward in chunks, in reverse time order.

A chunk depends on earlier chunks through the decoder's causal caches alone, and the cotangents of the caches it hands
on are the gradients that the next chunk's backward returned. What its backward needs of its forward, its trace, is
recorded by the decode; or made again by one forward, from stored caches that enter it or an earlier chunk. A decoder
that is not causal has one chunk, the clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lowmem_drf.method.finite import Found, look_at, refuse
from lowmem_drf.method.frames import ChunkVisit, backward_chunks, latents_of_chunk

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem_drf.types import Decoder

Caches = tuple[Any, ...]
Cotangents = tuple[Any, ...]
"""One per cache; ``None`` if it is no tensor, or the gradient is zero. Empty: all zero."""


TRACES = 3
"""Traces that are made in one go. Fewer would be more decoding without gradient, more would take more host memory."""


@dataclass
class ForBackward:
    """What a decode leaves for ``vae_backward``, which empties it on the way."""

    together: int = 1
    """The most traces that are made in one go."""
    caches: dict[int, Caches] = field(default_factory=dict)
    """By chunk, those that enter it, stored."""
    traces: dict[int, Any] = field(default_factory=dict)
    """By chunk."""


@torch.no_grad()
def decode(
    decoder: Decoder,
    x_0_BCFhw: Tensor,
    kept: Sequence[int],
    window: int | None = None,
    cache_every: int = 1,
    record: int = 0,
) -> tuple[Tensor, ForBackward]:
    """The kept frames (B, T, C, H, W) in [0, 1], and what ``vae_backward`` takes.

    Chunks after the last kept frame are not decoded.

    Args:
        cache_every: caches are stored that enter every n-th chunk that ``vae_backward`` visits, from the first on. For
            81 frames of Wan at 832x480 in bf16 all of them take 33 GiB.
        record: of so many chunks that it visits, the last ones, the traces are stored instead.
    """
    visits = {visit.chunk: visit for visit in _visits(decoder, kept, window)}
    ordered = sorted(visits)
    recorded = set(ordered[max(0, len(ordered) - record) :])
    stored = set([chunk for chunk in ordered if chunk not in recorded][::cache_every])
    caches = [*decoder.start(x_0_BCFhw.shape[0])]  # a list: the decoder empties it, and holds one set and not two
    frames, left = [], ForBackward(max(TRACES, record))  # where the recorded ones were is room for as many
    for chunk in range(max(visits) + 1):
        latents = x_0_BCFhw[:, :, _frames(decoder, chunk)]
        if chunk in stored:
            left.caches[chunk] = decoder.store(tuple(caches))
        if chunk in recorded:
            made_BtCHW, caches[:], left.traces[chunk] = decoder.recorded_chunk(latents, caches)
        else:
            made_BtCHW, caches[:] = decoder.chunk(latents, caches)
        if chunk in visits:
            frames.append(made_BtCHW[:, list(visits[chunk].local)])
    return torch.cat(frames, dim=1), left


def vae_backward(
    decoder: Decoder,
    x_0_BCFhw: Tensor,
    left: ForBackward,
    d_frames_BTCHW: Tensor,
    kept: Sequence[int],
    window: int | None = None,
    found: Found = refuse,
) -> Tensor:
    """Gradient at the latents from the gradient at the kept frames: one chunk at a time, in reverse time order."""
    visits = _visits(decoder, kept, window)
    d_x_0 = torch.zeros_like(x_0_BCFhw)
    d_handed: Cotangents = ()
    for visit in visits:
        if visit.chunk not in left.traces:
            _trace(decoder, x_0_BCFhw, left, visit.chunk, {other.chunk for other in visits})
        here = _frames(decoder, visit.chunk)
        d_x_0[:, :, here], d_handed = decoder.chunk_backward(
            x_0_BCFhw[:, :, here],
            left.traces.pop(visit.chunk),
            visit.local,
            d_frames_BTCHW[:, list(visit.slots)],
            d_handed,
            visit.hands_back,
        )
    look_at(d_x_0, "gradients at the latents (behind the VAE)", "vae_backward", found)
    return d_x_0


@torch.no_grad()
def _trace(decoder: Decoder, x_0_BCFhw: Tensor, left: ForBackward, last: int, visited: set[int]) -> None:
    """Makes the traces of visited chunks, from the last one whose caches are stored up to ``last``: of no more than
    ``left.together``. For those before, it stores caches."""
    first = max(left.caches)
    caches, ahead = [*left.caches[first]], sorted(chunk for chunk in visited if first <= chunk <= last)
    stored = set(ahead[:: left.together])
    traced = ahead[ahead.index(max(stored)) :]
    for chunk in range(first, last + 1):
        if chunk in stored and chunk != first:
            left.caches[chunk] = decoder.store(tuple(caches))
        keep: Any = "last" if chunk == last else "trace" if chunk in traced else "nothing"
        caches[:], trace = decoder.advance(x_0_BCFhw[:, :, _frames(decoder, chunk)], caches, keep)
        if keep != "nothing":
            left.traces[chunk] = trace
    del left.caches[traced[0]]


def _visits(decoder: Decoder, kept: Sequence[int], window: int | None) -> tuple[ChunkVisit, ...]:
    """The chunks of a backward, in reverse time order. The gradient of a whole clip needs no window."""
    if decoder.causal:
        return backward_chunks(kept, decoder.temporal_factor, window, decoder.group)
    return (ChunkVisit(0, tuple(range(len(kept))), tuple(kept), hands_back=False),)


def _frames(decoder: Decoder, chunk: int) -> slice:
    """The latent frames of a chunk."""
    return latents_of_chunk(chunk, decoder.group) if decoder.causal else slice(None)
