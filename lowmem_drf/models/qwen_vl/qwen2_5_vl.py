"""Qwen2.5-VL (``models.qwen_vl.families.Family``), after ``modeling_qwen2_5_vl.py`` of transformers 5.23.

A video is one block of tokens; its time positions count seconds times ``tokens_per_second``. They are computed here,
because transformers before 5.18 truncated the seconds per grid to an integer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lowmem_drf.method.preprocess import VideoGeometry, video_patches
from lowmem_drf.models.qwen_vl import common

NAME: str = "Qwen2.5-VL"
MODEL_TYPE: str = "qwen2_5_vl"
BOUNDS: Literal["frame", "clip"] = "frame"
fitted, conversation, stacks, speed_up = common.fitted, common.conversation, common.stacks, common.speed_up


def model_class() -> Any:
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration


def patches(frames_BTCHW: Tensor, geometry: VideoGeometry) -> tuple[Tensor, Tensor]:
    """``pixel_values_videos`` and ``video_grid_thw`` (B, 3)."""
    return video_patches(frames_BTCHW, geometry)


def encode(model: Any, pixels: Tensor, grid: Tensor) -> Tensor:
    """(B, n, D) with D the language model's width."""
    visual = model.model.visual
    features: Tensor = visual(pixels.to(visual.dtype), grid_thw=grid.to(pixels.device)).pooler_output
    return features.view(len(grid), -1, features.shape[-1])


def placeholder(video_token: str, grid: Sequence[int], fps: float) -> str:
    """One block without text."""
    return video_token


def blocks(vision_config: Any, grid: Sequence[int], fps: float) -> list[tuple[Tensor, int]]:
    """Slices of ``temporal_patch_size`` frames follow one another at ``fps / temporal_patch_size`` per second."""
    interval = vision_config.tokens_per_second * vision_config.temporal_patch_size / fps
    rows, columns = (side // vision_config.spatial_merge_size for side in grid[1:3])
    axes = (torch.arange(grid[0]) * interval).long(), torch.arange(rows), torch.arange(columns)
    # the text continues after the larger side, even if the time axis reaches further
    return [(torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1), max(rows, columns))]


def decode(
    model: Any, inputs_BLD: Tensor, features_BND: Tensor | None, slots_N: Tensor | None, **arguments: Any
) -> Any:
    """Features enter through the input embeddings alone."""
    return model.model.language_model(inputs_embeds=inputs_BLD, **arguments)
