"""Selection of the pixel frames for the critic, and of the decode chunks that hold them.

With the VAE's temporal factor t, latent frame 0 makes pixel frame 0, and latent frame l > 0 makes frames
(l - 1) t + 1 .. l t. A chunk is one latent frame, or a ``group`` of them: then the first chunk has one more.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from lowmem_drf.errors import BadInputError

if TYPE_CHECKING:
    from torch import Generator, Tensor

FrameMode = Literal["uniform", "random_phase", "motion"]

MIN_FRAMES, MAX_FRAMES = 4, 768
"""Bounds on the frames of a clip at a given rate, as in Hugging Face's processor and in qwen-vl-utils."""


def kept_frames(
    n_frames: int, n_keep: int, mode: FrameMode = "uniform", generator: Generator | None = None
) -> tuple[int, ...]:
    """Ascending, unique pixel frames for the critic.

    Args:
        mode: ``"uniform"``: evenly spaced, both ends included (one frame: the middle one). ``"random_phase"``: spacing
            ``n_frames / n_keep`` and one random phase, so that over many updates the critic judges every frame.
            ``"motion"``: as ``"uniform"``, until the clip is known (``motion_frames``).

    Raises:
        BadInputError: ``n_keep`` not in 1..n_frames, or an unknown mode.
    """
    if not 1 <= n_keep <= n_frames:
        raise BadInputError(f"critic.frames is {n_keep}: it must be in 1..{n_frames} (video.frames is {n_frames})")
    if mode in ("uniform", "motion"):
        return tuple(i * (n_frames - 1) // (n_keep - 1) for i in range(n_keep)) if n_keep > 1 else (n_frames // 2,)
    if mode == "random_phase":
        phase = torch.rand((), generator=generator, dtype=torch.float64).item()
        return tuple(int((i + phase) * n_frames / n_keep) for i in range(n_keep))
    raise BadInputError(f"the frame mode is {mode!r}: it must be 'uniform', 'random_phase' or 'motion'")


def motion_frames(x_0_BCFhw: Tensor, n_frames: int, n_keep: int, temporal_factor: int) -> tuple[int, ...]:
    """Ascending, unique pixel frames: both ends, and between them more where the clip changes.

    The change between two latent frames (mean absolute difference over clips, channels and places) is spread evenly
    over the pixel frames of the later one. Half the mean change is added everywhere, so that still passages get frames
    too. The frames cut the sum into equal parts.
    """
    change = (x_0_BCFhw[:, :, 1:].float() - x_0_BCFhw[:, :, :-1].float()).abs().mean(dim=(0, 1, 3, 4))
    rates = [change[chunk].item() for chunk in range(len(change))]
    floor = 0.5 * sum(rates) / max(len(rates), 1) or 1.0
    total, passed = 0.0, [0.0]
    for frame in range(1, n_frames):
        total += rates[chunk_of_frame(frame, temporal_factor) - 1] + floor
        passed.append(total)
    return _cut_evenly(passed, n_keep)


def _cut_evenly(passed: Sequence[float], n_keep: int) -> tuple[int, ...]:
    """The first frames at which the ascending ``passed`` reaches 0, 1/(n-1), 2/(n-1) .. of its end (one frame: the
    middle); unique."""
    if n_keep == 1:
        return (bisect_left(passed, 0.5 * passed[-1]),)
    chosen: list[int] = []
    for i in range(n_keep):
        wanted = bisect_left(passed, passed[-1] * i / (n_keep - 1) * (1 - 1e-12))
        least, most = (chosen[-1] + 1 if chosen else 0), len(passed) - (n_keep - i)
        chosen.append(min(max(wanted, least), most))
    return tuple(chosen)


def frames_at_rate(n_frames: int, fps: float, rate: float, temporal_patch: int = 2) -> int:
    """The number of frames the critic sees of a clip of ``n_frames`` at ``fps``, at ``rate`` frames a second.

    The rule of ``Qwen2VLVideoProcessor.sample_frames`` (transformers 5.23): a multiple of ``temporal_patch``, rounded
    down, in 4..768 and at most ``n_frames``. A clip shorter than one temporal patch gives all its frames (Hugging Face
    fails there); ``video_patches`` pads it.

    Raises:
        BadInputError: a rate that is not above 0; a clip without a frame rate.
    """
    if not 0 < rate < float("inf"):
        raise BadInputError(f'critic.frames = "fps:{rate:g}": the rate must be above 0, for example "fps:2"')
    if not 0 < fps < float("inf"):
        raise BadInputError(
            f'critic.frames = "fps:{rate:g}" needs a clip with a frame rate, and this one has none. '
            "Give a number of frames instead."
        )
    most = min(MAX_FRAMES, n_frames) // temporal_patch * temporal_patch
    wanted = min(max(n_frames / fps * rate, MIN_FRAMES), most)
    return int(wanted // temporal_patch) * temporal_patch or min(n_frames, temporal_patch)


def kept_fps(n_frames: int, fps: float, n_keep: int, mode: FrameMode = "uniform") -> float:
    """Kept frames per second: one over the mean time between neighbours in ``kept_frames``. A critic's
    ``second_per_grid_ts`` is its temporal patch over this.

    Hugging Face's ``sampled_fps``, ``n_keep / n_frames * fps``, holds for a spacing of ``n_frames / n_keep``
    (``random_phase``). ``uniform`` and ``motion`` include both ends: their mean spacing is
    ``(n_frames - 1) / (n_keep - 1)``.
    """
    if mode != "random_phase" and n_keep > 1:
        return fps * (n_keep - 1) / (n_frames - 1)
    return fps * n_keep / n_frames


def chunk_of_frame(frame: int, temporal_factor: int, group: int = 1) -> int:
    """The chunk that makes a pixel frame."""
    latent = -(-frame // temporal_factor)
    return latent if group == 1 else max(0, latent - 1) // group


def latents_of_chunk(chunk: int, group: int = 1) -> slice:
    """The latent frames of a chunk. A clip of one has one."""
    more = int(group > 1)
    return slice(chunk * group + more if chunk else 0, (chunk + 1) * group + more)


def frames_of_chunk(chunk: int, temporal_factor: int, group: int = 1) -> range:
    """The pixel frames that a chunk makes."""
    latents = latents_of_chunk(chunk, group)
    first = (latents.start - 1) * temporal_factor + 1 if chunk else 0
    return range(first, (latents.stop - 1) * temporal_factor + 1)


@dataclass(frozen=True, slots=True)
class ChunkVisit:
    """One chunk of the VAE backward."""

    chunk: int
    slots: tuple[int, ...]
    """Positions of the chunk's kept frames among all kept frames."""
    local: tuple[int, ...]
    """Positions of the same frames inside the chunk."""
    hands_back: bool
    """Whether the gradients at its entering caches go on to the chunk before."""


def backward_chunks(
    kept: Sequence[int], temporal_factor: int, window: int | None, group: int = 1
) -> tuple[ChunkVisit, ...]:
    """The chunks that the VAE backward recomputes, in reverse time order.

    Cache gradients flow from a kept chunk to earlier chunks and stop ``window`` chunks below the last kept chunk they
    passed. ``None``: they never stop (exact); 0: they never leave their chunk. So truncation costs nothing between kept
    chunks within the window of each other.
    """
    holders = {chunk_of_frame(frame, temporal_factor, group) for frame in kept}
    last = max(holders)
    reach = last if window is None else window

    def receives(chunk: int) -> bool:
        return any(chunk < holder <= chunk + reach for holder in holders)

    visits = []
    for chunk in range(last, -1, -1):
        if chunk in holders or receives(chunk):
            made = frames_of_chunk(chunk, temporal_factor, group)
            slots = tuple(i for i, frame in enumerate(kept) if frame in made)
            local = tuple(kept[i] - made.start for i in slots)
            visits.append(ChunkVisit(chunk, slots, local, hands_back=chunk > 0 and receives(chunk - 1)))
    return tuple(visits)
