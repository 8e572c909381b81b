"""The differentiable twin of the critic's video processor: frames in [0, 1] -> the vision tower's patches.

After ``Qwen2VLVideoProcessor`` and ``Qwen3VLVideoProcessor`` of transformers 5.23 (resize rules, bicubic resize with
antialias, normalisation, patch order; 5.17 agrees), with ``cap_pixels_per_frame=True``: the rule of qwen-vl-utils, by
which these models were trained and which transformers announces as its default. Frame sampling is in ``frames``.

On float frames the result is Hugging Face's, but for one thing: bicubic resampling overshoots at edges, and values past
black or white saturate here, as those of uint8 frames do there. For uint8 frames Hugging Face resizes in two passes,
each rounded to 1/255 and saturated; nothing is rounded here, or there were no gradient: the two differ by about one
level of 255, more where noise overshoots between the passes, and only where frames are resized.
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
    """Of a frame, or of the whole clip (``size.shortest_edge``)."""
    max_pixels: int
    """Of a frame, or of the whole clip (``size.longest_edge``)."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    bounds: Literal["frame", "clip"] = "frame"
    """What the two bounds are of: a frame (Qwen2-VL, Qwen2.5-VL) or all frames of a clip together (Qwen3-VL)."""
    max_video_tokens: int | None = None
    """The other bound of ``cap_pixels_per_frame``. ``frame``: 90% of this many tokens for a clip, shared by its frames;
    ``None`` is Qwen2.5-VL's 128000 and binds from 300 frames on. ``clip``: this many tokens for a frame; ``None`` is
    Qwen3-VL's 768."""

    @property
    def factor(self) -> int:
        """Pixels of a token of the language model, each side."""
        return self.patch * self.merge


def smart_resize(height: int, width: int, geometry: VideoGeometry, frames: int = 1) -> tuple[int, int]:
    """The size that the frames of a clip are resized to: sides multiples of ``geometry.factor``, area within the
    bounds, aspect ratio kept.

    ``frames``: of the clip, before an odd number is filled up.

    Raises:
        BadInputError: an aspect ratio above 200.
    """
    factor = geometry.factor
    low = geometry.min_pixels
    if geometry.bounds == "clip":
        # Hugging Face refuses a clip that does not fill one patch; here it is filled up
        frames = max(frames, geometry.temporal_patch)
        if min(height, width) < factor:
            scale = max(factor / height, factor / width)
            height, width = int(height * scale), int(width * scale)
        counted = round(frames / geometry.temporal_patch) * geometry.temporal_patch
        high = (
            max(min((geometry.max_video_tokens or 768) * factor**2, geometry.max_pixels // frames), int(low * 1.05))
            * frames
        )
    else:
        budget = int((geometry.max_video_tokens or 128_000) * factor**2 * 0.9) * geometry.temporal_patch
        high = max(min(geometry.max_pixels, budget // frames), int(low * 1.05))
        frames = counted = 1
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise BadInputError(
            f"the critic cannot look at {width}x{height} frames: the aspect ratio must be at most {MAX_ASPECT_RATIO}. Crop the video."
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
    """The frames at the size the critic looks at, float in [0, 1]. Differentiable; done twice, it changes nothing
    more."""
    batch, frames, _, height, width = frames_BTCHW.shape
    size = smart_resize(height, width, geometry, frames)
    if size == (height, width):
        return frames_BTCHW
    # bicubic overshoots; uint8 images saturate there, and so do we
    return (
        F.interpolate(frames_BTCHW.flatten(0, 1), size=size, mode="bicubic", antialias=True)
        .clamp(0, 1)
        .unflatten(0, (batch, frames))
    )


def video_patches(frames_BTCHW: Tensor, geometry: VideoGeometry) -> tuple[Tensor, Tensor]:
    """Patches of B clips, one clip after the other. Differentiable.

    Args:
        frames_BTCHW: [0, 1], floating point. An odd number of frames is filled up by repeating the last.

    Returns: ``pixel_values_videos`` (B * grid_t * grid_h * grid_w, C * temporal_patch * patch * patch), dtype of the
        frames, in the order of Hugging Face (the patches of one merged token are neighbours), and ``video_grid_thw``
        (B, 3), int64, on the CPU.
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
