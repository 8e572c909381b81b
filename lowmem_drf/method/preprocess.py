"""The differentiable twin of the critic's video processor: frames in [0, 1] -> the vision tower's patches.

After ``Qwen2VLVideoProcessor`` of transformers 5.23 (``smart_resize``, bicubic resize with antialias, normalisation, patch order).
What is not here: frame sampling (``frames.kept_frames``) and ``cap_pixels_per_frame``, whose bound starts to bind at more than 300 frames.
The one difference, and only where frames are resized: Hugging Face resizes uint8 images in two passes, each rounded to 1/255 and saturated
at black and white; here nothing is rounded, or there were no gradient, and only the result saturates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from lowmem_drf.errors import BadInputError

if TYPE_CHECKING:
    from torch import Tensor


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
    """Per frame (``size.shortest_edge``)."""
    max_pixels: int
    """Per frame (``size.longest_edge``)."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def smart_resize(height: int, width: int, geometry: VideoGeometry) -> tuple[int, int]:
    """The size a frame is resized to: sides multiples of ``patch * merge``, area in [min_pixels, max_pixels], aspect ratio kept.

    Raises:
        BadInputError: an aspect ratio above 200.
    """
    if max(height, width) > 200 * min(height, width):
        raise BadInputError(f"the critic cannot look at {width}x{height} frames: the aspect ratio must be at most 200")
    factor = geometry.patch * geometry.merge
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > geometry.max_pixels:
        shrink = math.sqrt(height * width / geometry.max_pixels)
        rows, columns = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif rows * columns < geometry.min_pixels:
        grow = math.sqrt(geometry.min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return rows, columns


def video_patches(frames_BTCHW: Tensor, geometry: VideoGeometry) -> tuple[Tensor, Tensor]:
    """Patches of B clips, one clip after the other. Differentiable.

    Args:
        frames_BTCHW: [0, 1], floating point. An odd number of frames is filled up by repeating the last.

    Returns:
        ``pixel_values_videos`` (B * grid_t * grid_h * grid_w, C * temporal_patch * patch * patch), dtype of the frames, in the order
        of Hugging Face (the patches of one merged token are neighbours), and ``video_grid_thw`` (B, 3), int64, on the CPU.
    """
    batch, frames, channels, height, width = frames_BTCHW.shape
    rows, columns = smart_resize(height, width, geometry)
    x = frames_BTCHW.flatten(0, 1)
    if (rows, columns) != (height, width):
        # bicubic overshoots; uint8 images saturate there, and so do we
        x = F.interpolate(x, size=(rows, columns), mode="bicubic", antialias=True).clamp(0, 1)
    x = (x - x.new_tensor(geometry.mean)[:, None, None]) / x.new_tensor(geometry.std)[:, None, None]
    x = x.unflatten(0, (batch, frames))
    if missing := -frames % geometry.temporal_patch:
        x = torch.cat([x, x[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)
    t, h, w = x.shape[1] // geometry.temporal_patch, rows // geometry.patch, columns // geometry.patch
    m, p = geometry.merge, geometry.patch
    x = x.reshape(batch, t, geometry.temporal_patch, channels, h // m, m, p, w // m, m, p)
    # clip, time, token row, token column, patch row, patch column, channel, frame, pixel row, pixel column
    x = x.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)
    patches = x.reshape(batch * t * h * w, channels * geometry.temporal_patch * p * p)
    return patches, torch.tensor([[t, h, w]] * batch)
