"""The seam between the critic and its model families: what one file a family (``qwen2_5_vl``, ``qwen3_vl``) must
bring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lowmem_drf.method.preprocess import VideoGeometry
from lowmem_drf.models.qwen_vl import qwen2_5_vl, qwen3_vl
from lowmem_drf.models.qwen_vl.packed_questions import Conversation


class Family(Protocol):
    """A module with these names. Written against transformers 5.17 to 5.23.

    ``grid``: a row of int64 per clip: time, rows and columns in patches, before merging; a family may add columns of
    its own. ``features``: (B, n, D) with n tokens of the language model a clip; the first columns, as wide as its
    embedding, take the place of the video tokens.
    """

    NAME: str
    """For people."""
    MODEL_TYPE: str
    """``model_type`` in config.json."""
    BOUNDS: Literal["frame", "clip"]
    """Whether its processor bounds the pixels of a frame or of a whole clip (``VideoGeometry.bounds``)."""

    def model_class(self) -> Any:
        """The class of transformers, imported here."""
        ...

    def patches(self, frames_BTCHW: Tensor, geometry: VideoGeometry) -> tuple[Tensor, Tensor]:
        """Frames in [0, 1] -> (pixel patches as the vision tower takes them, grid on the CPU). Differentiable."""
        ...

    def watch(self, model: Any, pixels: Tensor, grid: Tensor) -> Tensor:
        """The vision tower: pixel patches -> features."""
        ...

    def spell(self, video_token: str, grid: Sequence[int], fps: float) -> str:
        """The text that the processor puts in the place of the template's video token, with one ``video_token`` a
        block."""
        ...

    def blocks(self, vision_config: Any, grid: Sequence[int], fps: float) -> list[tuple[Tensor, int]]:
        """The video tokens' positions (3, tokens), block by block, relative to where the block starts, and how far it
        pushes what follows."""
        ...

    def read(
        self, model: Any, inputs_BLD: Tensor, features_BND: Tensor | None, slots_N: Tensor | None, **arguments: Any
    ) -> Any:
        """The language model's output (``last_hidden_state``, ``past_key_values``). ``features`` and their places in L,
        ``slots``, for what they add beyond the input; ``None`` where there is no video in these inputs."""
        ...


FAMILIES: tuple[Family, ...] = (qwen2_5_vl, qwen3_vl)


def family_of(model_type: str) -> Family:
    """The family of a ``model_type``. Raises ValueError, as transformers does for a model that it does not know."""
    for family in FAMILIES:
        if model_type == family.MODEL_TYPE:
            return family
    known = " or ".join(f"{family.MODEL_TYPE!r} ({family.NAME})" for family in FAMILIES)
    raise ValueError(f"it is a {model_type!r} model, and the critic must be a {known}")


@dataclass(frozen=True)
class Prefix:
    """Everything before the question, on the CPU."""

    ids_P: Tensor
    """int64, with the video token at every place of the video."""
    slots_N: Tensor
    """int64: those places, in the order of the features."""
    positions_3P: Tensor
    """int64: time, row, column; equal for text."""
    start: int
    """Position of the text that follows."""


def make_prefix(
    family: Family, conversation: Conversation, vision_config: Any, grid: Sequence[int], fps: float
) -> Prefix:
    """The prefix of a clip with the positions of transformers' ``get_rope_index``: text counts on, a block of the video
    starts where the text before it ended, and the text after it where the family's ``blocks`` say."""
    blocks = iter(family.blocks(vision_config, grid, fps))
    ids: list[int] = []
    slots: list[int] = []
    positions: list[Tensor] = []
    place = 0
    for token in conversation.prefix(lambda video_token: family.spell(video_token, grid, fps)):
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
