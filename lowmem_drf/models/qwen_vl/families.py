"""The interface between the critic and its model families: ``qwen2_5_vl``, ``qwen3_vl``, ``smolvlm.family``."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lowmem_drf.method.preprocess import VideoGeometry
from lowmem_drf.models.qwen_vl import qwen2_5_vl, qwen3_vl
from lowmem_drf.models.qwen_vl.attention import RangedAttention
from lowmem_drf.models.qwen_vl.common import Stacks
from lowmem_drf.models.qwen_vl.packed_questions import Conversation
from lowmem_drf.models.smolvlm import family as smolvlm


class Family(Protocol):
    """A module with these names, written against transformers 5.17 to 5.23.

    ``grid``: int64, one row per clip: time, rows and columns in patches, before merging; a family may append columns.
    ``features``: (B, n, D) for n video tokens per clip. Their first columns, as many as the embedding is wide, replace
    the embeddings of the video tokens.
    """

    NAME: str
    MODEL_TYPE: str
    """``model_type`` in config.json."""
    BOUNDS: Literal["frame", "clip"]
    """``VideoGeometry.bounds``: the processor limits the pixels of each frame, or of the whole clip."""

    def model_class(self) -> Any:
        """The class in transformers, imported lazily."""
        ...

    def fitted(self, geometry: VideoGeometry, config: Any) -> VideoGeometry:
        """The geometry for a model of this configuration. Raises BadInputError if they do not belong together."""
        ...

    def conversation(self, tokenizer: Any, config: Any) -> Conversation:
        """The chat template, with one video token for a clip. Raises BadInputError if there is none."""
        ...

    def stacks(self, model: Any) -> Stacks:
        """Where the model has its layers."""
        ...

    def speed_up(self, model: Any, attention: RangedAttention | None = None, head_dims: Collection[int] = ()) -> None:
        """Replaces parts of the vision tower by faster ones, if there are any. ``attention``: a kernel for heads whose
        width is in ``head_dims``."""
        ...

    def patches(self, frames_BTCHW: Tensor, geometry: VideoGeometry) -> tuple[Tensor, Tensor]:
        """Frames in [0, 1] -> (pixel patches for the vision tower, grid on the CPU). Differentiable."""
        ...

    def encode(self, model: Any, pixels: Tensor, grid: Tensor) -> Tensor:
        """Runs the vision tower: pixel patches -> features."""
        ...

    def placeholder(self, video_token: str, grid: Sequence[int], fps: float) -> str:
        """The text that the processor substitutes for the template's video token, with one ``video_token`` per block
        of tokens."""
        ...

    def blocks(self, vision_config: Any, grid: Sequence[int], fps: float) -> list[tuple[Tensor, int]]:
        """For each block of video tokens: positions (3, tokens) relative to the block's start, and the distance from
        the block's start to the text after it."""
        ...

    def decode(
        self, model: Any, inputs_BLD: Tensor, features_BND: Tensor | None, slots_N: Tensor | None, **arguments: Any
    ) -> Any:
        """Runs the language model; returns ``last_hidden_state`` and ``past_key_values``. ``features`` and their
        indices ``slots`` in L are for additions to deeper layers; ``None`` without a video."""
        ...


FAMILIES: tuple[Family, ...] = (qwen2_5_vl, qwen3_vl, smolvlm)


def family_of(model_type: str) -> Family:
    """Raises ValueError for an unknown ``model_type``, as transformers does."""
    for family in FAMILIES:
        if model_type == family.MODEL_TYPE:
            return family
    *others, last = (f"{family.MODEL_TYPE!r} ({family.NAME})" for family in FAMILIES)
    known = f"{', '.join(others)} or {last}"
    raise ValueError(f"it is a {model_type!r} model, and the critic must be a {known}")


@dataclass(frozen=True)
class Prefix:
    """The tokens before the question, on the CPU; tensors are int64."""

    ids_P: Tensor
    """The video token stands once for every row of the features."""
    slots_N: Tensor
    """Indices of the video tokens."""
    positions_3P: Tensor
    """Time, row, column; equal for text."""
    start: int
    """Position of the text that follows."""


def make_prefix(
    family: Family, conversation: Conversation, vision_config: Any, grid: Sequence[int], fps: float
) -> Prefix:
    """The prefix of a clip, with positions as transformers' ``get_rope_index`` computes them: consecutive for text; a
    video block starts where the text before it ended, and ``Family.blocks`` says where the text after it starts."""
    blocks = iter(family.blocks(vision_config, grid, fps))
    ids: list[int] = []
    slots: list[int] = []
    positions: list[Tensor] = []
    place = 0
    for token in conversation.prefix(lambda video_token: family.placeholder(video_token, grid, fps)):
        if token == conversation.video_token_id:
            block_3N, advance = next(blocks)
            slots += range(len(ids), len(ids) + block_3N.shape[1])
            ids += [token] * block_3N.shape[1]
            positions.append(block_3N + place)
            place += advance
        else:
            ids.append(token)
            positions.append(torch.full((3, 1), place))
            place += 1
    return Prefix(torch.tensor(ids), torch.tensor(slots), torch.cat(positions, dim=1), place)


def text_prefix(ids_P: Tensor) -> Prefix:
    """The prefix of a text in the video's place."""
    length = len(ids_P)
    return Prefix(ids_P, torch.empty(0, dtype=torch.int64), torch.arange(length).expand(3, -1), length)
