"""A VAE whose clips are decoded as a whole, as a ``types.Decoder``: one chunk, no caches.

Memory is saved along the depth. The decoder is a row of segments. The backward goes through them last to first, and
recomputes each from what entered it: one segment has its graph alive. A trace is what entered each segment.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import torch

from lowmem_drf.memory.host import Held, HostStore

if TYPE_CHECKING:
    from torch import Tensor

Trace = tuple[Any, ...]
"""The input of each segment, on the card or the host."""
S = TypeVar("S")
"""A segment."""


class WholeClipDecoder(ABC, Generic[S]):
    """``types.Decoder`` but for its factors. Latents are the transformer's; frames are in [0, 1], in the VAE's dtype.

    Args:
        vae: ``decode`` and ``chunk`` run in its dtype.
        segments: of its decoder. The last one makes frames.
        grad_dtype: dtype of ``chunk_backward`` and of the trace. ``None``: the VAE's.
        caches: ``"host"``: what enters the segments waits in host memory for the backward.
        store: the run's host memory.
    """

    causal, group = False, 1

    def __init__(
        self, vae: Any, segments: Sequence[S], grad_dtype: torch.dtype | None, caches: str, store: HostStore | None
    ) -> None:
        self.vae, self._segments = vae, segments
        self._grad_dtype, self._waits = grad_dtype or vae.dtype, caches == "host"
        self._host = store or HostStore(vae.device)

    @abstractmethod
    def _into(self, latents_BCFhw: Tensor, dtype: torch.dtype) -> Tensor:
        """What enters the first segment. Differentiable."""

    @abstractmethod
    def _through(self, segment: S, x: Tensor, latents_BCFhw: Tensor) -> Tensor: ...

    @abstractmethod
    def _back_through(self, segment: S, x: Tensor, d_out: Tensor, latents_BCFhw: Tensor) -> Tensor:
        """The gradient at a segment's input ``x``."""

    @abstractmethod
    def _as_frames(self, made: Tensor) -> Tensor:
        """What the last segment makes as (B, T, 3, H, W)."""

    @abstractmethod
    def _d_made(self, latents_BCFhw: Tensor, local: Sequence[int], d_made_BTCHW: Tensor, dtype: torch.dtype) -> Tensor:
        """The gradient at what the last segment makes, from that at the frames ``local``."""

    def decode(self, latents_BCFhw: Tensor) -> Tensor:
        """(B, C, F, h, w) -> (B, T, 3, H, W) in [0, 1]; with one strip bitwise those of ``vae.decode``. Differentiable,
        as one graph."""
        return self._run(latents_BCFhw, self.vae.dtype)[0]

    def start(self, batch: int) -> tuple[Any, ...]:
        """There are no caches."""
        return ()

    def store(self, caches: tuple[Any, ...]) -> tuple[Any, ...]:
        return caches

    def chunk(self, latents_BCFhw: Tensor, caches: Sequence[Any]) -> tuple[Tensor, tuple[Any, ...]]:
        """The whole clip, as ``decode``."""
        return self.decode(latents_BCFhw), ()

    @torch.no_grad()
    def recorded_chunk(self, latents_BCFhw: Tensor, caches: Sequence[Any]) -> tuple[Tensor, tuple[Any, ...], Trace]:
        """As ``chunk`` without gradient, and the trace, on the host."""
        frames, trace = self._run(latents_BCFhw, self.vae.dtype, self._put)
        self._host.settle()
        return frames, (), trace

    @torch.no_grad()
    def advance(
        self, latents_BCFhw: Tensor, caches: Sequence[Any], keep: Literal["nothing", "trace", "last"]
    ) -> tuple[tuple[Any, ...], Trace | None]:
        """The trace, recomputed in the dtype of the gradient. On the host with ``caches = "host"``, or if its backward
        does not follow at once."""
        if keep == "nothing":
            return (), None
        put = self._put if self._waits or keep == "trace" else lambda x: x
        return (), self._run(latents_BCFhw, self._grad_dtype, put, to_the_end=False)[1]

    def chunk_backward(
        self,
        latents_BCFhw: Tensor,
        trace: Trace,
        local: Sequence[int],
        d_made_BTCHW: Tensor,
        d_handed: tuple[Any, ...],
        hands_back: bool,
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """The gradient at the latents (B, C, F, h, w), from that at the frames ``local``."""
        if not local:
            return torch.zeros_like(latents_BCFhw), ()
        z, inputs = latents_BCFhw.detach().requires_grad_(), [*trace]
        with torch.enable_grad():
            into = self._into(z, self._grad_dtype)
        d = self._d_made(z, local, d_made_BTCHW, into.dtype)
        for segment in reversed(self._segments):
            x = _get(inputs.pop()).to(into.dtype)
            if inputs and isinstance(inputs[-1], Held):
                inputs[-1].prefetch()
            d = self._back_through(segment, x, d, z)
            del x
        return torch.autograd.grad(into, z, d)[0], ()

    def _run(
        self,
        latents_BCFhw: Tensor,
        dtype: torch.dtype,
        put: Callable[[Tensor], Any] | None = None,
        to_the_end: bool = True,
    ) -> tuple[Tensor, Trace]:
        """Frames and trace. Without ``to_the_end`` the last segment is left out, and there are no frames."""
        x, trace = self._into(latents_BCFhw, dtype), []
        for place, segment in enumerate(self._segments):
            if put is not None:
                trace.append(put(x))
            if to_the_end or place + 1 < len(self._segments):
                x = self._through(segment, x, latents_BCFhw)
        return self._as_frames(x) if to_the_end else x, tuple(trace)

    def _put(self, x: Tensor) -> Any:
        """On the host, in the dtype of the gradient if that has fewer bytes."""
        fewer = self._grad_dtype.itemsize < x.dtype.itemsize
        return self._host.put(x.to(self._grad_dtype) if fewer else x)


def _get(value: Any) -> Tensor:
    made: Tensor = value.get() if isinstance(value, Held) else value
    return made
