"""The plan: the real update, run on fake tensors under a ledger. No card, no weights, no download.

``training.update`` is called as in training, on models of the true size whose tensors have shapes and no values
(``planner/fake_models.py``), so that the plan cannot drift from what it plans. What only repeats is done once: two
steps are graded (what the others would keep is there), of the ungraded ones one is done, of a batch one micro-batch is
made, and blocks and chunks that leave no graph are replayed (``Ledger.replay``). None of this changes a peak
(``tests/planner/test_plan.py``); the seconds are scaled up again.

The bytes are those that PyTorch's allocator is asked for, in its blocks of 512. What it cannot see is in
``cards.USABLE``. The seconds are an estimate from operations, traffic and the card's rates, and nothing else.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from lowmem_drf.assembly.assemble import Models, assemble, critic_rate, run_prompts
from lowmem_drf.assembly.kernel_choice import choose_planned
from lowmem_drf.assembly.questions import draft_questions
from lowmem_drf.assembly.text_cache import BATCH, DTYPES, LARGE_BYTES
from lowmem_drf.models.generators import GeneratorConfig, generator_config
from lowmem_drf.models.lora.adapter import add_lora, lora_parameters, named_lora
from lowmem_drf.models.qwen_vl.known import KNOWN
from lowmem_drf.models.wan.experts import make_transformers, require_expert
from lowmem_drf.models.wan.random_generator import empty_transformer
from lowmem_drf.planner.cards import BANDWIDTH_SHARE, GIB, MATMUL_SHARE, USABLE, Card
from lowmem_drf.planner.costs import Rates
from lowmem_drf.planner.fakes import Fakes
from lowmem_drf.planner.ledger import Item, Ledger
from lowmem_drf.planner.shortcuts import one_stage, with_replays
from lowmem_drf.planner.shortening import (
    boundary_moved,
    of_one_process,
    one_micro_batch,
    scaled,
    shortened,
    with_records,
)
from lowmem_drf.planner.stages import SUMS, Plan, StagePlan
from lowmem_drf.planner.store import planned_store
from lowmem_drf.planner.zero import PlannedTrainer, PlannedZero3
from lowmem_drf.prompts import as_prompts
from lowmem_drf.schema import Config
from lowmem_drf.training.trainer import SingleTrainer, Trainer
from lowmem_drf.types import Parts, Prompt, Question

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode

WEIGHTS = "weights"

ALLOCATOR_BLOCK = 512
"""Bytes: the CUDA caching allocator rounds every request up to a multiple."""

SAMPLE_PROMPT = (
    "A close-up shot of two brown dogs running side by side along a wide sandy beach at sunset, splashing through the shallow water while a small red "
    "boat drifts behind them to the left of a wooden pier, warm golden light, shallow depth of field, the camera slowly tracking them from the right."
)
"""Stands for the prompts where none are given: as long as those of prompt sets for video models are."""

CHARACTERS_PER_TOKEN = 4
"""Of English, about. The stand-in tokenizer of a model that is not here makes a token of every character."""


class PlanMeter:
    """Stands where the run's ``Meter`` does: books each stage's bytes and estimated seconds."""

    def __init__(self, ledger: Ledger) -> None:
        self.stages: dict[str, StagePlan] = {}
        self.partitioned: list[PlannedZero3] = []
        self._models: list[Any] = []
        self._ledger = ledger

    def load(self, models: Sequence[torch.nn.Module]) -> None:
        """These are on the card from now on."""
        self._models = list(models)
        self._ledger.adopt(self._tensors(), WEIGHTS)

    def unload(self) -> None:
        self._models = []

    def _tensors(self) -> Iterator[torch.Tensor]:
        for model in self._models:
            yield from model.parameters()
            yield from model.buffers()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures the block; a stage that is entered again keeps its larger peak, and its seconds add up."""
        ledger = self._ledger
        ledger.reset_peak()
        kept, before_it = ledger.card_bytes, ledger.spent
        asleep = ledger.on_card(self._tensors())
        with ExitStack() as gathered:
            for model in self.partitioned:
                gathered.enter_context(model.stage(name))
            yield
        weights = ledger.on_card(self._tensors())
        ledger.wait(ledger.link.quiet(ledger.seconds))  # as the run's meter waits for the device
        spent = ledger.spent - before_it
        now = StagePlan(
            peak_gib=ledger.peak_card_bytes / GIB,
            weights_gib=weights / GIB,
            kept_gib=(kept - asleep) / GIB,
            host_gib=ledger.peak_host_bytes / GIB,
            s=spent.seconds,
            stall_s=spent.stalled,
            copy_s=spent.copying,
            moved_gib=(spent.to_host + spent.to_card) / GIB,
            between_gib=spent.between / GIB,
            tflop=spent.flops / 1e12,
            what=_what(ledger.close_peak()),
        )
        for model in self.partitioned:
            now = model.with_gathers(name, now)
        before = self.stages.get(name)
        larger = now if before is None or now.peak_gib >= before.peak_gib else before
        self.stages[name] = (
            larger
            if before is None
            else replace(larger, **{key: getattr(before, key) + getattr(now, key) for key in SUMS})
        )

    def take(self) -> tuple[dict[str, float], dict[str, float]]:
        """As ``Meter.take``; nothing is started anew."""
        return {name: stage.s for name, stage in self.stages.items()}, {
            name: stage.peak_gib for name, stage in self.stages.items()
        }


def make_plan(
    config: Config,
    card: Card,
    vram_gib: float | None = None,
    only: str | None = None,
    whole: bool = False,
    fakes: Fakes | None = None,
) -> Plan:
    """Runs one update of ``config`` on fake tensors.

    Args: vram_gib: the card's memory; default its own. only: a stage whose bytes alone are wanted. The models of other
        stages are left out where they work (not where they lie); the other stages' figures then mean nothing. whole:
        all steps of the sampler, and all graded ones: slow, and no different. fakes: of earlier plans: what an operator
        made of these shapes there need not be found out again.

    Raises:
        BadInputError: the configuration of a model is not known here, or the settings do not go together.
    """
    from lowmem_drf.training.update import update

    config = of_one_process(decide_rollout(config, card, vram_gib, fakes).model_copy(update={"device": "cpu"}))
    short = one_micro_batch(config) if whole else shortened(config, 2 if only in (None, "denoise_backward") else 1)
    fakes = fakes or new_fakes()
    mode = fakes.mode
    generator = generator_config(config.model.id)
    require_expert(config, generator)
    if not whole:
        generator = boundary_moved(generator, short)
    ungraded = config.sampler.graded_steps - short.sampler.graded_steps
    with fakes, Ledger(ALLOCATOR_BLOCK, _rates(card)) as ledger:
        meter = PlanMeter(ledger)
        if only in (None, "text"):
            _encode_text(config, generator, mode, meter)
        models, prompts, questions = _fake_models(short, generator, mode, meter)
        parts = models.parts(lora_parameters(models.transformer))
        parts = _partitioned(config, short, card, ledger, models, parts, meter)
        if only:
            parts = one_stage(parts, only, models)
        if not whole:
            parts = with_replays(parts, models, ledger)
        latents = [torch.zeros(config.micro_batch, *models.latent_shape) for _ in range(ungraded)]
        trainer = _trainer(config, ledger, models)
        update(short, models, parts, trainer, 0, prompts, questions, None)
        del latents
    stages = (
        meter.stages
        if whole
        else with_records(config, short, meter.stages, models.recorder.step_bytes if models.recorder else 0, card)
    )
    return scaled(config, short, stages, card, vram_gib or card.gib)


def decide_rollout(config: Config, card: Card, vram_gib: float | None = None, fakes: Fakes | None = None) -> Config:
    """The configuration with ``zero.rollout`` decided where it is ``auto`` and of interest: ``gathered`` where that
    fits. Arguments as ``make_plan``'s."""
    if config.engine != "zero3" or config.zero.rollout != "auto":
        return config
    gathered, partitioned = (
        config.model_copy(update={"zero": config.zero.model_copy(update={"rollout": how})})
        for how in ("gathered", "partitioned")
    )
    weights = (
        empty_transformer(generator_config(config.model.id).transformer).num_parameters()
        * DTYPES[config.dtype].itemsize
    )
    if weights > (vram_gib or card.gib) * USABLE * GIB:
        return partitioned
    return gathered if make_plan(gathered, card, vram_gib, "rollout", fakes=fakes).fits else partitioned


def _partitioned(
    config: Config, short: Config, card: Card, ledger: Ledger, models: Models, parts: Parts, meter: PlanMeter
) -> Parts:
    """The parts of a step whose models' weights ZeRO-3 partitions."""
    if config.engine != "zero3":
        return parts
    transformer, gathered, once = (
        models.transformer,
        config.zero.rollout == "gathered",
        short.sampler.steps / config.sampler.steps,
    )
    trained = PlannedZero3(
        config, ledger, card, transformer, transformer.blocks, ("rollout", "denoise_backward"), gathered, once
    )
    meter.partitioned = [trained]
    parts = replace(parts, velocity=trained.called(parts.velocity))
    if not config.zero.critic:
        return parts
    critic = PlannedZero3(config, ledger, card, models.asked_critic.model, models.asked_critic.leaves, ("critic",))
    meter.partitioned.append(critic)
    return replace(parts, critic=critic.called(parts.critic))


def _trainer(config: Config, ledger: Ledger, models: Models) -> Trainer:
    """With the state that it has from the first step on."""
    lora = named_lora(models.transformer)
    if config.engine != "single":
        return PlannedTrainer(config, ledger, lora)
    trainer = SingleTrainer(config, lora)
    trainer.fill()
    for moment in trainer.paged():
        ledger.on_host(moment)
    return trainer


def new_fakes() -> Fakes:
    """What ``make_plan`` runs under."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return Fakes(FakeTensorMode(allow_non_fake_inputs=True))


def _rates(card: Card) -> Rates:
    matmul = {torch.bfloat16: card.bf16, torch.float16: card.bf16, torch.float32: card.fp32}
    flops = {dtype: rate * 1e12 * MATMUL_SHARE for dtype, rate in matmul.items()}
    return Rates(flops, card.tf32 * 1e12 * MATMUL_SHARE, card.memory * 1e9 * BANDWIDTH_SHARE, card.link * 1e9)


def _encode_text(config: Config, generator: GeneratorConfig, mode: FakeTensorMode, meter: PlanMeter) -> None:
    """The text encoder, alone on the card, over as many prompts as it reads at once."""
    from lowmem_drf.models.wan.text import stream_text
    from lowmem_drf.planner.fake_models import fake_text

    encoder, where = fake_text(generator.text, DTYPES[config.dtype], mode), config.memory.text_device
    nbytes = sum(parameter.nbytes for parameter in encoder.parameters())
    if where == "host":
        nothing = dict.fromkeys(("peak_gib", "weights_gib", "kept_gib", *SUMS), 0.0)
        meter.stages["text"] = StagePlan(**nothing, host_gib=nbytes / GIB, what="it runs on the host")
        return
    if where == "stream":
        stream_text(encoder, torch.device("cpu"), planned_store())
    meter.load([encoder])
    ids_BL = torch.ones(1 if nbytes >= LARGE_BYTES else BATCH, config.model.text_tokens, dtype=torch.int64)
    with meter.stage("text"), torch.no_grad():
        encoder(ids_BL, torch.ones_like(ids_BL))
    meter.unload()
    del encoder
    gc.collect()  # as ``encode_texts`` does: modules and their streamed layers refer to each other


def _fake_models(
    config: Config, generator: GeneratorConfig, mode: FakeTensorMode, meter: PlanMeter
) -> tuple[Models, list[Prompt], dict[str, tuple[Question, ...]]]:
    """The models at their true size, and the prompts of one micro-batch with their questions."""
    from lowmem_drf.planner.fake_models import empty_lora, fake_critic, fake_transformer, fake_vae

    dtype = DTYPES[config.dtype]
    prompts, questions = plan_prompts(config)
    transformer, other = make_transformers(
        generator, config, lambda name: fake_transformer(getattr(generator, name), dtype, mode, config.model.quant)
    )
    add_lora(transformer, config.lora.rank, config.lora.alpha, config.lora.targets)
    empty_lora(transformer, mode)
    text_dim = generator.transformer["text_dim"]
    texts = {
        text: torch.zeros(config.model.text_tokens, text_dim, dtype=dtype)
        for text in [*(p.text for p in prompts), config.sampler.negative_prompt]
    }
    critic = fake_critic(config.critic.id, dtype, critic_rate(config), config.critic.quant, mode=mode)
    vae = fake_vae(generator.vae, DTYPES[config.memory.vae_dtype], mode)
    meter.load([transformer, vae, critic.model, *([other.transformer] if other else [])])
    return (
        assemble(
            config,
            transformer,
            vae,
            critic,
            texts,
            torch.device("cpu"),
            meter,
            choose_planned(config),
            other,
            planned_store(),
        ),
        prompts,
        questions,
    )


def plan_prompts(config: Config) -> tuple[list[Prompt], dict[str, tuple[Question, ...]]]:
    """Of the first hundred prompts a batch of those with the longest questions, and these by prompt id."""
    candidates = run_prompts(config)[:100] if config.prompts else as_prompts([SAMPLE_PROMPT])
    draft = draft_questions(config, candidates)
    if config.critic.id in KNOWN:
        draft = {key: tuple(_shorter(question) for question in asked) for key, asked in draft.items()}
    by_length = sorted(
        candidates, key=lambda prompt: -sum(len(question.text) + len(question.answer) for question in draft[prompt.id])
    )
    chosen = [by_length[clip % len(by_length)] for clip in range(config.batch)]
    return chosen, {prompt.id: draft[prompt.id] for prompt in chosen}


def _shorter(question: Question) -> Question:
    """As many characters as the question has tokens, about: what a stand-in tokenizer makes a token of."""
    answer = (
        question.answer
        if question.kind == "yesno"
        else question.answer[: -(-len(question.answer) // CHARACTERS_PER_TOKEN)]
    )
    return replace(
        question, text=question.text[: -(-len(question.text) // CHARACTERS_PER_TOKEN)], answer=answer, token_weights=()
    )


def _what(items: Sequence[Item]) -> str:
    """The three largest."""
    others = [item for item in items if item.op != WEIGHTS]
    return "; ".join(f"{item} ({item.bytes / GIB:.2f} GiB)" for item in others[:3])
