"""Which pixel frames the critic sees, and which decode chunks hold them.

A chunk is one latent frame. Chunk 0 makes pixel frame 0; chunk c > 0 makes frames (c - 1) t + 1 .. c t, with t the VAE's temporal factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from lowmem_drf.errors import BadInputError

if TYPE_CHECKING:
    from torch import Generator

FrameMode = Literal["uniform", "random_phase"]


def kept_frames(n_frames: int, n_keep: int, mode: FrameMode = "uniform", generator: Generator | None = None) -> tuple[int, ...]:
    """Ascending, unique pixel frames for the critic.

    Args:
        mode: ``"uniform"``: evenly spaced with both ends (one frame: the middle one). ``"random_phase"``: a grid of spacing
            ``n_frames / n_keep`` with one random phase, so that over many updates every frame is judged and none can be sacrificed.

    Raises:
        BadInputError: ``n_keep`` not in 1..n_frames, or an unknown mode.
    """
    if not 1 <= n_keep <= n_frames:
        raise BadInputError(f"critic.frames is {n_keep}: it must be in 1..{n_frames} (video.frames is {n_frames})")
    if mode == "uniform":
        return tuple(i * (n_frames - 1) // (n_keep - 1) for i in range(n_keep)) if n_keep > 1 else (n_frames // 2,)
    if mode == "random_phase":
        phase = torch.rand((), generator=generator, dtype=torch.float64).item()
        return tuple(int((i + phase) * n_frames / n_keep) for i in range(n_keep))
    raise BadInputError(f"the frame mode is {mode!r}: it must be 'uniform' or 'random_phase'")


def chunk_of_frame(frame: int, temporal_factor: int) -> int:
    """The chunk that makes a pixel frame."""
    return -(-frame // temporal_factor)


def frames_of_chunk(chunk: int, temporal_factor: int) -> range:
    """The pixel frames that a chunk makes."""
    return range((chunk - 1) * temporal_factor + 1, chunk * temporal_factor + 1) if chunk else range(1)


@dataclass(frozen=True, slots=True)
class ChunkVisit:
    """One chunk of the VAE backward."""

    chunk: int
    slots: tuple[int, ...]
    """Positions of the chunk's kept frames among all kept frames."""
    local: tuple[int, ...]
    """Positions of the same frames inside the chunk."""
    hands_back: bool
    """Whether gradients of the entering caches go on to the chunk before."""


def backward_chunks(kept: Sequence[int], temporal_factor: int, window: int | None) -> tuple[ChunkVisit, ...]:
    """The chunks that the VAE backward recomputes, in reverse time order.

    Cache gradients leave a kept chunk towards earlier chunks and stop ``window`` chunks below the last kept chunk they passed
    (``None``: they never stop, exact; 0: they never leave). Kept chunks in reach of each other therefore cost no accuracy.
    """
    holders = {chunk_of_frame(frame, temporal_factor) for frame in kept}
    last = max(holders)
    reach = last if window is None else window

    def receives(chunk: int) -> bool:
        return any(chunk < holder <= chunk + reach for holder in holders)

    visits = []
    for chunk in range(last, -1, -1):
        if chunk in holders or receives(chunk):
            made = frames_of_chunk(chunk, temporal_factor)
            slots = tuple(i for i, frame in enumerate(kept) if frame in made)
            local = tuple(kept[i] - made.start for i in slots)
            visits.append(ChunkVisit(chunk, slots, local, hands_back=chunk > 0 and receives(chunk - 1)))
    return tuple(visits)
