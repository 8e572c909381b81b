"""Qwen2.5-VL as a ``types.Critic``: frames in [0, 1] and questions -> the logits of the answers, differentiable in the frames.

The vision tower runs once per clip, all questions of a clip share one sequence (``packing``), logits are computed only where answers are
scored. Position ids are computed here, as ``get_rope_index`` of transformers 5.23 does: before 5.18 it truncated the seconds per grid to
an integer, and without them it takes a wrong default. 4-bit weights are not here. Written after ``modeling_qwen2_5_vl.py`` of transformers
5.23 (5.17 agrees in all that is used).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowmem_drf.errors import BadInputError
from lowmem_drf.method.preprocess import VideoGeometry, video_patches
from lowmem_drf.models.packing import Conversation
from lowmem_drf.models.sources import complete, loading
from lowmem_drf.models.vision import speed_up_vision
from lowmem_drf.types import Answer, Question

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration

DEFAULT_FPS = 2.0
"""Qwen2.5-VL's own sampling rate."""


def load_critic(folder_or_id: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", fps: float | None = None) -> QwenCritic:
    """A Qwen2.5-VL in transformers layout, frozen, eval.

    ``fps``: frames per second of what the critic will be shown; ``None`` takes the rate in the model's preprocessor settings (2 where
    there is none). Raises BadInputError if the folder is not a Qwen2.5-VL, or cannot be loaded.
    """
    from transformers import AutoConfig, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    with loading("the critic", folder_or_id):
        config = AutoConfig.from_pretrained(folder_or_id)
        if config.model_type != "qwen2_5_vl":
            raise ValueError(f"it is a {config.model_type!r} model, and the critic must be a 'qwen2_5_vl' (Qwen2.5-VL)")
        model = complete(Qwen2_5_VLForConditionalGeneration.from_pretrained(folder_or_id, dtype=dtype, attn_implementation="sdpa", output_loading_info=True))
        tokenizer = AutoTokenizer.from_pretrained(folder_or_id)
        if not tokenizer.chat_template:  # before transformers 4.50 the template stood in a file of its own
            tokenizer.chat_template = _read_json(folder_or_id, "chat_template.json").get("chat_template")
        settings = _video_settings(folder_or_id)
    model = model.to(device).eval().requires_grad_(False)
    return QwenCritic(model, tokenizer, video_geometry(settings), fps=fps or float(settings.get("fps") or DEFAULT_FPS))


def video_geometry(settings: Mapping[str, Any]) -> VideoGeometry:
    """A preprocessor's JSON -> the numbers of ``method/preprocess.py``. Raises BadInputError where one is missing."""
    size = settings.get("size") or {}
    try:
        return VideoGeometry(
            patch=int(settings["patch_size"]),
            temporal_patch=int(settings["temporal_patch_size"]),
            merge=int(settings["merge_size"]),
            min_pixels=int(settings.get("min_pixels") or size["shortest_edge"]),
            max_pixels=int(settings.get("max_pixels") or size["longest_edge"]),
            mean=tuple(settings["image_mean"]),
            std=tuple(settings["image_std"]),
        )
    except KeyError as error:
        raise BadInputError(f"The critic's video preprocessor settings lack {error}: use the model's complete folder.") from error


class QwenCritic:
    """``types.Critic`` on a Qwen2.5-VL. Called with (frames_BTCHW in [0, 1], questions of each clip); gradient to the frames, none to the
    weights unless they were thawed.

    ``fps``: frames per second of the frames it is given; two temporal patches lie ``temporal_patch / fps`` seconds apart in its position
    ids.
    """

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, tokenizer: Any, geometry: VideoGeometry, fps: float = DEFAULT_FPS) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.geometry = geometry
        self.fps = fps
        self.conversation = Conversation(tokenizer, model.config.video_token_id)
        self._positions: dict[tuple[float, ...], tuple[Tensor, int]] = {}
        speed_up_vision(model.model.visual)

    def __call__(self, frames_BTCHW: Tensor, questions: Sequence[Sequence[Question]]) -> list[list[Answer]]:
        features_BND, grid_B3 = self.embed_video(frames_BTCHW)
        return self.answer_from_features(features_BND, grid_B3, questions)

    def embed_video(self, frames_BTCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Frames in [0, 1] -> the vision tower's tokens (B, n, D) and the patch grid (B, 3) int64 (time, rows, columns before merging)."""
        visual = self.model.model.visual
        pixels, grid_B3 = video_patches(frames_BTCHW, self.geometry)
        features = visual(pixels.to(visual.dtype), grid_thw=grid_B3.to(pixels.device)).pooler_output
        return features.view(frames_BTCHW.shape[0], -1, features.shape[-1]), grid_B3

    def answer_from_features(self, features_BND: Tensor, grid_B3: Tensor, questions: Sequence[Sequence[Question]]) -> list[list[Answer]]:
        """An answer per clip and question from ``embed_video``'s tokens. All clips have one grid; the number of questions may differ, and
        be 0."""
        if not any(questions):
            return [[] for _ in questions]
        logits_RV, sizes = self.scored_logits(features_BND, grid_B3, questions)
        rows = iter(logits_RV.split(sizes))
        conversation = self.conversation
        return [[Answer(next(rows), torch.tensor(conversation.ask(q).target), yes=conversation.yes, no=conversation.no) for q in clip] for clip in questions]

    def scored_logits(self, features_BND: Tensor, grid_B3: Tensor, questions: Sequence[Sequence[Question]]) -> tuple[Tensor, list[int]]:
        """The logits of all answers in one tensor (R, V), fp32 (fp64 of an fp64 model), and the answer tokens of each question, flat over
        clips: the vectorised form for who trains a critic."""
        packed = self.conversation.pack(self._prefix_length(features_BND), questions)
        device, embed = features_BND.device, self.model.get_input_embeddings()
        before, after = (
            torch.tensor([ids], device=device).expand(len(questions), -1) for ids in (self.conversation.before_video, self.conversation.after_video)
        )
        tail_BSD = embed(torch.cat([after, packed.ids_BS.to(device)], dim=1))
        inputs_BLD = torch.cat([embed(before), features_BND.to(tail_BSD.dtype), tail_BSD], dim=1)
        prefix_3P, start = self._prefix_positions(grid_B3)
        question_BS = packed.offset_BS + start
        positions_3BL = torch.cat([prefix_3P[:, None].expand(-1, len(questions), -1), question_BS.expand(3, -1, -1)], dim=-1)
        hidden_BLD = self.model.model.language_model(
            inputs_embeds=inputs_BLD, attention_mask=packed.mask_B1LL.to(device), position_ids=positions_3BL.to(device), use_cache=False
        ).last_hidden_state
        place_R = packed.place_R + prefix_3P.shape[1]
        logits_RV = self.model.lm_head(hidden_BLD[packed.clip_R.to(device), place_R.to(device)])
        return logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32)), packed.sizes

    def set_checkpointing(self, on: bool) -> None:
        """Layer-wise gradient checkpointing of the vision tower and the language model.

        transformers' layers checkpoint only in training mode, and a frozen model is in ``eval``: the mode is set on the layers themselves,
        not on what is in them, so nothing else behaves as in training. A later ``model.train()`` or ``model.eval()`` undoes that: call
        this again after it.
        """
        from torch.utils.checkpoint import checkpoint
        from transformers.modeling_layers import GradientCheckpointingLayer

        for module in self.model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
                module.gradient_checkpointing = module.training = on

    def _prefix_length(self, features_BND: Tensor) -> int:
        return len(self.conversation.before_video) + features_BND.shape[1] + len(self.conversation.after_video)

    def _prefix_positions(self, grid_B3: Tensor) -> tuple[Tensor, int]:
        """Positions (3, P) of the prefix on the CPU (time, row, column; equal for text), and where the text after it starts."""
        t, rows, columns = (int(n) for n in grid_B3[0])
        if bool((grid_B3 != grid_B3[0]).any()):
            raise BadInputError("The clips of one call must have the same size and number of frames.")
        vision = self.model.config.vision_config
        interval = vision.tokens_per_second * vision.temporal_patch_size / self.fps
        key = (t, rows, columns, interval)
        if key not in self._positions:
            rows, columns = rows // vision.spatial_merge_size, columns // vision.spatial_merge_size
            axes = (torch.arange(t) * interval).long(), torch.arange(rows), torch.arange(columns)
            before = len(self.conversation.before_video)
            video_3N = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1) + before
            start = before + max(rows, columns)  # where HF continues, even if the time axis reaches further
            after = start + len(self.conversation.after_video)
            text = [torch.arange(*span).expand(3, -1) for span in ((0, before), (start, after))]
            self._positions[key] = torch.cat([text[0], video_3N, text[1]], dim=1), after
        return self._positions[key]


def _video_settings(folder_or_id: str) -> dict[str, Any]:
    """The video processor's settings, where transformers looks for them, newest place first. Read as JSON: the class itself needs
    torchvision."""
    for settings in (
        _read_json(folder_or_id, "video_preprocessor_config.json"),
        _read_json(folder_or_id, "processor_config.json").get("video_processor"),
        _read_json(folder_or_id, "preprocessor_config.json"),
    ):
        if settings:
            return dict(settings)
    raise OSError("it has no video_preprocessor_config.json, processor_config.json or preprocessor_config.json")


def _read_json(folder_or_id: str, name: str) -> dict[str, Any]:
    """A JSON file of a model folder or of the hub; empty where there is none."""
    from transformers.utils import cached_file

    path = cached_file(
        folder_or_id,
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return {}
    content: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    return content
