"""Models of true size without values and the prompts that they get, for the plan: every parameter is a fake CPU tensor
(``torch._subclasses.FakeTensorMode``).

Such a model takes no memory. Forward and backward run under its mode, where a dispatch mode can count the bytes that
the real model would allocate. Integers (token ids, grids, positions) are passed as real tensors, because shapes depend
on their values. Buffers (rotary tables) are real too; they are small. Weights in 4 and 8 bit are packed under the mode
by the operators that pack real ones (``packed``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from lowmem_drf.assembly.assemble import Models, assemble, critic_rate, run_prompts
from lowmem_drf.assembly.conditions import DTYPES, require_images
from lowmem_drf.assembly.kernel_choice import choose_planned
from lowmem_drf.assembly.questions import draft_questions
from lowmem_drf.assembly.sizes import latent_shape, sizes_of
from lowmem_drf.models.experts import make_transformers
from lowmem_drf.models.family import EncodedImage, GeneratorConfig
from lowmem_drf.models.generators import family_of, image_use
from lowmem_drf.models.lora.adapter import ADAPTER, add_lora, lora_layers
from lowmem_drf.models.qwen_vl.critic import DEFAULT_FPS, VLMCritic
from lowmem_drf.models.qwen_vl.files import video_geometry
from lowmem_drf.models.qwen_vl.known import KNOWN
from lowmem_drf.models.qwen_vl.random_critic import described, empty_model, remake_rotary
from lowmem_drf.models.rewards.clip import ClipReward, empty_clip
from lowmem_drf.models.rewards.users import is_entry
from lowmem_drf.models.tiny.files import network_for, planned_sizes
from lowmem_drf.models.tiny.network import TinyNetwork
from lowmem_drf.models.weights.filling import Value, fill, fill_as_loaded
from lowmem_drf.models.weights.quant import Quant, in_critic, lay_out, require_library
from lowmem_drf.models.weights.sources import resolve
from lowmem_drf.planner.fakes import Fakes
from lowmem_drf.planner.stand_ins import planned_store
from lowmem_drf.prompts import as_prompts
from lowmem_drf.schema import Config
from lowmem_drf.types import Prompt, Question

if TYPE_CHECKING:
    from lowmem_drf.planner.stand_ins import PlanMeter


SAMPLE_PROMPT = (
    "A close-up shot of two brown dogs running side by side along a wide sandy beach at sunset, splashing through the "
    "shallow water while a small red boat drifts behind them to the left of a wooden pier, warm golden light, "
    "shallow depth of field, the camera slowly tracking them from the right."
)
"""Used if no prompts are given. As long as typical prompts for video models."""

CHARACTERS_PER_TOKEN = 4
"""Approximate, for English. The stand-in tokenizer makes one token of each character."""


def fake_transformer(
    generator: GeneratorConfig,
    dtype: torch.dtype,
    mode: FakeTensorMode,
    quant: Quant = "none",
    name: str = "transformer",
) -> Any:
    """The transformer in this field of ``generator``, as ``load_transformer`` of its family returns it. Callable under
    any dispatch mode. Raises BadInputError if bitsandbytes is missing."""
    with _disable_current_modes():
        model = family_of(generator).empty_transformer(getattr(generator, name), quant=quant)
    with _packing():
        return fill_as_loaded(model, dtype, partial(_fake_value, mode))


def empty_lora(transformer: Any, mode: FakeTensorMode) -> None:
    """Makes the LoRA's tensors fake. Call it after ``add_lora``, which runs without the mode: peft needs real ones."""
    for layer in lora_layers(transformer).values():
        for matrix in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]):
            matrix.weight = _fake(mode, matrix.weight.shape, matrix.weight.dtype).requires_grad_()


def fake_vae(generator: GeneratorConfig, dtype: torch.dtype, mode: FakeTensorMode) -> Any:
    """The VAE, as ``load_vae`` returns it."""
    with _disable_current_modes():
        model = family_of(generator).empty_vae(generator.vae)
    with _packing():
        return fill_as_loaded(model, dtype, partial(_fake_value, mode))


def fake_tiny(config: Config, generator: GeneratorConfig, mode: FakeTensorMode) -> TinyNetwork | None:
    """The tiny decoder, as ``load_tiny`` returns it, if the run has one."""
    if config.model.decoder == "exact":
        return None
    with _disable_current_modes(), torch.device("meta"):
        sizes = sizes_of(generator)
        model = network_for(planned_sizes(config.model.id, config.model.decoder_file, sizes), sizes)
    with _packing():
        fill(model, _fake_value(mode, DTYPES[config.memory.vae_dtype]))
    return model


def fake_rewards(config: Config, mode: FakeTensorMode) -> dict[str, nn.Module]:
    """The scalar rewards, as ``load_rewards`` returns them. The user's own are not known before they run: a mean of
    the frames stands for each."""
    made: dict[str, nn.Module] = {}
    for name, reward in config.rewards.items():
        if is_entry(reward.id):
            made[name] = _Unknown()
            continue
        with _disable_current_modes():
            model, encode = empty_clip(reward.id)
        with _packing():
            fill(model, _fake_value(mode, DTYPES[config.dtype]))
        made[name] = ClipReward(model, encode, recompute=bool(config.memory.checkpoint))
    return made


class _Unknown(nn.Module):
    def forward(self, frames_BTCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        return frames_BTCHW.float().mean((1, 2, 3, 4))


def fake_text(generator: GeneratorConfig, dtype: torch.dtype, mode: FakeTensorMode, name: str = "text_encoder") -> Any:
    """The encoder of ``load_text`` in this subfolder, without the tokenizer."""
    with _disable_current_modes():
        model = family_of(generator).empty_text(generator.text_encoders[name])
    with _packing():
        return fill_as_loaded(model, dtype, partial(_fake_value, mode))


def fake_critic(
    name_or_folder: str, dtype: torch.dtype, fps: float | None, quant: Quant, mode: FakeTensorMode, files: Any = None
) -> VLMCritic:
    """The critic, as ``load_critic`` returns it.

    Args:
        name_or_folder: ``toyworld``, a model's folder, or a hub id of ``known_critics``. A hub id gets a stand-in
            tokenizer, which makes about four times as many tokens.
        files: in place of ``random_critic.described`` of that name.

    Raises:
        BadInputError: none of these, or bitsandbytes is missing.
    """
    require_library(quant)
    config, settings, tokenizer = files or described(resolve(name_or_folder, "critic"))
    with _disable_current_modes():
        model = empty_model(config)
        remake_rotary(model)
    with _packing():
        lay_out(model, quant, in_critic)
        fill(model, _fake_value(mode, dtype))
        rate = fps or float(settings.get("fps") or DEFAULT_FPS)
        return VLMCritic(model.eval().requires_grad_(False), tokenizer, video_geometry(settings), fps=rate)


def _fake_value(mode: FakeTensorMode, dtype: torch.dtype) -> Value:
    return lambda name, shape: _fake(mode, shape, dtype)


def _fake(mode: FakeTensorMode, shape: Sequence[int], dtype: torch.dtype) -> nn.Parameter:
    """A frozen parameter, as ``nn.Parameter`` of a fake tensor, which would run two operators."""
    fake: Any = FakeTensor(mode, torch.empty(shape, dtype=dtype, device="meta"), torch.device("cpu"))
    fake._is_param = True
    return cast(nn.Parameter, fake)


@contextmanager
def _packing() -> Iterator[None]:
    """Without the ledger around, which would see every tensor that a model is filled with. Weights are packed with the
    results that the plan has cached."""
    with _disable_current_modes() as modes, ExitStack() as cached:
        for mode in modes:
            if isinstance(mode, Fakes):
                cached.enter_context(mode)
        yield


def fake_run(
    config: Config, generator: GeneratorConfig, described: Any, mode: FakeTensorMode, meter: PlanMeter
) -> tuple[Models, list[Prompt], dict[str, tuple[Question, ...]]]:
    """Models of true size, and the prompts of one micro-batch with their questions. ``described``: of the critic,
    ``None`` if none is asked."""
    dtype = DTYPES[config.dtype]
    prompts, questions = plan_prompts(config, generator)
    sizes = sizes_of(generator)
    transformer, other = make_transformers(
        generator, config, lambda name: fake_transformer(generator, dtype, mode, config.model.storage, name)
    )
    with _disable_current_modes():
        add_lora(transformer, **config.lora.adapter, seed=None)
        empty_lora(transformer, mode)
    texts = {
        text: torch.zeros(config.model.text_tokens, sizes.text_dim, dtype=dtype)
        for text in [*(p.text for p in prompts), config.sampler.negative_prompt]
    }
    rate, critic = critic_rate(config), None
    if described is not None:
        critic = fake_critic(config.critic.id, dtype, rate, config.critic.quant, mode=mode, files=described)
    rewards = fake_rewards(config, mode)
    vae = fake_vae(generator, DTYPES[config.memory.vae_dtype], mode)
    tiny = fake_tiny(config, generator, mode)
    more = [*([other.transformer] if other else []), *([tiny] if tiny else [])]
    meter.load([transformer, vae, *([critic.model] if critic else []), *rewards.values(), *more])
    device, ops = torch.device("cpu"), choose_planned(config, sizes.head_dim)
    store = planned_store()
    models = assemble(
        config, transformer, vae, critic, texts, device, meter, ops, other, store, tiny=tiny, rewards=rewards,
        images=blank_images(config, generator, prompts),
    )  # fmt: skip
    return models, prompts, questions


def blank_images(config: Config, generator: GeneratorConfig, prompts: Sequence[Prompt]) -> dict[str, EncodedImage]:
    """What would be encoded of the prompts' images."""
    images, (_, *latents) = family_of(generator).IMAGES, latent_shape(config, sizes_of(generator))
    files = [prompt.image for prompt in prompts if prompt.image]
    return {file: images.blank(generator, latents, DTYPES[config.dtype]) for file in files} if images else {}


def plan_prompts(config: Config, generator: GeneratorConfig) -> tuple[list[Prompt], dict[str, tuple[Question, ...]]]:
    """A batch of those with the longest questions among the first 100 prompts, and their questions by prompt id. The
    sample prompt has an image if the generator needs one."""
    candidates = run_prompts(config)[:100] if config.prompts else as_prompts([SAMPLE_PROMPT])
    if not config.prompts and image_use(generator) == "must":
        candidates = tuple(replace(prompt, image="image.png") for prompt in candidates)
    require_images(candidates, generator, config)
    draft = draft_questions(config, candidates)
    if config.critic.id in KNOWN:
        draft = {key: tuple(_shorter(question) for question in asked) for key, asked in draft.items()}
    by_length = sorted(candidates, key=lambda prompt: -sum(len(q.text) + len(q.answer) for q in draft[prompt.id]))
    chosen = [by_length[clip % len(by_length)] for clip in range(config.batch)]
    return chosen, {prompt.id: draft[prompt.id] for prompt in chosen}


def _shorter(question: Question) -> Question:
    """Cut to about as many characters as a real tokenizer makes tokens: the stand-in makes a token of each one."""

    def cut(text: str) -> str:
        return text[: -(-len(text) // CHARACTERS_PER_TOKEN)]

    answer = question.answer if question.kind == "yesno" else cut(question.answer)
    return replace(question, text=cut(question.text), answer=answer, token_weights=())
