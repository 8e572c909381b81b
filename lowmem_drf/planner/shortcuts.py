"""Parts of a step that save the plan time: what was done once is replayed, what a stage does not need is left out."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from lowmem_drf.assembly.assemble import Models
from lowmem_drf.memory.activations import HookedForward
from lowmem_drf.memory.recorded_rollout import RecordedForward
from lowmem_drf.memory.streaming import StreamedForward
from lowmem_drf.planner.ledger import Ledger
from lowmem_drf.types import Answer, Decoder, Parts, Question


def with_replays(parts: Parts, models: Models, ledger: Ledger) -> Parts:
    """Whatever is done without leaving a graph, again on tensors of the same shapes, is done once: a block of the
    rollout, a chunk of the VAE."""
    for block in (*models.transformer.blocks, *(models.expert.blocks if models.expert else ())):
        holder = block  # what records a pass and what brings the weights is done every time
        while isinstance(holder.forward, RecordedForward | StreamedForward | HookedForward):
            holder = holder.forward
        holder.forward = _ShortcutBlock(holder.forward, ledger)
    return replace(parts, decoder=_ShortcutDecoder(parts.decoder, ledger))


class _ShortcutBlock:
    """A block's ``forward``. Under gradient, and where what it computes is recorded (then it gets a kept_attention), nothing is
    replayed."""

    def __init__(self, forward: Any, ledger: Ledger) -> None:
        self._forward, self._ledger = forward, ledger
        self.unread = forward.unread

    def __call__(self, hidden_BLD: torch.Tensor, *rest: Any, **arguments: Any) -> torch.Tensor:
        if torch.is_grad_enabled() or arguments:
            return self._forward(hidden_BLD, *rest, **arguments)
        run = partial(self._forward, hidden_BLD, *rest)
        return self._ledger.replay(("block", hidden_BLD.shape), run, partial(torch.zeros_like, hidden_BLD))


class _ShortcutDecoder:
    """A decoder whose chunks are replayed once what one hands on is as large as what entered it."""

    def __init__(self, decoder: Decoder, ledger: Ledger) -> None:
        self._decoder, self._ledger = decoder, ledger
        self._steady: dict[Hashable, bool] = {}
        self.temporal_factor = decoder.temporal_factor
        self.start, self.store, self.decode = decoder.start, decoder.store, decoder.decode

    def chunk(self, latents_BC1hw: torch.Tensor, caches: tuple[Any, ...]) -> tuple[torch.Tensor, tuple[Any, ...]]:
        entering = _sizes(caches)
        key = ("chunk", latents_BC1hw.shape, entering)

        def run() -> tuple[torch.Tensor, tuple[Any, ...]]:
            made, handed = self._decoder.chunk(latents_BC1hw, caches)
            self._steady[key] = _sizes(handed) == entering
            self._blank = partial(torch.zeros, made.shape, dtype=made.dtype, device=made.device)
            return made, handed

        if not self._steady.get(key, True):
            return run()
        return self._ledger.replay(key, run, lambda: (self._blank(), caches))

    def advance(self, latents_BC1hw: torch.Tensor, caches: tuple[Any, ...]) -> tuple[Any, ...]:
        entering = _sizes(caches)
        key = ("advance", latents_BC1hw.shape, entering)

        def run() -> tuple[Any, ...]:
            handed = self._decoder.advance(latents_BC1hw, caches)
            self._steady[key] = _sizes(handed) == entering
            return handed

        return self._ledger.replay(key, run, lambda: caches) if self._steady.get(key, True) else run()

    def chunk_backward(
        self,
        latents_BC1hw: torch.Tensor,
        caches: tuple[Any, ...],
        local: Sequence[int],
        d_made: torch.Tensor,
        d_handed: tuple[Any, ...],
        hands_back: bool,
    ) -> tuple[torch.Tensor, tuple[Any, ...]]:
        handed = _sizes(d_handed)
        key = ("pull back", latents_BC1hw.shape, d_made.shape, _sizes(caches), handed, hands_back)

        def run() -> tuple[torch.Tensor, tuple[Any, ...]]:
            d_z, d_caches = self._decoder.chunk_backward(latents_BC1hw, caches, local, d_made, d_handed, hands_back)
            self._steady[key] = _sizes(d_caches) == handed
            return d_z, d_caches

        if not self._steady.get(key, True):
            return run()
        return self._ledger.replay(key, run, lambda: (torch.zeros_like(latents_BC1hw), d_handed))


def _sizes(caches: tuple[Any, ...]) -> tuple[Any, ...]:
    """What tells whether two tuples of caches take the same room in the same places."""
    return tuple((type(cache).__name__, cache.nbytes) if hasattr(cache, "nbytes") else cache for cache in caches)


def one_stage(parts: Parts, stage: str, models: Models) -> Parts:
    """The parts of a step with all models left out that do not work in ``stage``."""
    if stage not in ("rollout", "denoise_backward"):
        first = parts.lora[0]
        parts = replace(parts, velocity=lambda x, sigma, cond: x + first.sum().to(x.dtype))
    if stage not in ("decode", "vae_backward"):
        parts = replace(parts, decoder=_NoDecoder(models.decoder.temporal_factor, models.decoder.spatial_factor))
    if stage != "critic":
        parts = replace(parts, critic=_no_critic)
    return parts


class _NoDecoder:
    """A ``types.Decoder`` of the same shapes that computes nothing."""

    def __init__(self, temporal_factor: int, spatial_factor: int) -> None:
        self.temporal_factor, self.spatial_factor = temporal_factor, spatial_factor

    def start(self, batch: int) -> tuple[Any, ...]:
        return (True,)

    def decode(self, latents_BCFhw: torch.Tensor) -> torch.Tensor:
        return self._blank(latents_BCFhw, (latents_BCFhw.shape[2] - 1) * self.temporal_factor + 1)

    def advance(self, latents_BC1hw: torch.Tensor, caches: tuple[Any, ...]) -> tuple[Any, ...]:
        return (False,)

    def store(self, caches: tuple[Any, ...]) -> tuple[Any, ...]:
        return caches

    def chunk(self, latents_BC1hw: torch.Tensor, caches: tuple[Any, ...]) -> tuple[torch.Tensor, tuple[Any, ...]]:
        (first,) = caches
        return self._blank(latents_BC1hw, 1 if first else self.temporal_factor), (False,)

    def chunk_backward(self, latents_BC1hw: torch.Tensor, *_: Any) -> tuple[torch.Tensor, tuple[Any, ...]]:
        return torch.zeros_like(latents_BC1hw), ()

    def _blank(self, latents_BCFhw: torch.Tensor, frames: int) -> torch.Tensor:
        batch, _, _, height, width = latents_BCFhw.shape
        return latents_BCFhw.mean() + torch.zeros(
            batch, frames, 3, height * self.spatial_factor, width * self.spatial_factor
        )


def _no_critic(frames_BTCHW: torch.Tensor, questions: Sequence[Sequence[Question]]) -> list[list[Answer]]:
    logits = frames_BTCHW.mean().float() * torch.ones(1, 2)
    return [[Answer(logits, torch.tensor([0]), yes=(0,), no=(1,)) for _ in asked] for asked in questions]
