"""Differentiable counterpart of the critic's video processor: frames in [0, 1] -> the vision tower's patches.

Follows ``Qwen2VLVideoProcessor`` and ``Qwen3VLVideoProcessor`` of transformers 5.23 (resize rules, antialiased bicubic
resize, normalisation, patch order; 5.17 agrees) with ``cap_pixels_per_frame=True``: the rule of qwen-vl-utils, which
these models were trained with and transformers announces as its default. ``frames`` samples the frames.

On float frames the result is Hugging Face's, except that overshoot of the bicubic resize saturates at black and white,
as uint8 does there. On uint8 frames Hugging Face resizes in two passes and rounds each to 1/255. Rounding would kill
the gradient, so nothing is rounded here: resized frames differ by about one level of 255, more where noise overshoots
between the passes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch.nn import functional as F

from lowmem_drf.errors import BadInputError

if TYPE_CHECKING:
    from torch import Tensor

MAX_ASPECT_RATIO = 200


@dataclass(frozen=True, slots=True)
class VideoGeometry:
    """The numbers of a critic's ``video_preprocessor_config.json``."""

    patch: int
    """Pixels, each side."""
    temporal_patch: int
    """Frames per patch."""
    merge: int
    """Patches per token of the language model, each side. Frame sides are multiples of ``patch * merge``."""
    min_pixels: int
    """Per frame or per clip, see ``bounds`` (``size.shortest_edge``)."""
    max_pixels: int
    """Per frame or per clip (``size.longest_edge``)."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    bounds: Literal["frame", "clip"] = "frame"
    """What the two bounds apply to: each frame (Qwen2-VL, Qwen2.5-VL) or all frames of a clip together (Qwen3-VL)."""
    max_video_tokens: int | None = None
    """The cap of ``cap_pixels_per_frame``. ``frame``: the frames of a clip share 90% of this many tokens; ``None`` is
    Qwen2.5-VL's 128000, which binds from 300 frames on. ``clip``: tokens per frame; ``None`` is Qwen3-VL's 768."""

    square: tuple[int, int] | None = None
    """SmolVLM2: frames are resized so that the longer side has so many pixels, and then to a square of so many. Those
    that are such a square already stay as they are."""

    @property
    def factor(self) -> int:
        """Pixels of a token of the language model, each side."""
        return self.patch * self.merge


def smart_resize(height: int, width: int, geometry: VideoGeometry, frames: int = 1) -> tuple[int, int]:
    """The size that a clip's frames are resized to: sides multiples of ``geometry.factor``, area within the bounds,
    aspect ratio kept.

    ``frames``: the clip's, before padding to an even number.

    Raises:
        BadInputError: an aspect ratio above 200.
    """
    if geometry.square is not None:
        return geometry.square[1], geometry.square[1]
    factor = geometry.factor
    low = geometry.min_pixels
    if geometry.bounds == "clip":
        # Hugging Face refuses a clip that does not fill one patch; here it is padded
        frames = max(frames, geometry.temporal_patch)
        if min(height, width) < factor:
            scale = max(factor / height, factor / width)
            height, width = int(height * scale), int(width * scale)
        counted = round(frames / geometry.temporal_patch) * geometry.temporal_patch
        per_frame = min((geometry.max_video_tokens or 768) * factor**2, geometry.max_pixels // frames)
        high = max(per_frame, int(low * 1.05)) * frames
    else:
        budget = int((geometry.max_video_tokens or 128_000) * factor**2 * 0.9) * geometry.temporal_patch
        high = max(min(geometry.max_pixels, budget // frames), int(low * 1.05))
        frames = counted = 1
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise BadInputError(
            f"the critic cannot look at {width}x{height} frames: the aspect ratio must be at most {MAX_ASPECT_RATIO}. "
            "Crop the video."
        )
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if counted * rows * columns > high:
        shrink = math.sqrt(frames * height * width / high)
        rows, columns = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif counted * rows * columns < low:
        grow = math.sqrt(low / (frames * height * width))
        rows, columns = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return rows, columns


def resized(frames_BTCHW: Tensor, geometry: VideoGeometry) -> Tensor:
    """The frames at the critic's size, float in [0, 1]. Differentiable and idempotent."""
    batch, frames, _, height, width = frames_BTCHW.shape
    size = smart_resize(height, width, geometry, frames)
    if size == (height, width):
        return frames_BTCHW
    x = frames_BTCHW.flatten(0, 1)
    for step in [*([] if geometry.square is None else [_longest(height, width, geometry.square[0])]), size]:
        # bicubic overshoots; uint8 images saturate there, and so do we
        x = F.interpolate(x, size=step, mode="bicubic", antialias=True).clamp(0, 1)
    return x.unflatten(0, (batch, frames))


def _longest(height: int, width: int, longest: int) -> tuple[int, int]:
    """The first size of ``SmolVLMVideoProcessor.resize``: the shorter side is even."""
    longest = min(longest, 4096)
    shorter = int(longest / (width / height)) if width >= height else int(longest * (width / height))
    shorter = max(1, shorter + shorter % 2)
    return (shorter, longest) if width >= height else (longest, shorter)


def video_patches(frames_BTCHW: Tensor, geometry: VideoGeometry) -> tuple[Tensor, Tensor]:
    """Patches of B clips, one clip after the other. Differentiable.

    Args:
        frames_BTCHW: [0, 1], floating point. An odd number of frames is padded by repeating the last.

    Returns:
        ``pixel_values_videos`` (B * grid_t * grid_h * grid_w, C * temporal_patch * patch * patch), in the frames' dtype
        and Hugging Face's order (the patches of one merged token are neighbours), and ``video_grid_thw`` (B, 3), int64,
        on the CPU.
    """
    x = resized(frames_BTCHW, geometry)
    batch, frames, channels, rows, columns = x.shape
    x = (x - x.new_tensor(geometry.mean)[:, None, None]) / x.new_tensor(geometry.std)[:, None, None]
    if missing := -frames % geometry.temporal_patch:
        x = torch.cat([x, x[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)
    t, h, w = x.shape[1] // geometry.temporal_patch, rows // geometry.patch, columns // geometry.patch
    m, p = geometry.merge, geometry.patch
    x = x.reshape(batch, t, geometry.temporal_patch, channels, h // m, m, p, w // m, m, p)
    # clip, time, token row, token column, patch row, patch column, channel, frame, pixel row, pixel column
    x = x.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)
    patches = x.reshape(batch * t * h * w, channels * geometry.temporal_patch * p * p)
    return patches, torch.tensor([[t, h, w]] * batch)
