"""``lowmem-drf bench``: real updates with random weights of true size beside their plan. Nothing is downloaded.

On CUDA the bytes are the allocator's, with the models filled on the card. On the CPU a ledger counts the live bytes of
one update, and others without the ledger give the seconds. Under DeepSpeed this is one process, whatever the preset
says: on one card ZeRO-3 fetches the weights from the host.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING, Any, Self

import torch

from lowmem_drf.assembly.assemble import Models, assemble, critic_rate, resolve_device
from lowmem_drf.assembly.conditions import DTYPES
from lowmem_drf.assembly.cudnn import require_fast_vae
from lowmem_drf.assembly.loading import with_partitioned_critic
from lowmem_drf.assembly.sizes import free_bytes, require_room, sizes_of
from lowmem_drf.config import change, load_config
from lowmem_drf.distributed.ranks import join
from lowmem_drf.doctor.card_rates import measured_rates
from lowmem_drf.errors import BadInputError, LowmemError
from lowmem_drf.memory.host import HostStore
from lowmem_drf.memory.meter import Meter
from lowmem_drf.models.attention import attention_named
from lowmem_drf.models.experts import make_transformers
from lowmem_drf.models.generators import family_of, generator_config
from lowmem_drf.models.lora.adapter import add_lora, lora_parameters
from lowmem_drf.models.tiny.decoder_check import DecoderCheck
from lowmem_drf.planner.cards import GIB, SHARES, card_named, learn, parse_vram, plausible, room_of
from lowmem_drf.planner.fake_models import blank_images, plan_prompts
from lowmem_drf.planner.ledger import Ledger
from lowmem_drf.planner.plan import ALLOCATOR_BLOCK
from lowmem_drf.planner.report import card_here, planned
from lowmem_drf.planner.shortcuts import one_micro_batch
from lowmem_drf.planner.stages import Plan, StagePlan
from lowmem_drf.planner.stand_ins import PlanMeter, planned_store
from lowmem_drf.planner.words import set_to_fit
from lowmem_drf.preset_files import chosen_preset, preset_card, preset_path
from lowmem_drf.schema import Config
from lowmem_drf.terminal import make_console
from lowmem_drf.training.trainer import SingleTrainer, make_trainer
from lowmem_drf.training.update import update
from lowmem_drf.types import Prompt, Question

if TYPE_CHECKING:
    from rich.console import Console

    from lowmem_drf.ops import Attention

LARGEST_ON_CPU = 1e9
"""Limit on the parameters of a transformer that is measured on a CPU."""


@dataclass(frozen=True)
class Measurement:
    """Updates of one micro-batch with all steps of the sampler. The first is apart: libraries choose their kernels in
    it. It counts only where there is no other."""

    gib: dict[str, float]
    """Peak of each stage, over all updates."""
    s: dict[str, float]
    """Median seconds of each stage."""
    device: str
    updates_s: tuple[float, ...]
    """Of every update, the first too."""
    reserved_gib: float | None = None
    """What PyTorch's allocator holds of the card at the end, fragments included. ``None`` on the CPU."""
    retries: int = 0
    """How often it found no room, gave free segments back and tried again: a pause each."""
    shares: dict[str, float] = field(default_factory=dict)
    """On CUDA: what each kind of work reached, as ``cards.SHARES``."""

    @property
    def peak_gib(self) -> float:
        return max(self.gib.values())

    @property
    def later_s(self) -> tuple[float, ...]:
        """Without the first, if there are others."""
        return self.updates_s[1:] or self.updates_s

    @classmethod
    def of(cls, rows: Sequence[tuple[dict[str, float], dict[str, float]]], device: str) -> Self:
        """From seconds and peak GiB by stage of every update."""
        later = [seconds for seconds, _ in rows[1:] or rows]
        return cls(
            gib={stage: max(peaks[stage] for _, peaks in rows) for stage in rows[0][1]},
            s={stage: median(seconds[stage] for seconds in later) for stage in rows[0][0]},
            device=device,
            updates_s=tuple(sum(seconds.values()) for seconds, _ in rows),
        )


def measure(
    config: Config, device: torch.device, cap_gib: float | None, console: Console, updates: int = 3
) -> Measurement:
    """Runs updates on random weights.

    ``cap_gib``: on CUDA the allocator fails above it, minus half a GiB for the CUDA context as on a card of that size.

    Raises:
        LowmemError: out of memory, or a cuDNN that does not compute the VAE's convolutions.
        BadInputError: a transformer of more than 10^9 parameters on a CPU.
    """
    if config.engine != "single":
        join(config.device)
    require_fast_vae(config, device)
    if device.type == "cuda":
        if cap_gib:
            share = (cap_gib - 0.5) * GIB / torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, share)), device)
        meter = Meter(device)
        try:
            with console.status("measuring …"):
                models, prompts, questions = _random_models(config, device, meter)
                rows = _updates(config, models, prompts, questions, updates)
        except torch.OutOfMemoryError as error:
            where = f"under a cap of {cap_gib:g} GiB" if cap_gib else "on this card"
            advice = "Ask for a change that fits: lowmem-drf plan --preset NAME --vram GB"
            raise LowmemError(f"out of memory {where}: {error}\n{advice}") from error
        made, held = Measurement.of(rows, torch.cuda.get_device_name(device)), torch.cuda.memory_stats(device)
        reserved = torch.cuda.memory_reserved(device) / GIB
        attention = attention_named((models.kernel_record or {}).get("attention", "sdpa"))
        del models
        gc.collect()
        torch.cuda.empty_cache()
        shares = _learned(config, attention, device, console)
        return replace(made, reserved_gib=reserved, retries=held["num_alloc_retries"], shares=shares)
    _refuse_large(config)
    with console.status("measuring …"):
        gib = count_bytes(config)
    models, prompts, questions = _random_models(config, device, Meter(device))
    rows = _updates(config, models, prompts, questions, updates)
    return replace(Measurement.of(rows, "CPU"), gib=gib)


def _learned(config: Config, attention: Attention, device: torch.device, console: Console) -> dict[str, float]:
    """Measures what each kind of work reaches of the card's rates, and keeps it for later plans. Nothing of a card
    whose rates are unknown."""
    name = torch.cuda.get_device_name(device)
    card = card_named(name)
    if not card.is_in(name):
        return {}
    with console.status("measuring the card's rates …"):
        found = measured_rates(config, attention, device)
    shares = {kind: rate / card.rate(kind) for kind, rate in found.items()}
    shares = {kind: share for kind, share in shares.items() if plausible(kind, share)}
    if not shares:
        console.print("the card's rates could not be measured: plans keep theirs")
        return {}
    learn(card, shares)
    words = ", ".join(f"{kind} {share:.2f} ({SHARES[kind].of:.2f})" for kind, share in shares.items())
    said = f"shares of the card's rates (in brackets those of an unmeasured card): {words}; plans use them from now on"
    console.print(said, highlight=False)
    return shares


def count_bytes(config: Config) -> dict[str, float]:
    """Peak GiB by stage, as ``count_stages``."""
    return {name: stage.peak_gib for name, stage in count_stages(config).items()}


def count_stages(config: Config) -> dict[str, StagePlan]:
    """The stages of one real update on the CPU, whose bytes a ledger counts as if card and host were apart."""
    with Ledger(ALLOCATOR_BLOCK) as ledger:
        meter = PlanMeter(ledger)
        models, prompts, questions = _random_models(config, torch.device("cpu"), meter, planned_store())
        expert = [models.expert] if models.expert else []
        tiny = [models.tiny.network] if models.tiny else []
        critic = [models.critic.model] if models.critic else []
        meter.load([models.transformer, models.decoder.vae, *critic, *models.rewards.values(), *expert, *tiny])
        _updates(config, models, prompts, questions, ledger=ledger)
    return meter.stages


def _random_models(
    config: Config, device: torch.device, meter: Any, store: HostStore | None = None
) -> tuple[Models, list[Prompt], dict[str, tuple[Question, ...]]]:
    from lowmem_drf.models.qwen_vl.random_critic import random_critic
    from lowmem_drf.models.rewards.clip import ClipReward, empty_clip
    from lowmem_drf.models.rewards.users import is_entry
    from lowmem_drf.models.tiny.files import network_for, planned_sizes
    from lowmem_drf.models.weights.filling import fill, fill_as_loaded, random_values
    from lowmem_drf.models.weights.sources import resolve

    generator, dtype = generator_config(config.model.id), DTYPES[config.dtype]
    require_room(config, generator, {"micro_batch": config.micro_batch}, *free_bytes(device))
    prompts, questions = plan_prompts(config, generator)
    family = family_of(generator)
    on_host = "transformer" in (*config.memory.park, *config.memory.stream)
    home, taken = torch.device("cpu") if on_host else device, None
    if config.engine == "zero3":
        from lowmem_drf.distributed.zero import Partition

        taken = Partition(config).take

    def make(name: str) -> Any:
        empty = family.empty_transformer(getattr(generator, name), quant=config.model.storage)
        return fill_as_loaded(empty, dtype, random_values(device), home, taken)

    transformer, other = make_transformers(generator, config, make)
    add_lora(transformer, **config.lora.adapter)
    sizes = sizes_of(generator)
    noise = torch.Generator().manual_seed(0)
    texts = {
        text: torch.randn(config.model.text_tokens, sizes.text_dim, generator=noise).to(dtype)
        for text in [*(p.text for p in prompts), config.sampler.negative_prompt]
    }
    critic, rewards, rate = None, dict[str, torch.nn.Module](), critic_rate(config)
    if config.critic.weights.asked:
        critic = random_critic(resolve(config.critic.id, "critic"), dtype, device, rate, config.critic.quant)
    for name, reward in config.rewards.items():
        if is_entry(reward.id):
            raise BadInputError(f"bench has no stand-in for the reward {reward.id}. Leave it out: -s rewards={{}}")
        model, encode = empty_clip(reward.id)
        fill(model, random_values(device)(dtype), home=device)
        rewards[name] = ClipReward(model.to(device), encode, recompute=bool(config.memory.checkpoint))
    vae = fill_as_loaded(
        family.empty_vae(generator.vae), DTYPES[config.memory.vae_dtype], random_values(device), device
    )
    tiny = None
    if config.model.decoder != "exact":
        tiny = network_for(planned_sizes(config.model.id, config.model.decoder_file, sizes), sizes)
        tiny.to(device, vae.dtype)
    models = assemble(
        config, transformer, vae, critic, texts, device, meter, other=other, store=store, tiny=tiny, rewards=rewards,
        images=blank_images(config, generator, prompts),
    )  # fmt: skip
    return with_partitioned_critic(config, models) if config.zero.critic else models, prompts, questions


def _updates(
    config: Config, models: Models, prompts: Sequence[Prompt], questions: Mapping[str, tuple[Question, ...]],
    count: int = 1, ledger: Ledger | None = None,
) -> list[tuple[dict[str, float], dict[str, float]]]:  # fmt: skip
    """Seconds and peak GiB by stage of each of ``count`` updates. Of the tiny decoder the first one is compared."""
    trainer, models = make_trainer(config, models)
    lora, check = lora_parameters(models.transformer), DecoderCheck(config.model)
    if isinstance(trainer, SingleTrainer):
        trainer.fill()  # DeepSpeed allocates its state in the first step
        if ledger is not None:
            for moment in trainer.paged():
                ledger.on_host(moment)
    reports = (
        update(config, models, models.parts(lora, check.uses(step)), trainer, step, prompts, questions, None)
        for step in range(count)
    )
    return [(report.stage_s, report.stage_peak_gib) for report in reports]


def _refuse_large(config: Config) -> None:
    generator = generator_config(config.model.id)
    parameters = generator.transformer["num_layers"] * sizes_of(generator).width ** 2 * 12
    if parameters > LARGEST_ON_CPU:
        raise BadInputError(
            f"{config.model.id} has no place on a CPU ({parameters / 1e9:.1f} billion parameters in its blocks): bench "
            "needs a CUDA card for it. Without one: lowmem-drf plan --preset NAME"
        )


def bench_command(preset: str | None, vram: str | None, overrides: Sequence[str], as_json: bool, updates: int) -> None:
    """Prints planned and measured figures as a table or JSON."""
    name = preset if preset is not None else chosen_preset()[0]
    config = one_micro_batch(load_config(name, [*overrides, "processes=1"]))
    console = make_console(stderr=as_json, soft_wrap=True)
    cap_gib = parse_vram(vram) if vram else None
    device = resolve_device(config.device)
    card = card_named(torch.cuda.get_device_name(device) if device.type == "cuda" else preset_card(preset_path(name)))
    room = card_here(config) or room_of(card.gib, config.memory.vram_gib)
    if cap_gib:  # as a card of that size would be
        room = room_of(cap_gib, config.memory.vram_gib)
    plan = planned(config, card, room, console, advice=False)
    if plan.applied:
        console.print(set_to_fit(plan), highlight=False, markup=False)
    measured = measure(change(config, plan.applied), device, cap_gib, console, updates)
    if as_json:
        print(json.dumps(_as_json(plan, measured, name), indent=2))
    else:
        _print(plan, measured, name, console)
        if (every := config.model.decoder_check_every) > 1 and config.model.decoder != "exact":
            said = f"the first update here compares it, later ones do not; the plan's seconds are the mean of {every}"
            console.print(f"tiny decoder: {said}", highlight=False)


def _as_json(plan: Plan, measured: Measurement, name: str) -> dict[str, Any]:
    """The JSON of ``plan`` with the measurements of every stage; ``text`` has none, because no encoder is loaded."""
    rows = {
        stage: asdict(row) | {"measured_gib": measured.gib.get(stage), "measured_s": measured.s.get(stage)}
        for stage, row in plan.stages.items()
    }
    seconds = {"updates_s": measured.updates_s, "median_s": median(measured.later_s)}
    allocator = {"reserved_gib": measured.reserved_gib, "retries": measured.retries}
    figures = {"device": measured.device, "measured_peak_gib": measured.peak_gib} | allocator | seconds
    return plan.as_json(name) | figures | {"measured_shares": measured.shares, "stages": rows}


def _print(plan: Plan, measured: Measurement, name: str, console: Console) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    title = Text(f"{name}: one micro-batch on {measured.device}; seconds planned for {plan.card}")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("stage", no_wrap=True)
    for heading in ("plan GiB", "here", "differs", "plan s", "here"):
        table.add_column(heading, justify="right", no_wrap=True)
    for stage, gib in measured.gib.items():
        row = plan.stages[stage]
        memory = (f"{row.peak_gib:.3f}", f"{gib:.3f}", f"{row.peak_gib / gib - 1:+.1%}")
        table.add_row(stage, *memory, f"{row.s:.2f}", f"{measured.s[stage]:.2f}")
    console.print(table)
    peaks = f"planned {plan.peak_gib:.3f} GiB with the text encoder's stage, measured {measured.peak_gib:.3f} GiB"
    console.print(f"peak: {peaks}", highlight=False)
    if measured.reserved_gib is not None:
        held = f"reserved {measured.reserved_gib:.3f} GiB of the card, and found no room {measured.retries} times"
        console.print(f"allocator: {held}", highlight=False)
    console.print(f"seconds: {spread(measured)}", highlight=False)


def spread(measured: Measurement) -> str:
    """Seconds of the updates, in words."""
    first, *later = measured.updates_s
    if not later:
        return f"{first:.2f} for the first update, in which libraries choose their kernels"
    between = f" ({min(later):.2f} to {max(later):.2f})" if later[1:] else ""
    return f"{median(later):.2f} an update, the median of {len(later)}{between}; {first:.2f} for the first, apart"
