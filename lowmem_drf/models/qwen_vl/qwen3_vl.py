"""Qwen3-VL (``models.qwen_vl.families.Family``), after ``modeling_qwen3_vl.py``, ``processing_qwen3_vl.py`` and
``video_processing_qwen3_vl.py`` of transformers 5.23.

Each slice of a video is a block behind its timestamp in text (``<0.3 seconds>``), so positions do not depend on
seconds. Features of some vision blocks are added to the first layers of the language model (DeepStack). The grid has a
fourth column, the number of frames, because the timestamp of a slice padded to ``temporal_patch_size`` frames depends
on it. The template's ``<|vision_start|>`` and ``<|vision_end|>`` stay around the blocks, as in transformers 5.17 to
5.23.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lowmem_drf.method.preprocess import VideoGeometry, video_patches
from lowmem_drf.models.qwen_vl import common

NAME: str = "Qwen3-VL"
MODEL_TYPE: str = "qwen3_vl"
BOUNDS: Literal["frame", "clip"] = "clip"
fitted, conversation, stacks, speed_up = common.fitted, common.conversation, common.stacks, common.speed_up


def model_class() -> Any:
    from transformers import Qwen3VLForConditionalGeneration

    return Qwen3VLForConditionalGeneration


def patches(frames_BTCHW: Tensor, geometry: VideoGeometry) -> tuple[Tensor, Tensor]:
    """``pixel_values_videos``, and ``video_grid_thw`` with the number of frames, (B, 4)."""
    pixels, grid_B3 = video_patches(frames_BTCHW, geometry)
    return pixels, torch.cat([grid_B3, torch.full((len(grid_B3), 1), frames_BTCHW.shape[1])], dim=1)


def encode(model: Any, pixels: Tensor, grid: Tensor) -> Tensor:
    """(B, n, (1 + S) * D): merged tokens, then those of the S DeepStack blocks, with D the language model's width."""
    visual = model.model.visual
    seen = visual(pixels.to(visual.dtype), grid_thw=grid[:, :3].to(pixels.device))
    features = torch.cat([seen.pooler_output, *seen.deepstack_features], dim=-1)
    return features.view(len(grid), -1, features.shape[-1])


def placeholder(video_token: str, grid: Sequence[int], fps: float) -> str:
    """Each slice behind the mean time of its first and last frame (``Qwen3VLProcessor.replace_video_token``)."""
    slices, _, _, frames = grid
    size = -(-frames // slices)
    times = [min(i, frames - 1) / fps for i in range(slices * size)]
    means = [(times[i] + times[i + size - 1]) / 2 for i in range(0, len(times), size)]
    return "".join(f"<{mean:.1f} seconds><|vision_start|>{video_token}<|vision_end|>" for mean in means)


def blocks(vision_config: Any, grid: Sequence[int], fps: float) -> list[tuple[Tensor, int]]:
    """One block per slice; the time axis is constant within it."""
    rows, columns = (side // vision_config.spatial_merge_size for side in grid[1:3])
    axes = torch.zeros(1, dtype=torch.int64), torch.arange(rows), torch.arange(columns)
    return [(torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1), max(rows, columns))] * grid[0]


def decode(
    model: Any, inputs_BLD: Tensor, features_BND: Tensor | None, slots_N: Tensor | None, **arguments: Any
) -> Any:
    """DeepStack features are added after the first layers, at the video tokens."""
    width = inputs_BLD.shape[-1]
    if features_BND is not None and slots_N is not None and features_BND.shape[-1] > width:
        mask_BL = torch.zeros(inputs_BLD.shape[:2], dtype=torch.bool, device=inputs_BLD.device)
        mask_BL[:, slots_N] = True
        deep = features_BND[..., width:].flatten(0, 1).split(width, dim=-1)
        arguments |= {"visual_pos_masks": mask_BL, "deepstack_visual_embeds": list(deep)}
    return model.model.language_model(inputs_embeds=inputs_BLD, **arguments)
