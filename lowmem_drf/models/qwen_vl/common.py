"""What Qwen's generations have in common behind ``families.Family``."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from lowmem_drf.errors import BadInputError
from lowmem_drf.method.preprocess import VideoGeometry
from lowmem_drf.models.qwen_vl.attention import RangedAttention
from lowmem_drf.models.qwen_vl.packed_questions import Conversation
from lowmem_drf.models.qwen_vl.vision import speed_up_vision


class Stacks(NamedTuple):
    """The parts of a critic's model that are streamed, gathered and planned."""

    patch_embed: Any
    """The module in front of the vision blocks."""
    blocks: Any
    """Of the vision tower, a ``ModuleList``."""
    language: Any
    """The language model: ``layers``, each with ``self_attn`` and ``input_layernorm``, and ``config``."""


def stacks(model: Any) -> Stacks:
    visual = model.model.visual
    return Stacks(visual.patch_embed, visual.blocks, model.model.language_model)


def fitted(geometry: VideoGeometry, config: Any) -> VideoGeometry:
    """Raises BadInputError if the preprocessor's patches are not the model's."""
    vision = config.vision_config
    pairs = {
        "patch_size": (geometry.patch, vision.patch_size),
        "merge_size": (geometry.merge, vision.spatial_merge_size),
        "temporal_patch_size": (geometry.temporal_patch, vision.temporal_patch_size),
    }
    for name, (ours, theirs) in pairs.items():
        if ours != theirs:
            raise BadInputError(
                f"The critic's preprocessor and model do not belong together: {name} is {ours} in the video "
                f"preprocessor's settings and {theirs} in the model's vision_config. "
                "Take preprocessor_config.json and config.json from one model."
            )
    return geometry


def conversation(tokenizer: Any, config: Any) -> Conversation:
    return Conversation(tokenizer, config.video_token_id)


def speed_up(model: Any, attention: RangedAttention | None = None, head_dims: Collection[int] = ()) -> None:
    """Faster forms of parts of the vision tower; ``attention`` is used if it computes heads of this width."""
    vision = model.config.vision_config
    fits = vision.hidden_size // vision.num_heads in head_dims
    speed_up_vision(model.model.visual, attention if fits else None)
