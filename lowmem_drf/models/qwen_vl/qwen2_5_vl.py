"""Qwen2.5-VL (``models.qwen_vl.families.Family``), after ``modeling_qwen2_5_vl.py`` of transformers 5.23.

A video is one block of tokens; its time positions count seconds (``tokens_per_second`` of the vision configuration).
They are computed here: before 5.18 transformers truncated the seconds per grid to an integer, and without them it takes
a wrong default.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lowmem_drf.method.preprocess import VideoGeometry, video_patches

NAME: str = "Qwen2.5-VL"
MODEL_TYPE: str = "qwen2_5_vl"
BOUNDS: Literal["frame", "clip"] = "frame"


def model_class() -> Any:
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration


def patches(frames_BTCHW: Tensor, geometry: VideoGeometry) -> tuple[Tensor, Tensor]:
    """``pixel_values_videos`` and ``video_grid_thw`` (B, 3)."""
    return video_patches(frames_BTCHW, geometry)


def watch(model: Any, pixels: Tensor, grid: Tensor) -> Tensor:
    """(B, n, D), D the language model's width."""
    visual = model.model.visual
    features: Tensor = visual(pixels.to(visual.dtype), grid_thw=grid.to(pixels.device)).pooler_output
    return features.view(len(grid), -1, features.shape[-1])


def spell(video_token: str, grid: Sequence[int], fps: float) -> str:
    """One block, no text."""
    return video_token


def blocks(vision_config: Any, grid: Sequence[int], fps: float) -> list[tuple[Tensor, int]]:
    """``fps``: of the frames shown; two slices of ``temporal_patch_size`` frames lie that many frames apart."""
    merge, interval = (
        vision_config.spatial_merge_size,
        vision_config.tokens_per_second * vision_config.temporal_patch_size / fps,
    )
    rows, columns = grid[1] // merge, grid[2] // merge
    axes = (torch.arange(grid[0]) * interval).long(), torch.arange(rows), torch.arange(columns)
    # what follows continues after the larger side, even if the time axis reaches further
    return [(torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1), max(rows, columns))]


def read(model: Any, inputs_BLD: Tensor, features_BND: Tensor | None, slots_N: Tensor | None, **arguments: Any) -> Any:
    """Features add nothing beyond the input."""
    return model.model.language_model(inputs_embeds=inputs_BLD, **arguments)
