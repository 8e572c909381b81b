"""The tiny decoder as a ``types.Decoder``: latent frame by latent frame, with the last inputs of its memory blocks as
caches.

The relay, chosen frames, windows and stored caches are therefore those of the VAE (``method/vae_stream.py``). At full
size it computes one frame at a time, and in the backward only the frames that have a gradient; the rest of it is
recomputed piece by piece, last to first, so that one piece's graph is alive at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from lowmem_drf.errors import BadInputError
from lowmem_drf.memory.host import Held, HostStore
from lowmem_drf.models.tiny.network import TinyNetwork, call

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem_drf.types import Decoder

Caches = tuple[Any, ...]
"""By memory block: its input at the last frame, (B, C, H, W). ``None`` before the first chunk."""


class TinyDecoder:
    """``types.Decoder`` for a ``TinyNetwork``. Latents are the transformer's, as published files of TAEHV take them;
    frames are in [0, 1].

    Args:
        network: ``decode`` and ``chunk`` run in its number format.
        grad_dtype: of ``chunk_backward`` and of the caches stored for it. ``None``: the network's.
        store: the run's host memory, where caches wait for the backward.
    """

    causal, group = True, 1

    def __init__(
        self, network: TinyNetwork, *, grad_dtype: torch.dtype | None = None, store: HostStore | None = None
    ) -> None:
        self.network = network
        self.temporal_factor: int = network.sizes.temporal_factor
        self._grad_dtype = grad_dtype or network.dtype
        self._host = store or HostStore(next(network.parameters()).device)
        self._pieces, (self._growth, self._head) = network.pieces, network.tail
        self.spares = frozenset({"decode", "vae_backward"})
        """The stages in which the VAE is not needed."""

    def decode(self, latents_BCFhw: Tensor) -> Tensor:
        """(B, C, F, h, w) -> (B, T, 3, H, W) in [0, 1]. Differentiable, as one graph."""
        caches, made = [*self.start(len(latents_BCFhw))], []
        for latents in latents_BCFhw.split(1, dim=2):
            frames, caches[:] = self.chunk(latents, caches)
            made.append(frames)
        return torch.cat(made, dim=1)

    def start(self, batch: int) -> Caches:
        return (None,) * sum(map(self.network.remembers, self._pieces))

    def chunk(self, latents_BC1hw: Tensor, caches: Sequence[Any]) -> tuple[Tensor, Caches]:
        first = _is_first(caches)
        x, handed = self._through(latents_BC1hw.to(self.network.dtype), caches)
        grown = call(self._growth, x)
        return torch.cat([call(self._head, frame) for frame in self._frames(grown, first)], dim=1), handed

    @torch.no_grad()
    def recorded_chunk(self, latents_BC1hw: Tensor, caches: Sequence[Any]) -> tuple[Tensor, Caches, Caches]:
        trace = self.store(tuple(caches))
        return *self.chunk(latents_BC1hw, caches), trace

    @torch.no_grad()
    def advance(
        self, latents_BC1hw: Tensor, caches: Sequence[Any], keep: Literal["nothing", "trace", "last"]
    ) -> tuple[Caches, Caches | None]:
        """A trace is the stored caches that enter the chunk: its backward recomputes the rest."""
        trace = None if keep == "nothing" else self.store(tuple(caches))
        handed = () if keep == "last" else self._through(latents_BC1hw.to(self._grad_dtype), caches)[1]
        return handed, trace

    def store(self, caches: Caches) -> Caches:
        """Moves caches to the host, in the dtype of the gradient."""
        stored = tuple(
            self._host.put(cache.to(self._grad_dtype)) if isinstance(cache, torch.Tensor) else cache for cache in caches
        )
        self._host.settle()
        return stored

    def chunk_backward(
        self,
        latents_BC1hw: Tensor,
        trace: Caches,
        local: Sequence[int],
        d_made_BtCHW: Tensor,
        d_handed: Caches,
        hands_back: bool,
    ) -> tuple[Tensor, Caches]:
        """See ``types.Decoder``."""
        dtype, first = self._grad_dtype, _is_first(trace)
        inputs = self._inputs(latents_BC1hw.to(dtype), trace)
        x = inputs.pop()
        d_x = self._tail_backward(x, first, local, d_made_BtCHW.to(dtype)) if len(local) else None
        waiting, entering, d_caches = list(d_handed), list(trace), list[Any]()
        for piece in reversed(self._pieces):
            x, past, d_past = inputs.pop().detach().requires_grad_(), None, None
            remembers = self.network.remembers(piece)
            if remembers and (past := _get(entering.pop())) is not None:
                past = past.detach().to(dtype).requires_grad_(hands_back)
            if d_x is not None:
                with torch.enable_grad():
                    y = call(piece, x, past) if remembers else call(piece, x)
                wanted = [x, past] if past is not None and hands_back else [x]
                d_x, *d_rest = torch.autograd.grad(y, wanted, d_x)
                d_past = d_rest[0].clone() if d_rest else None  # a view would hold the gradient of all that it saw
                del y
            if remembers:
                d_caches.append(d_past)
                if waiting and (d := waiting.pop()) is not None:  # the next chunk's gradient at this block's last input
                    d_x = torch.zeros_like(x) if d_x is None else d_x
                    d_x[:, -1] += d
        d_z = torch.zeros_like(latents_BC1hw) if d_x is None else d_x.transpose(1, 2).to(latents_BC1hw.dtype)
        return d_z, tuple(reversed(d_caches)) if hands_back else ()

    @torch.no_grad()
    def _inputs(self, latents_BC1hw: Tensor, caches: Caches) -> list[Tensor]:
        """The input of every piece, and of the last growth."""
        inputs, entering = [latents_BC1hw.transpose(1, 2)], list(caches)
        for piece in self._pieces:
            x = inputs[-1]
            past = [_of(entering.pop(0), x)] if self.network.remembers(piece) else []
            inputs.append(call(piece, x, *past))
        return inputs

    def _tail_backward(self, x: Tensor, first: bool, local: Sequence[int], d_made_BtCHW: Tensor) -> Tensor:
        """The gradient at the input of the last growth, frame after frame."""
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            grown = call(self._growth, x)
        d_grown = torch.zeros_like(grown)
        here, d_here = self._frames(grown.detach(), first), self._frames(d_grown, first)
        for frame, d_frame in zip(local, d_made_BtCHW.split(1, dim=1), strict=True):
            leaf = here[frame].requires_grad_()
            with torch.enable_grad():
                made = call(self._head, leaf)
            d_here[frame].copy_(torch.autograd.grad(made, leaf, d_frame)[0])
        return torch.autograd.grad(grown, x, d_grown)[0]

    def _through(self, latents_BC1hw: Tensor, caches: Sequence[Any]) -> tuple[Tensor, Caches]:
        """All pieces but the last growth and the head, and the caches that they hand on."""
        x, handed = latents_BC1hw.transpose(1, 2), list[Any]()
        left = caches if isinstance(caches, list) else [*caches]
        for piece in self._pieces:
            if self.network.remembers(piece):
                past = _of(left.pop(0), x)
                handed.append(x[:, -1].clone())  # a view would hold all frames of its level
                x = call(piece, x, past)
            else:
                x = call(piece, x)
        return x, tuple(handed)

    def _frames(self, grown_BtCHW: Tensor, first: bool) -> list[Tensor]:
        """Each frame of a chunk by itself. Of the first chunk only the last one is made: the others come before the
        clip."""
        frames = list(grown_BtCHW.split(1, dim=1))
        return frames[-1:] if first else frames


class TinyBackward:
    """``types.Decoder``: frames by the VAE, their gradient through the tiny decoder.

    Caches are those of both, the VAE's first; what waits for the backward is the tiny decoder's alone.

    Raises BadInputError: a VAE that decodes several latent frames at once.
    """

    causal, group = True, 1

    def __init__(self, exact: Decoder, tiny: TinyDecoder) -> None:
        if not exact.causal or exact.group > 1:
            raise BadInputError(
                'model.decoder = "tiny_backward" needs a VAE that decodes frame by frame, and that of this generator '
                "makes several at once: -s model.decoder=exact"
            )
        self._exact, self._tiny, self._count = exact, tiny, len(exact.start(1))
        self.temporal_factor, self.network = tiny.temporal_factor, tiny.network
        self.spares = frozenset({"vae_backward"})
        self.advance, self.chunk_backward = tiny.advance, tiny.chunk_backward
        self.decode = exact.decode

    def start(self, batch: int) -> Caches:
        return (*self._exact.start(batch), *self._tiny.start(batch))

    @torch.no_grad()
    def recorded_chunk(self, latents_BC1hw: Tensor, caches: Sequence[Any]) -> tuple[Tensor, Caches, Caches]:
        trace = self.store(tuple(caches))
        return *self.chunk(latents_BC1hw, caches), trace

    @torch.no_grad()
    def chunk(self, latents_BC1hw: Tensor, caches: Sequence[Any]) -> tuple[Tensor, Caches]:
        exact, tiny = [*caches[: self._count]], [*caches[self._count :]]
        if isinstance(caches, list):
            caches.clear()
        beside, _ = self._tiny.advance(latents_BC1hw, tiny, "nothing")
        frames, handed = self._exact.chunk(latents_BC1hw, exact)
        return frames, (*handed, *beside)

    def store(self, caches: Caches) -> Caches:
        own = len(self._tiny.start(1))  # of caches that ``advance`` made there are no others
        return self._tiny.store(caches[-own:])


def _is_first(caches: Sequence[Any]) -> bool:
    return all(cache is None for cache in caches)


def _get(value: Any) -> Any:
    return value.get() if isinstance(value, Held) else value


def _of(cache: Any, like: Tensor) -> Tensor | None:
    """An entering cache, in the number format of the pass."""
    value = _get(cache)
    return None if value is None else value.to(like.dtype)
