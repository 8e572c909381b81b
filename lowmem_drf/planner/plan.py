"""The plan: the real update, run on fake tensors under a ledger. Needs no card, no weights and no download.

``training.update`` runs as in training, on models of true size whose tensors have shapes but no values
(``planner/fake_models.py``), so plan and run cannot drift apart. Repeats are left out (``planner/shortcuts.py``): two
graded steps stand for all, one ungraded step for all, one micro-batch for the batch; blocks and chunks that keep no
graph run once. No peak changes by this (``tests/planner/test_plan.py``), and the seconds are scaled up again. Stacks of
equal blocks are run at two smaller depths, and the figures extended exactly (``planner/depths.py``).

Bytes are those requested of PyTorch's allocator, in its blocks of 512; ``Plan.fits`` adds what it does not see.
Seconds are estimated from operations, traffic and the card's rates alone.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from lowmem_drf.assembly.conditions import BATCH, DTYPES, LARGE_BYTES
from lowmem_drf.assembly.eight_bit import in_8_bit
from lowmem_drf.assembly.sizes import require_room, sizes_of
from lowmem_drf.libraries import uncollected
from lowmem_drf.models import import_models
from lowmem_drf.models.experts import require_expert
from lowmem_drf.models.family import GeneratorConfig
from lowmem_drf.models.generators import family_of, generator_config, image_use
from lowmem_drf.models.lora.adapter import lora_parameters
from lowmem_drf.models.qwen_vl.vision import forget_windows
from lowmem_drf.models.tiny.decoder_check import Uses
from lowmem_drf.models.weights.sources import resolve
from lowmem_drf.planner.cards import GIB, HALF_BACKWARD, SHARES, Card, fits_in, free_of
from lowmem_drf.planner.costs import Counters, Rates
from lowmem_drf.planner.depths import (
    GROUPS,
    depths_of,
    line_to,
    mark_critic,
    settings_of,
    shallow_critic,
    shallow_generator,
)
from lowmem_drf.planner.fake_models import fake_run, fake_text, fake_vae
from lowmem_drf.planner.fakes import Fakes
from lowmem_drf.planner.ledger import Ledger
from lowmem_drf.planner.shortcuts import (
    AbsentDecoder,
    boundary_moved,
    of_one_process,
    one_micro_batch,
    one_stage,
    scaled,
    shortened,
    with_decoders,
    with_records,
    with_shortcuts,
    with_stand_ins,
)
from lowmem_drf.planner.stages import Figures, Plan, Span, StagePlan, UnlikeError
from lowmem_drf.planner.stand_ins import PlanMeter, planned_store
from lowmem_drf.planner.zero import partitioned, planned_trainer
from lowmem_drf.schema import Config

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode

ALLOCATOR_BLOCK = 512
"""Bytes: the CUDA caching allocator rounds every request up to a multiple."""

T = TypeVar("T")

FAR = 8
"""What needs more cards of the size than this is refused without a plan, which would take minutes and much host memory
itself."""
ENCODED = 9
"""Frames of a planned encoding: the first one, and two chunks of four, as Wan's encoder cuts a clip."""


def make_plan(
    config: Config,
    card: Card,
    vram_gib: float | None = None,
    only: str | None = None,
    whole: bool = False,
    fakes: Fakes | None = None,
    deep: bool = False,
    seen: Seen | None = None,
) -> Plan:
    """Runs one update of ``config`` on fake tensors; with the tiny decoder two, and with an anchor that is not in every
    update: seconds are the mean over those that do more and those that do less, peaks the highest of them.

    Args:
        vram_gib: memory of the card; default: ``card.gib``.
        only: plan the bytes of this stage alone. Models of other stages take memory but compute nothing, so the figures
            of the other stages are meaningless.
        whole: run all steps, without shortcuts: slow, for tests.
        fakes: those of earlier plans, to reuse their cached results.
        deep: run all blocks of every stack: slow, for tests.
        seen: stages of earlier plans for this card. Those that only begin with other bytes now are not run again.

    Raises:
        BadInputError: a model's configuration is unknown, or settings contradict each other.
    """
    config = of_one_process(decide_rollout(config, card, vram_gib, fakes).model_copy(update={"device": "cpu"}))
    fakes, seen = fakes or new_fakes(), {} if seen is None else seen
    every = config.model.decoder_check_every
    kinds: dict[Uses, float] = {"exact": 1.0}
    if config.model.decoder != "exact":
        kinds = {"both": 1 / every, "tiny": 1 - 1 / every} if every > 1 else {"both": 1.0}
    anchors = [(config, 1.0)]
    if config.optim.anchor and (lazy := config.optim.anchor_every) > 1:
        without = config.model_copy(update={"optim": config.optim.model_copy(update={"anchor": 0.0})})
        anchors = [(config, 1 / lazy), (without, 1 - 1 / lazy)]
    both = [(one, uses, a * b) for one, a in anchors for uses, b in kinds.items()]
    plans = [_plan(one, card, vram_gib, only, whole, fakes, deep, seen, uses) for one, uses, _ in both]
    return plans[0].averaged(plans[1:], [share for *_, share in both])


def _plan(
    config: Config,
    card: Card,
    vram_gib: float | None,
    only: str | None,
    whole: bool,
    fakes: Fakes,
    deep: bool,
    seen: Seen,
    uses: Uses,
) -> Plan:
    """``make_plan`` of an update that uses these decoders."""
    short = one_micro_batch(config) if whole else shortened(config, 2 if only in (None, "denoise_backward") else 1)
    generator, most = generator_config(config.model.id), vram_gib or card.gib
    require_expert(config, generator)
    require_room(config, generator, {"micro_batch": config.micro_batch}, FAR * most * GIB, f"{FAR} such cards have")
    if not whole:
        generator = boundary_moved(generator, short)
    critic = described_critic(config.critic.id) if config.critic.weights.asked else None
    run = _Run(config, short, generator, critic, card, fakes, only, whole, seen, uses)
    shallow = not (whole or deep)
    with _frozen():
        stages = dict(run.kept("text", shallow, run.text)) if only in (None, "text") else {}
        if only != "text":
            try:
                more, step_bytes = run.kept("update", shallow and config.engine != "zero3", run.update)
            except UnlikeError:
                more, step_bytes = run.kept("update", False, run.update)
            stages |= more if whole else with_records(config, short, more, step_bytes, card)
    return scaled(config, short, stages, card, most)


@contextmanager
def _frozen() -> Iterator[None]:
    """Without Python's own garbage collections; those that a stage asks for do not walk what was there before."""
    with uncollected():
        if gc.get_freeze_count():  # by who began this process; to unfreeze here would undo that
            yield
            return
        gc.freeze()
        try:
            yield
        finally:
            gc.unfreeze()


Absent = dict[str, list[Figures]]
"""Stages that are not computed, with the figures of their visits."""


@dataclass
class _Stages:
    """What one model did in its stages."""

    figures: Absent
    frames: list[tuple[torch.Size, torch.dtype]]
    """Of each chunk that was decoded."""
    step_bytes: int
    """Of a step's records."""


Seen = dict[str, _Stages]
"""By ``settings_of``."""


@dataclass
class _Run:
    """An update on fake tensors. ``critic``: see ``described_critic``; ``None`` if none is asked."""

    config: Config
    short: Config
    generator: GeneratorConfig
    critic: tuple[dict[str, Any], dict[str, Any], Any] | None
    card: Card
    fakes: Fakes
    only: str | None
    whole: bool
    seen: Seen
    uses: Uses
    frames: list[tuple[torch.Size, torch.dtype]] = field(default_factory=list)
    """Of each chunk that was decoded."""

    def kept(self, what: str, shallow: bool, make: Callable[[bool], T]) -> T:
        """What ``make(shallow)`` returns, once for all plans with the same fakes in which it cannot differ: all of the
        encoders' settings are in the key of ``text``, and none of them in that of ``update``."""
        config, where = self.config.model_dump_json(exclude={"memory": {"text_device", "vram_gib"}}), ""
        if what == "text":
            sizes = self.config.model_dump(include={"model": {"text_tokens"}, "dtype": True})
            if image_use(self.generator) == "must":
                sizes |= self.config.model_dump(include={"video": True, "memory": {"vae_dtype"}})
            config = json.dumps(sizes)
            where = self.config.memory.text_device
        key = (what, shallow, self.only, self.whole, repr(self.card), repr(self.generator), config, where, self.uses)
        if key not in self.fakes.kept:
            self.fakes.kept[key] = make(shallow)
        kept: T = self.fakes.kept[key]
        return kept

    def text(self, shallow: bool) -> dict[str, StagePlan]:
        """The figures of the text encoder, from two smaller depths if it is ``shallow``."""
        many = bool(self.generator.more_text)
        line = line_to({"text": self.generator.text["num_layers"]}) if shallow and not many else None
        if line is None:
            return self._text({}).stages
        meter = PlanMeter(Ledger())
        for (name, one), (_, other) in zip(self._text(line.first).visits, self._text(line.second).visits, strict=True):
            meter.add(name, one.extended(other, line.steps))
        return meter.stages

    def update(self, shallow: bool) -> tuple[dict[str, StagePlan], int]:
        """The figures of the update's stages, and the bytes of a step's records."""
        line = line_to(depths_of(self.generator, self.critic and self.critic[0])) if shallow else None
        if line is None:
            meter, step_bytes = self._update({}, {})
            return meter.stages, step_bytes
        groups = [group for group in GROUPS if self.only in (None, *GROUPS[group])]
        keys = {group: f"{self.uses} {settings_of(group, self.short)}" for group in groups}
        known = {group: self.seen[key] for group, key in keys.items() if key in self.seen}
        absent = {name: visits for stages in known.values() for name, visits in stages.figures.items()}
        if "vae" in known:
            self.frames = known["vae"].frames
        first, fewer = self._update(line.first, absent)
        # without stacks of equal blocks: computed at one depth alone
        once = {name: [one for other, one in first.visits if other == name] for name in GROUPS["vae"]}
        second, more = self._update(line.second, once | absent)
        rest = {name: iter(visits) for name, visits in (once | absent).items()}
        meter = PlanMeter(Ledger())
        for (name, one), (_, other) in zip(first.visits, second.visits, strict=True):
            here = rest.get(name)
            begun = one.begun(other, line.steps)
            meter.add(name, one.extended(other, line.steps) if here is None else next(here).moved(begun))
        step_bytes = more + line.steps * (more - fewer)
        if "transformer" in known:
            step_bytes = known["transformer"].step_bytes
        for group, key in keys.items():
            visits = {name: [one for other, one in meter.visits if other == name] for name in GROUPS[group]}
            self.seen[key] = _Stages(visits, self.frames, step_bytes)
        return meter.stages, step_bytes

    def _text(self, depths: Mapping[str, int]) -> PlanMeter:
        with self.fakes, Ledger(ALLOCATOR_BLOCK, _rates(self.card, self.config), self.fakes) as ledger:
            meter = PlanMeter(ledger)
            generator = shallow_generator(self.generator, depths)
            for name in generator.text_encoders:
                _encode_text(self.config, generator, name, self.fakes.mode, meter)
            if image_use(generator) == "must":
                _encode_image(self.config, generator, self.fakes.mode, meter)
        return meter

    def _update(self, depths: Mapping[str, int], absent: Mapping[str, Sequence[Figures]]) -> tuple[PlanMeter, int]:
        from lowmem_drf.training.update import update

        config, short, only = self.config, self.short, self.only
        generator = shallow_generator(self.generator, depths)
        critic = self.critic and (shallow_critic(self.critic[0], depths), *self.critic[1:])
        ungraded = config.sampler.graded_steps - short.sampler.graded_steps
        forget_windows()  # else the first run of a process would count them alone
        auto = in_8_bit(config, sizes_of(generator).head_dim)
        with self.fakes, Ledger(ALLOCATOR_BLOCK, _rates(self.card, self.config), self.fakes, auto) as ledger:
            meter = PlanMeter(ledger, absent)
            models, prompts, questions = fake_run(short, generator, critic, self.fakes.mode, meter)
            parts = models.parts(lora_parameters(models.transformer), self.uses)
            parts = partitioned(config, short, self.card, ledger, models, parts, meter)
            parts = with_stand_ins(parts, absent)
            if only:
                parts = one_stage(parts, only, models)
            if "decode" in absent:
                frames = iter(self.frames)
                parts = with_decoders(parts, lambda one: AbsentDecoder(one, frames))
            if not self.whole:
                mark_critic(models, ledger)
                parts = with_shortcuts(parts, models, ledger, None if "decode" in absent else self.frames)
            latents = [torch.zeros(config.micro_batch, *models.latent_shape) for _ in range(ungraded)]
            trainer = planned_trainer(config, ledger, models)
            update(short, models, parts, trainer, 0, prompts, questions, None)
            del latents
        return meter, models.recorder.step_bytes if models.recorder else 0


def decide_rollout(config: Config, card: Card, vram_gib: float | None = None, fakes: Fakes | None = None) -> Config:
    """Resolves ``zero.rollout = auto`` under ZeRO-3: ``gathered`` if that fits, else ``partitioned``. Arguments as in
    ``make_plan``."""
    if config.engine != "zero3" or config.zero.rollout != "auto":
        return config
    gathered, partitioned = (
        config.model_copy(update={"zero": config.zero.model_copy(update={"rollout": how})})
        for how in ("gathered", "partitioned")
    )
    described = generator_config(config.model.id)
    numbers = sum(map(math.prod, family_of(described).parameter_shapes(described.transformer).values()))
    if numbers * DTYPES[config.dtype].itemsize > fits_in(free_of(vram_gib or card.gib)) * GIB:
        return partitioned
    return gathered if make_plan(gathered, card, vram_gib, "rollout", fakes=fakes).fits else partitioned


def new_fakes() -> Fakes:
    """An empty cache for ``make_plan``."""
    with uncollected():
        import_models()
    from torch._subclasses.fake_tensor import FakeTensorMode

    return Fakes(FakeTensorMode(allow_non_fake_inputs=True))


def _rates(card: Card, config: Config) -> Rates:
    tera = {torch.bfloat16: card.bf16, torch.float16: card.bf16, torch.float32: card.fp32}
    flops = {dtype: rate * 1e12 for dtype, rate in tera.items()}
    memory = card.memory * card.share("memory") * 1e9
    kernels = config.kernels
    half = kernels.attention in ("auto", "triton") and not kernels.deterministic and config.dtype != "fp32"
    kinds = SHARES.keys() - (set() if half and card.half_sums else {HALF_BACKWARD})
    shares = {kind: card.share(kind) for kind in kinds}
    return Rates(flops, card.tf32 * 1e12, memory, card.link_rate, shares, card.int8 * 1e12)


def _encode_text(config: Config, generator: GeneratorConfig, name: str, mode: FakeTensorMode, meter: PlanMeter) -> None:
    """Plans a text encoder, alone on the card, with one batch of prompts."""
    encoder, where = fake_text(generator, DTYPES[config.dtype], mode, name), config.memory.text_device
    nbytes = sum(parameter.nbytes for parameter in encoder.parameters())
    if where == "host":
        meter.add("text", Figures({("", 0): Span(0, nbytes)}, 0, 0, Counters(), what="it runs on the host"))
        return
    if where == "stream":
        family_of(generator).stream_text(encoder, torch.device("cpu"), planned_store())
    meter.load([encoder])
    tokens = min(config.model.text_tokens, generator.text_encoders[name].get("max_position_embeddings", 512))
    ids_BL = torch.ones(1 if nbytes >= LARGE_BYTES else BATCH, tokens, dtype=torch.int64)
    with meter.stage("text"), torch.no_grad():
        encoder(ids_BL, torch.ones_like(ids_BL))
    meter.unload()
    del encoder
    gc.collect()  # as in ``encode_texts``: modules and their streamed layers refer to each other


def _encode_image(config: Config, generator: GeneratorConfig, mode: FakeTensorMode, meter: PlanMeter) -> None:
    """Plans the VAE that encodes an image with empty frames after it. It encodes a chunk at a time, so that ``ENCODED``
    frames take what all take. An encoder of images beside it is not counted (CLIP-H: 1.2 GiB in 16 bit)."""
    vae, video = fake_vae(generator, DTYPES[config.memory.vae_dtype], mode), config.video
    meter.load([vae])
    with meter.stage("text"), torch.no_grad():
        vae.encode(torch.zeros(1, 3, min(video.frames, ENCODED), video.height, video.width, dtype=vae.dtype))
    meter.unload()
    del vae
    gc.collect()


def described_critic(critic_id: str) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """``config.json``, video settings and tokenizer of a critic. Raises BadInputError."""
    from lowmem_drf.models.qwen_vl.random_critic import described

    return described(resolve(critic_id, "critic"))
