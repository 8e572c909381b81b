"""The VAE's part of the relay: the decode in chunks, and its backward in chunks, in reverse time order.

A chunk depends on earlier chunks through the decoder's causal caches alone. So the caches that enter a chunk are stored
(or recomputed from those of an earlier chunk), and the cotangents of the caches it hands on are the gradients that the
next chunk's backward returned.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lowmem_drf.method.finite import Found, look_at, refuse
from lowmem_drf.method.frames import backward_chunks

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem_drf.types import Decoder

Caches = tuple[Any, ...]
Cotangents = tuple[Any, ...]
"""One per cache; ``None`` if it is no tensor, or the gradient is zero. Empty: all zero."""


@torch.no_grad()
def decode(
    decoder: Decoder, x_0_BCFhw: Tensor, kept: Sequence[int], window: int | None = None, cache_every: int = 1
) -> tuple[Tensor, dict[int, Caches]]:
    """The kept frames (B, T, C, H, W) in [0, 1], and, by chunk, the stored caches for ``vae_backward``: those that
    enter every ``cache_every``-th chunk that it visits, from the first on.

    Chunks after the last kept frame are not decoded.
    """
    visits = {visit.chunk: visit for visit in backward_chunks(kept, decoder.temporal_factor, window)}
    stored_chunks = set(sorted(visits)[::cache_every])
    caches = [*decoder.start(x_0_BCFhw.shape[0])]  # a list: the decoder empties it, and holds one set and not two
    frames, entering = [], {}
    for chunk in range(max(visits) + 1):
        if chunk in stored_chunks:
            entering[chunk] = decoder.store(tuple(caches))
        made_BtCHW, caches[:] = decoder.chunk(x_0_BCFhw[:, :, chunk : chunk + 1], caches)
        if chunk in visits:
            frames.append(made_BtCHW[:, list(visits[chunk].local)])
    return torch.cat(frames, dim=1), entering


def vae_backward(
    decoder: Decoder,
    x_0_BCFhw: Tensor,
    entering: MutableMapping[int, Caches],
    d_frames_BTCHW: Tensor,
    kept: Sequence[int],
    window: int | None = None,
    found: Found = refuse,
) -> Tensor:
    """Gradient at the latents from the gradient at the kept frames: one chunk at a time, in reverse time order.

    ``entering`` is emptied on the way: its caches take 37 GiB for 81 frames of Wan at 832x480 in bf16.
    """
    visits = backward_chunks(kept, decoder.temporal_factor, window)
    d_x_0 = torch.zeros_like(x_0_BCFhw)
    d_handed: Cotangents = ()
    for visit in visits:
        if visit.chunk not in entering:
            _fill_in(decoder, x_0_BCFhw, entering, visit.chunk, {other.chunk for other in visits})
        here = slice(visit.chunk, visit.chunk + 1)
        d_x_0[:, :, here], d_handed = decoder.chunk_backward(
            x_0_BCFhw[:, :, here],
            entering.pop(visit.chunk),
            visit.local,
            d_frames_BTCHW[:, list(visit.slots)],
            d_handed,
            visit.hands_back,
        )
    look_at(d_x_0, "gradients at the latents (behind the VAE)", "vae_backward", found)
    return d_x_0


@torch.no_grad()
def _fill_in(
    decoder: Decoder, x_0_BCFhw: Tensor, entering: MutableMapping[int, Caches], last: int, visited: set[int]
) -> None:
    """Recomputes the caches that enter visited chunks, from the last chunk whose caches are stored up to ``last``."""
    first = max(entering)
    caches = [*entering[first]]
    for chunk in range(first, last):
        caches[:] = decoder.advance(x_0_BCFhw[:, :, chunk : chunk + 1], caches)
        if chunk + 1 in visited:
            entering[chunk + 1] = decoder.store(tuple(caches))
