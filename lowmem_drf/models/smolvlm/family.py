"""SmolVLM2 (``models.qwen_vl.families.Family``), after ``modeling_smolvlm.py``, ``processing_smolvlm.py`` and
``video_processing_smolvlm.py`` of transformers 5.24.

Every frame is a picture of its own: a square, seen by a SigLIP tower, whose patches a pixel shuffle merges to 64 or 81
tokens behind the frame's time in text. Positions are those of a text. The grid has a clip's frames, and rows and
columns of a frame in tokens.

The processor resizes by Lanczos where torchvision can, and else, as on a card, by bicubic; here it is bicubic. A frame
that is exactly gray (0.5) counts as padding in transformers; here it is a frame.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from lowmem_drf.errors import BadInputError
from lowmem_drf.method.preprocess import VideoGeometry, resized
from lowmem_drf.models.qwen_vl.attention import RangedAttention
from lowmem_drf.models.qwen_vl.common import Stacks
from lowmem_drf.models.qwen_vl.packed_questions import Conversation
from lowmem_drf.models.smolvlm.numbers import in_words

NAME: str = "SmolVLM2"
MODEL_TYPE: str = "smolvlm"
BOUNDS: Literal["frame", "clip"] = "frame"

TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}{{ ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for line in message['content'] %}"
    "{% if line['type'] == 'text' %}{{ line['text'] }}{% elif line['type'] == 'video' %}{{ '<image>' }}{% endif %}"
    "{% endfor %}{% endif %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""``DEFAULT_CHAT_TEMPLATE`` of its processor for clips and texts, with ``<image>`` where the clip's frames go."""
INTRO = "You are provided the following series of {count} frames from a {length} [H:MM:SS] video.\n"
FRAME = "\nFrame from {minutes:02d}:{seconds:02d}:<fake_token_around_image><global-img>{image}<fake_token_around_image>"
OUTRO = "\n\n"
"""Behind the frames. It is tokenised with the question, because its line breaks merge with what follows."""


def model_class() -> Any:
    from transformers import SmolVLMForConditionalGeneration

    return SmolVLMForConditionalGeneration


def fitted(geometry: VideoGeometry, config: Any) -> VideoGeometry:
    """With the patches of the model. Raises BadInputError if the preprocessor's frames are not the model's."""
    vision = config.vision_config
    if geometry.square is None or geometry.square[1] != vision.image_size:
        given = "no max_image_size" if geometry.square is None else f"max_image_size = {geometry.square[1]}"
        raise BadInputError(
            "The critic's preprocessor and model do not belong together: the preprocessor's settings have "
            f"{given}, and the model's vision_config has image_size = {vision.image_size}. "
            "Take preprocessor_config.json and config.json from one model."
        )
    return replace(geometry, patch=vision.patch_size, merge=config.scale_factor)


def conversation(tokenizer: Any, config: Any) -> Conversation:
    tokenizer.chat_template = TEMPLATE
    return Conversation(tokenizer, config.image_token_id, lead=OUTRO, says=" ")


def stacks(model: Any) -> Stacks:
    inner = model.model
    return Stacks(inner.vision_model.embeddings, inner.vision_model.encoder.layers, inner.text_model)


def speed_up(model: Any, attention: RangedAttention | None = None, head_dims: Collection[int] = ()) -> None:
    """Nothing: transformers calls the tower's attention once for all frames."""


def patches(frames_BTCHW: Tensor, geometry: VideoGeometry) -> tuple[Tensor, Tensor]:
    """``pixel_values`` of all frames, (B * T, 3, side, side), and the grid (B, 3). Differentiable."""
    x = resized(frames_BTCHW, geometry)
    x = (x - x.new_tensor(geometry.mean)[:, None, None]) / x.new_tensor(geometry.std)[:, None, None]
    batch, frames, _, side, _ = x.shape
    tokens = side // geometry.patch // geometry.merge
    return x.flatten(0, 1), torch.tensor([[frames, tokens, tokens]] * batch)


def encode(model: Any, pixels: Tensor, grid: Tensor) -> Tensor:
    """(B, n, D). No patch is padding, so the tower needs no mask."""
    inner, tower = model.model, model.model.vision_model
    side = pixels.shape[-1] // tower.patch_size
    whole = torch.ones(len(pixels), side, side, dtype=torch.bool, device=pixels.device)
    x = tower.embeddings(pixel_values=pixels.to(model.dtype), patch_attention_mask=whole)
    x = tower.encoder(inputs_embeds=x, attention_mask=None).last_hidden_state
    features: Tensor = inner.connector(tower.post_layernorm(x))
    return features.reshape(len(grid), -1, features.shape[-1])


def placeholder(video_token: str, grid: Sequence[int], fps: float) -> str:
    """As ``SmolVLMProcessor.replace_video_token`` of a clip that consists of these frames at this rate."""
    count = grid[0]
    hours, rest = divmod(int(count / fps), 3600)
    times = [divmod(int(i / fps), 60) for i in range(count)]
    frames = (FRAME.format(minutes=minutes, seconds=seconds, image=video_token) for minutes, seconds in times)
    length = f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
    return INTRO.format(count=in_words(count), length=length) + "".join(frames)


def blocks(vision_config: Any, grid: Sequence[int], fps: float) -> list[tuple[Tensor, int]]:
    """One block per frame, with the positions of a text."""
    count, rows, columns = grid
    tokens = rows * columns
    return [(torch.arange(tokens).expand(3, -1), tokens)] * count


def decode(
    model: Any, inputs_BLD: Tensor, features_BND: Tensor | None, slots_N: Tensor | None, **arguments: Any
) -> Any:
    """One axis of positions, of three equal ones."""
    arguments["position_ids"] = arguments["position_ids"][0]
    return model.model.text_model(inputs_embeds=inputs_BLD, **arguments)
