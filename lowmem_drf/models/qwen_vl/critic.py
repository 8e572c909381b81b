"""A Qwen VLM as a ``types.Critic``: frames in [0, 1] and questions -> the logits of the answers, differentiable in the
frames.

The vision tower runs once per clip, all questions of a clip share one sequence (``packing``), logits are computed only
where answers are scored. What differs between the model families is in ``families``; position ids are computed there,
as ``get_rope_index`` does. Written after transformers 5.23 (5.17 agrees in all that is used).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowmem_drf.errors import BadInputError
from lowmem_drf.memory.host import HostStore
from lowmem_drf.memory.streaming import HostEmbedding, Streamed
from lowmem_drf.method.preprocess import VideoGeometry
from lowmem_drf.models.qwen_vl.attention import RangedAttention, use_ranges
from lowmem_drf.models.qwen_vl.families import Family, Prefix, family_of, make_prefix
from lowmem_drf.models.qwen_vl.files import (
    check_geometry,
    check_tokenizer,
    load_tokenizer,
    video_geometry,
    video_settings,
)
from lowmem_drf.models.qwen_vl.packed_questions import Conversation
from lowmem_drf.models.qwen_vl.vision import speed_up_vision
from lowmem_drf.models.weights.quant import (
    Quant,
    check_quantised,
    in_critic,
    loading_arguments,
    require_library,
    take_over,
)
from lowmem_drf.models.weights.sources import complete, loading
from lowmem_drf.types import Answer, Question

DEFAULT_FPS = 2.0
"""The sampling rate of Qwen2.5-VL and Qwen3-VL."""


def load_critic(
    folder_or_id: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    fps: float | None = None,
    quant: Quant = "none",
) -> QwenCritic:
    """A Qwen2.5-VL or Qwen3-VL in transformers layout, frozen, eval.

    ``fps``: frames per second of what the critic will be shown; ``None`` takes the rate in the model's preprocessor
    settings (2 where there is none). ``quant="nf4"``: the linears of the language model's layers in 4 bit, all else in
    ``dtype``.

    Raises: BadInputError: not a model of a known family, it cannot be loaded, its files do not belong together, or
        bitsandbytes is missing. LowmemError: it was not quantised as asked.
    """
    from transformers import AutoConfig

    require_library(quant)
    with loading("the critic", folder_or_id):
        config = AutoConfig.from_pretrained(folder_or_id)
        cls = family_of(config.model_type).model_class()
        already = bool(getattr(config, "quantization_config", None))
        if quant == "none" and already:
            raise ValueError("its weights are quantised already; -s critic.quant=nf4 takes those of bitsandbytes")
        settings, tokenizer = video_settings(folder_or_id), load_tokenizer(folder_or_id)
        arguments = loading_arguments(quant, dtype, device, already)
        model = complete(
            cls.from_pretrained(
                folder_or_id, dtype=dtype, attn_implementation="sdpa", output_loading_info=True, **arguments
            )
        )
    if quant == "none":
        model = model.to(device)
    else:
        take_over(model, dtype)
        check_quantised(model, quant, in_critic)
    return QwenCritic(
        model.eval().requires_grad_(False),
        tokenizer,
        video_geometry(settings),
        fps=fps or float(settings.get("fps") or DEFAULT_FPS),
    )


class QwenCritic:
    """``types.Critic`` on a Qwen2.5-VL or Qwen3-VL. Called with (frames_BTCHW in [0, 1], questions of each clip);
    gradient to the frames, none to the weights unless they were thawed.

    ``fps``: frames per second of the frames it is given: they reach the model as time positions or as times in words.

    Raises:
        BadInputError: tokenizer, preprocessor and model do not belong together, or there is no usable chat template.
    """

    def __init__(self, model: Any, tokenizer: Any, geometry: VideoGeometry, fps: float = DEFAULT_FPS) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.fps = fps
        self.geometry = replace(geometry, bounds=self.family.BOUNDS)
        check_tokenizer(tokenizer, self._embedding.num_embeddings)
        check_geometry(geometry, model.config.vision_config)
        self.conversation = Conversation(tokenizer, model.config.video_token_id)
        self._prefixes: dict[tuple[float, ...], Prefix] = {}
        self._ranges = False
        self._streamed: Streamed | None = None
        self._streamed_modules: list[Any] = []
        speed_up_vision(model.model.visual)

    @property
    def family(self) -> Family:
        """What differs between model families. A module, so not kept: critics can be copied."""
        return family_of(self.model.config.model_type)

    @property
    def _embedding(self) -> Any:
        """``nn.Embedding``, or ``HostEmbedding``."""
        return self.model.get_input_embeddings()

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        embedding = self._embedding
        return embedding.device if isinstance(embedding, HostEmbedding) else torch.device(embedding.weight.device)

    def __call__(self, frames_BTCHW: Tensor, questions: Sequence[Sequence[Question]]) -> list[list[Answer]]:
        features_BND, grid = self.embed_video(frames_BTCHW)
        return self.answer_from_features(features_BND, grid, questions)

    def embed_video(self, frames_BTCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Frames in [0, 1] -> what the vision tower says, (B, n, D) with n tokens of the language model a clip, and its
        grid, int64 on the CPU: (B, 3) time, rows, columns before merging; Qwen3-VL's (B, 4) has the number of frames
        besides."""
        pixels, grid = self.family.patches(frames_BTCHW, self.geometry)
        return self.family.watch(self.model, pixels, grid), grid

    def answer_from_features(
        self, features_BND: Tensor, grid: Tensor, questions: Sequence[Sequence[Question]]
    ) -> list[list[Answer]]:
        """An answer per clip and question from ``embed_video``'s results. All clips have one grid; the number of
        questions may differ, and be 0."""
        if not any(questions):
            return [[] for _ in questions]
        logits_RV, sizes = self.scored_logits(features_BND, grid, questions)
        rows = iter(logits_RV.split(sizes))
        conversation = self.conversation
        return [
            [
                Answer(next(rows), torch.tensor(conversation.ask(q).target), yes=conversation.yes, no=conversation.no)
                for q in clip
            ]
            for clip in questions
        ]

    def scored_logits(
        self, features_BND: Tensor, grid: Tensor, questions: Sequence[Sequence[Question]]
    ) -> tuple[Tensor, list[int]]:
        """The logits of all answers in one tensor (R, V), fp32 (fp64 of an fp64 model), and the answer tokens of each
        question, flat over clips: the vectorised form for who trains a critic.

        Raises:
            BadInputError: clips of different sizes, or more tokens than the model was made for.
        """
        prefix, device = self.prefix(grid), features_BND.device
        length = len(prefix.ids_P)
        self._require_room(prefix, max(len(self.conversation.ask(q).ids) for clip in questions for q in clip))
        packed = self.conversation.pack(length, questions, self._ranges)
        ids_BL = torch.cat([prefix.ids_P.expand(len(questions), -1), packed.ids_BS], dim=1)
        question_BS = packed.offset_BS + prefix.start
        positions_3BL = torch.cat(
            [prefix.positions_3P[:, None].expand(-1, len(questions), -1), question_BS.expand(3, -1, -1)], dim=-1
        )
        hidden_BLD = self._read(
            ids_BL, positions_3BL, features_BND, prefix, packed.mask.to(device), use_cache=False
        ).last_hidden_state
        logits_RV = self.model.lm_head(hidden_BLD[packed.clip_R.to(device), (packed.place_R + length).to(device)])
        return logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32)), packed.sizes

    @torch.no_grad()
    def generate(self, text: str, frames_TCHW: Tensor | None = None, max_new_tokens: int = 256) -> str:
        """The model's answer to a user's text, with or without a clip in [0, 1] before it: greedy, without special
        tokens.

        As ``model.generate(do_sample=False)`` of transformers, but for a repetition penalty in the model's own
        settings, which is not applied.

        Raises:
            BadInputError: more tokens than the model was made for.
        """
        from lowmem_drf.models.qwen_vl.generation import greedy

        features, prefix, device = None, None, self.device
        if frames_TCHW is None:
            ids = torch.tensor(self.conversation.prompt(text))
            positions_3L = torch.arange(len(ids)).expand(3, -1)
        else:
            features, grid = self.embed_video(frames_TCHW[None].to(device))
            prefix = self.prefix(grid)
            tail = torch.tensor(self.conversation.tail(text))
            self._require_room(prefix, len(tail) + max_new_tokens)
            ids = torch.cat([prefix.ids_P, tail])
            positions_3L = torch.cat(
                [prefix.positions_3P, (prefix.start + torch.arange(len(tail))).expand(3, -1)], dim=1
            )

        def step(ids_1L: Tensor, positions_31L: Tensor, cache: Any) -> tuple[Tensor, Any]:
            seen = (features, prefix) if cache is None else (None, None)
            out = self._read(ids_1L, positions_31L, *seen, mask=None, past_key_values=cache, use_cache=True)
            return self.model.lm_head(out.last_hidden_state[:, -1]), out.past_key_values

        said = greedy(step, ids, positions_3L, self._ends(), max_new_tokens)
        return str(self.tokenizer.decode(said, skip_special_tokens=True)).strip()

    def set_attention(self, attention: RangedAttention | None, head_dims: Collection[int] = ()) -> None:
        """The kernel for the attentions of language model and vision tower, each where its heads are of one of
        ``head_dims``. ``None``: PyTorch's SDPA, with a mask of tokens x tokens for the questions."""
        text, vision = self.model.config.get_text_config(), self.model.config.vision_config
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self._ranges = attention is not None and width in head_dims
        use_ranges(self.model, attention if self._ranges else None)
        speed_up_vision(
            self.model.model.visual, attention if vision.hidden_size // vision.num_heads in head_dims else None
        )

    def set_checkpointing(self, on: bool) -> None:
        """Layer-wise gradient checkpointing of the vision tower and the language model, whatever mode they are in.

        transformers' layers checkpoint only in training mode, and a frozen model is in ``eval``. Here each layer's
        ``forward`` is recomputed in the backward as it is: no module changes its mode, so dropout stays off, and
        without gradients (``generate``) nothing changes.
        """
        from transformers.modeling_layers import GradientCheckpointingLayer

        layers = [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]
        for module in layers:
            module.__dict__.pop("forward", None)
        if self._streamed is not None:
            for place, module in enumerate(self._streamed_modules):
                module.__dict__.pop("forward", None)
                module.forward = self._streamed.forward(place, module.forward)
        for module in layers if on else ():
            module.forward = partial(_recomputed, module.forward)

    @property
    def leaves(self) -> list[Any]:
        """The modules whose code reads weights of submodules without calling them, and the layers: who gathers weights
        module by module takes each of these as one."""
        return [
            self.model.model.visual.patch_embed,
            *self.model.model.visual.blocks,
            *self.model.model.language_model.layers,
        ]

    def stream(self, device: torch.device, store: HostStore) -> Streamed:
        """From here on the weights of the vision tower's blocks, of the language model's layers and of lm_head come to
        ``device`` one after another, whenever they are needed, and the embedding, a GiB of the 7B model, stays on the
        host. ``set_checkpointing`` comes after it: a layer that is not computed again in its backward keeps its weights
        till then."""
        if not isinstance(self._embedding, HostEmbedding):
            self.model.set_input_embeddings(HostEmbedding(self._embedding, device, store))
        modules = [*self.model.model.visual.blocks, *self.model.model.language_model.layers, self.model.lm_head]
        streamed = Streamed(modules, device, store)
        self._streamed_modules, self._streamed = modules, streamed
        return streamed

    def prefix(self, grid: Tensor) -> Prefix:
        """Everything before the question for clips of one grid. Raises BadInputError where the clips differ."""
        if bool((grid != grid[0]).any()):
            raise BadInputError("The clips of one call must have the same size and number of frames.")
        key = (*(int(n) for n in grid[0]), self.fps)
        if key not in self._prefixes:
            self._prefixes[key] = make_prefix(
                self.family, self.conversation, self.model.config.vision_config, grid[0].tolist(), self.fps
            )
        return self._prefixes[key]

    def _read(
        self,
        ids_BL: Tensor,
        positions_3BL: Tensor,
        features: Tensor | None,
        prefix: Prefix | None,
        mask: Tensor | None,
        **arguments: Any,
    ) -> Any:
        """The language model over token ids, the video's features in the places that ``prefix`` keeps for them."""
        device, slots = self.device, None
        inputs_BLD = self._embedding(ids_BL.to(device))
        if features is not None and prefix is not None:
            slots, features = prefix.slots_N.to(device), features.to(inputs_BLD.dtype)
            inputs_BLD = inputs_BLD.index_copy(1, slots, features[..., : inputs_BLD.shape[-1]])
        return self.family.read(
            self.model,
            inputs_BLD,
            features,
            slots,
            attention_mask=mask,
            position_ids=positions_3BL.to(device),
            **arguments,
        )

    def _require_room(self, prefix: Prefix, more: int) -> None:
        limit = self.model.config.get_text_config().max_position_embeddings
        if (tokens := len(prefix.ids_P) + more) > limit:
            raise BadInputError(
                f"The critic would read {tokens} tokens, {len(prefix.slots_N)} of them the video's, and was made for {limit} (max_position_embeddings). "
                "Show it fewer frames (critic.frames) or smaller ones (video.width, video.height)."
            )

    def _ends(self) -> set[int]:
        """The tokens after which nothing more is said."""
        ends = self.model.generation_config.eos_token_id
        return {*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id} - {None}


def _recomputed(forward: Callable[..., Any], *inputs: Any, **arguments: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    if not torch.is_grad_enabled():
        return forward(*inputs, **arguments)
    return checkpoint(forward, *inputs, use_reentrant=False, **arguments)
