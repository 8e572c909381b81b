"""A VLM as a ``types.Critic``: frames in [0, 1] and questions -> logits of the answers, differentiable in the
frames.

The vision tower runs once per clip, all questions of a clip share one sequence (``packed_questions``), and logits are
computed only at scored positions. ``families`` holds the differences between model families. Written against
transformers 5.17 to 5.23.
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
from lowmem_drf.models.qwen_vl.common import Stacks
from lowmem_drf.models.qwen_vl.families import Family, Prefix, family_of, make_prefix, text_prefix
from lowmem_drf.models.qwen_vl.files import load_tokenizer, require_fit, video_geometry, video_settings
from lowmem_drf.models.weights import quant as quantisation
from lowmem_drf.models.weights.finite import refuse_model
from lowmem_drf.models.weights.quant import Quant
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
) -> VLMCritic:
    """Loads a model of one of the ``FAMILIES`` in transformers layout, frozen, in eval mode.

    Args:
        fps: frame rate of the clips it will judge. ``None``: the rate in its preprocessor settings, else 2.
        quant: ``nf4`` stores the linear layers of the language model in 4 bits, all else in ``dtype``.

    Raises:
        BadInputError: unknown family, files that are missing or do not fit together, or no bitsandbytes.
        LowmemError: other layers were quantised than asked for.
    """
    from transformers import AutoConfig

    quantisation.require_library(quant)
    with loading("the critic", folder_or_id):
        config = AutoConfig.from_pretrained(folder_or_id)
        cls = family_of(config.model_type).model_class()
        already = bool(getattr(config, "quantization_config", None))
        if quant == "none" and already:
            raise ValueError("its weights are quantised already; -s critic.quant=nf4 takes those of bitsandbytes")
        settings, tokenizer = video_settings(folder_or_id), load_tokenizer(folder_or_id)
        arguments = quantisation.loading_arguments(quant, dtype, device, already)
        arguments |= {"dtype": dtype, "attn_implementation": "sdpa", "output_loading_info": True}
        model = complete(cls.from_pretrained(folder_or_id, **arguments))
    if quant == "none":
        model = model.to(device)
    else:
        quantisation.convert_bnb(model, dtype)
        quantisation.check_quantised(model, quant, quantisation.in_critic)
    model.eval().requires_grad_(False)
    refuse_model(model, f"the critic {folder_or_id}")
    return VLMCritic(model, tokenizer, video_geometry(settings), fps or float(settings.get("fps") or DEFAULT_FPS))


class VLMCritic:
    """``types.Critic`` on a model of any family, called with (frames_BTCHW in [0, 1], questions of each clip).

    Gradients flow to the frames, and to the weights only if they were unfrozen. ``fps``: frame rate of the clips; it
    reaches the model as time positions or as timestamps in text.

    Raises BadInputError: tokenizer, preprocessor and model do not fit together, or there is no usable chat template.
    """

    def __init__(self, model: Any, tokenizer: Any, geometry: VideoGeometry, fps: float = DEFAULT_FPS) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.fps = fps
        require_fit(model, tokenizer)
        self.geometry = self.family.fitted(replace(geometry, bounds=self.family.BOUNDS), model.config)
        self.conversation = self.family.conversation(tokenizer, model.config)
        self._prefixes: dict[tuple[float, ...], Prefix] = {}
        self._ranges = False
        self._streamed: Streamed | None = None
        self._streamed_modules: list[Any] = []
        self.family.speed_up(model)

    @property
    def family(self) -> Family:
        """Looked up each time: it is a module, and critics must stay deep-copyable."""
        return family_of(self.model.config.model_type)

    @property
    def stacks(self) -> Stacks:
        return self.family.stacks(self.model)

    @property
    def _embedding(self) -> Any:
        """``nn.Embedding``, or ``HostEmbedding``."""
        return self.model.get_input_embeddings()

    @property
    def device(self) -> torch.device:
        """Compute device."""
        embedding = self._embedding
        return embedding.device if isinstance(embedding, HostEmbedding) else torch.device(embedding.weight.device)

    def __call__(self, frames_BTCHW: Tensor, questions: Sequence[Sequence[Question]]) -> list[list[Answer]]:
        features_BND, grid = self.embed_video(frames_BTCHW)
        return self.answer_from_features(features_BND, grid, questions)

    def embed_video(self, frames_BTCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Frames in [0, 1] -> (features (B, n, D) for n video tokens per clip, ``Family``'s grid)."""
        pixels, grid = self.family.patches(frames_BTCHW, self.geometry)
        return self.family.encode(self.model, pixels, grid), grid

    def answer_from_features(
        self, features_BND: Tensor, grid: Tensor, questions: Sequence[Sequence[Question]]
    ) -> list[list[Answer]]:
        """An answer per clip and question, from the results of ``embed_video``. All clips share one grid; the number
        of questions may differ, and may be 0."""
        if not any(questions):
            return [[] for _ in questions]
        return self._answers(questions, *self.scored_logits(features_BND, grid, questions))

    @torch.no_grad()
    def answer_from_text(self, text: str, questions: Sequence[Question]) -> list[Answer]:
        """An answer per question, in one pass, from a text that stands in the video's place."""
        return self._answers([questions], *self.text_logits([text], [questions]))[0] if questions else []

    def _answers(
        self, questions: Sequence[Sequence[Question]], logits_RV: Tensor, sizes: list[int]
    ) -> list[list[Answer]]:
        rows, chat = iter(logits_RV.split(sizes)), self.conversation
        return [
            [Answer(next(rows), torch.tensor(chat.tokens(q).target), yes=chat.yes, no=chat.no) for q in clip]
            for clip in questions
        ]

    def scored_logits(
        self, features_BND: Tensor, grid: Tensor, questions: Sequence[Sequence[Question]]
    ) -> tuple[Tensor, list[int]]:
        """Logits of all answer tokens, (R, V) in fp32 (fp64 for an fp64 model), and the answer tokens of each question,
        flat over clips. For training a critic.

        Raises BadInputError: clips of different sizes, or more tokens than the model supports.
        """
        prefix = self.prefix(grid)
        return self._scored(prefix.ids_P.expand(len(questions), -1), prefix, features_BND, questions)

    def text_logits(self, texts: Sequence[str], questions: Sequence[Sequence[Question]]) -> tuple[Tensor, list[int]]:
        """``scored_logits`` from texts in the place of clips; the texts must have equally many tokens."""
        ids_BP = torch.tensor([self.conversation.text_prefix(text) for text in texts])
        return self._scored(ids_BP, text_prefix(ids_BP[0]), None, questions)

    def _scored(
        self, ids_BP: Tensor, prefix: Prefix, features_BND: Tensor | None, questions: Sequence[Sequence[Question]]
    ) -> tuple[Tensor, list[int]]:
        device, length = self.device if features_BND is None else features_BND.device, ids_BP.shape[1]
        self._require_room(prefix, max(len(self.conversation.tokens(q).ids) for clip in questions for q in clip))
        packed = self.conversation.pack(length, questions, self._ranges)
        ids_BL = torch.cat([ids_BP, packed.ids_BS], dim=1)
        positions_3BP = prefix.positions_3P[:, None].expand(-1, len(ids_BP), -1)
        positions_3BL = torch.cat([positions_3BP, (packed.offset_BS + prefix.start).expand(3, -1, -1)], dim=-1)
        mask = packed.mask.to(device)
        out = self._decode(ids_BL, positions_3BL, features_BND, prefix, mask, use_cache=False)
        rows_R = packed.clip_R.to(device), (packed.place_R + length).to(device)
        logits_RV = self.model.lm_head(out.last_hidden_state[rows_R])
        return logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32)), packed.sizes

    @torch.no_grad()
    def generate(self, text: str, frames_TCHW: Tensor | None = None, max_new_tokens: int = 256) -> str:
        """The model's reply to a user's text, optionally about a clip in [0, 1]: greedy, without special tokens.

        Equals ``model.generate(do_sample=False)`` of transformers without the repetition penalty of the model's
        generation settings.

        Raises BadInputError: more tokens than the model supports.
        """
        if frames_TCHW is None:
            return self.generate_batch([text], max_new_tokens)[0]
        features, grid = self.embed_video(frames_TCHW[None].to(self.device))
        prefix = self.prefix(grid)
        tail = torch.tensor(self.conversation.tail(text))
        self._require_room(prefix, len(tail) + max_new_tokens)
        ids_1L = torch.cat([prefix.ids_P, tail])[None]
        behind_3L = (prefix.start + torch.arange(len(tail))).expand(3, -1)
        positions_31L = torch.cat([prefix.positions_3P, behind_3L], dim=1)[:, None]
        return self._generate(ids_1L, positions_31L, max_new_tokens, features, prefix)[0]

    @torch.no_grad()
    def generate_batch(self, texts: Sequence[str], max_new_tokens: int = 256) -> list[str]:
        """The replies to several texts at once: one pass makes a token of each."""
        from lowmem_drf.models.qwen_vl.generation import left_padded

        ids_BL, positions_3BL, padding = left_padded([self.conversation.prompt(text) for text in texts])
        return self._generate(ids_BL, positions_3BL, max_new_tokens, padding=padding)

    def _generate(
        self,
        ids_BL: Tensor,
        positions_3BL: Tensor,
        limit: int,
        features: Tensor | None = None,
        prefix: Prefix | None = None,
        padding: Sequence[int] = (),
    ) -> list[str]:
        from lowmem_drf.models.qwen_vl.generation import greedy

        def step(ids_BL: Tensor, positions_3BL: Tensor, mask: Tensor | None, cache: Any) -> tuple[Tensor, Any]:
            video = (features, prefix) if cache is None else (None, None)
            mask = mask if mask is None else mask.to(self.device)
            out = self._decode(ids_BL, positions_3BL, *video, mask=mask, past_key_values=cache, use_cache=True)
            return self.model.lm_head(out.last_hidden_state[:, -1]), out.past_key_values

        ends = self.model.generation_config.eos_token_id
        ends = {*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id} - {None}
        made = greedy(step, ids_BL, positions_3BL, ends, limit, padding)
        return [str(self.tokenizer.decode(row, skip_special_tokens=True)).strip() for row in made]

    def generation_bytes(self, tokens: int, more: int) -> int:
        """Bytes that one row of ``generate_batch`` takes: the key-value cache of ``tokens`` and ``more`` new ones, and
        what the widest layer makes of ``tokens`` at once."""
        text = self.model.config.get_text_config()
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        kept = 2 * text.num_hidden_layers * text.num_key_value_heads * width * (tokens + more)
        return int((kept + 3 * text.intermediate_size * tokens) * self.model.dtype.itemsize)

    def set_attention(self, attention: RangedAttention | None, head_dims: Collection[int] = ()) -> None:
        """Sets the attention kernel of language model and vision tower, each only if its head dimension is in
        ``head_dims``. ``None``: PyTorch's SDPA, with an L x L mask for the questions."""
        text = self.model.config.get_text_config()
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self._ranges = attention is not None and width in head_dims
        use_ranges(self.stacks.language, attention if self._ranges else None)
        self.family.speed_up(self.model, attention, head_dims)

    def set_checkpointing(self, on: bool) -> None:
        """Gradient checkpointing of every layer of the vision tower and the language model.

        transformers' layers checkpoint only in training mode; this wraps ``forward``, so a frozen model stays in eval
        mode, with dropout off. Without gradients (``generate``) nothing changes.
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
        """Modules to gather as a unit when weights are partitioned: the layers, and the patch embedding, whose code
        reads a submodule's weight without calling it."""
        stacks = self.stacks
        return [stacks.patch_embed, *stacks.blocks, *stacks.language.layers]

    def stream(self, device: torch.device, store: HostStore) -> Streamed:
        """Streams the weights of the vision blocks, the language model's layers and lm_head to ``device`` on demand;
        the token embedding (1 GiB in the 7B model) stays on the host.

        Call ``set_checkpointing`` afterwards: a layer that is not recomputed keeps its weights until its backward.
        """
        if not isinstance(self._embedding, HostEmbedding):
            self.model.set_input_embeddings(HostEmbedding(self._embedding, device, store))
        modules = [*self.stacks.blocks, *self.stacks.language.layers, self.model.lm_head]
        self._streamed_modules, self._streamed = modules, Streamed(modules, device, store)
        return self._streamed

    def prefix(self, grid: Tensor) -> Prefix:
        """The tokens before the question, for clips of one grid. Raises BadInputError if the clips differ."""
        if bool((grid != grid[0]).any()):
            raise BadInputError("The clips of one call must have the same size and number of frames.")
        key = (*(int(n) for n in grid[0]), self.fps)
        if key not in self._prefixes:
            vision = self.model.config.vision_config
            self._prefixes[key] = make_prefix(self.family, self.conversation, vision, grid[0].tolist(), self.fps)
        return self._prefixes[key]

    def _decode(
        self,
        ids_BL: Tensor,
        positions_3BL: Tensor,
        features: Tensor | None,
        prefix: Prefix | None,
        mask: Tensor | None,
        **arguments: Any,
    ) -> Any:
        """Runs the language model over token ids, with the video's features at the prefix's video tokens."""
        device, slots = self.device, None
        inputs_BLD = self._embedding(ids_BL.to(device))
        if features is not None and prefix is not None:
            slots, features = prefix.slots_N.to(device), features.to(inputs_BLD.dtype)
            inputs_BLD = inputs_BLD.index_copy(1, slots, features[..., : inputs_BLD.shape[-1]])
        arguments |= {"attention_mask": mask, "position_ids": positions_3BL.to(device)}
        return self.family.decode(self.model, inputs_BLD, features, slots, **arguments)

    def _require_room(self, prefix: Prefix, more: int) -> None:
        limit = self.model.config.get_text_config().max_position_embeddings
        if (tokens := len(prefix.ids_P) + more) > limit:
            raise BadInputError(
                f"The critic would read {tokens} tokens, {len(prefix.slots_N)} of them the video's, and supports "
                f"{limit} (max_position_embeddings). Show it fewer frames (critic.frames) or smaller ones "
                "(video.width, video.height)."
            )


def _recomputed(forward: Callable[..., Any], *inputs: Any, **arguments: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    if not torch.is_grad_enabled():
        return forward(*inputs, **arguments)
    return checkpoint(forward, *inputs, use_reentrant=False, **arguments)
