"""Reports on a plan: the table, why it does not fit, and the check that ``train`` makes before it loads models.

Finished plans are kept on the disk (``PLANS``): to read one imports neither PyTorch nor a model library.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_drf.assembly.cache import Cache, cache_folder, code_versions, files_hash
from lowmem_drf.assembly.rungs import ROUNDED
from lowmem_drf.config import DEFAULT_PRESET, change, default_preset, load_config, preset_gb, preset_path
from lowmem_drf.errors import BadInputError
from lowmem_drf.libraries import uncollected
from lowmem_drf.models.weights.sources import READER, TOYWORLD, resolve
from lowmem_drf.planner.cards import GIB, LATER_GIB, SPARE, Card, Room, card_named, learned, room_of
from lowmem_drf.planner.stages import Plan
from lowmem_drf.schema import Config
from lowmem_drf.terminal import can_redraw, make_console, write_error
from lowmem_drf.texts import expanded

if TYPE_CHECKING:
    from rich.console import Console

    from lowmem_drf.schema import Log, Zero

PLANS = "plans"
"""Folder of finished plans in the cache."""
MOST_PLANS = 200
"""About 4 KB each."""
STEP_GIB = 0.25
"""Free memory is rounded down to a multiple, so that a plan is found again."""
_BENCHED = ", as lowmem-drf bench measured them here"
FIRST_CLIPS_S = 60.0
"""Clips of the base model are made before the first update if they take less."""


def planned(
    config: Config, card: Card, room: Room, console: Console, advice: bool = True, host_gib: float | None = None
) -> Plan:
    """The plan, made to fit by ``memory.fit``; where that does not suffice, with advice if that is asked for. Made
    once, then read from the disk.

    Args:
        room: the card's memory.
        host_gib: what may wait in the host's memory. ``None``: anything.
    """
    card, kept = learned(card), Cache(cache_folder() / PLANS, MOST_PLANS)
    key = _depends_on(config, card, room) | {"advice": advice, "host": host_gib}
    try:
        return Plan.from_dict(kept.get(key))
    except (TypeError, KeyError, AttributeError):  # there is none, or another program wrote it
        plan = _planned(config, card, room, console, advice, host_gib)
    kept.put(key, asdict(plan))
    return plan


def _depends_on(config: Config, card: Card, room: Room) -> dict[str, Any]:
    """Everything that changes a plan: the whole configuration, contents of the files that it names, the card, and the
    code."""
    from lowmem_drf.models.generators import generator_config

    critic = Path(resolve(config.critic.id, "critic"))
    named = [expanded(text) for text in (config.prompts or "", config.critic.questions)]
    files = [path for path in named if path.is_file()]
    # what a critic's folder has besides its weights: configuration, processor, tokenizer
    files += [path for path in critic.glob("*") if path.suffix in (".json", ".jinja", ".txt", ".model")]
    return {
        "config": config.model_dump(mode="json"),
        "card": asdict(card),
        "room": asdict(room),
        "generator": asdict(generator_config(config.model.id)),
        "files": files_hash(files),
        **code_versions(),
    }


@uncollected()
def _planned(config: Config, card: Card, room: Room, console: Console, advice: bool, host_gib: float | None) -> Plan:
    from lowmem_drf.planner.ladder import advise, advise_host
    from lowmem_drf.planner.plan import Seen, make_plan, new_fakes

    with planning(console) as say:
        fakes, seen = new_fakes(), Seen()
        plan = make_plan(config, card, room.vram_gib, fakes=fakes, seen=seen)
        plan = replace(plan, free_gib=room.free_gib, measured=room.measured)
        if not advice and config.memory.fit == "as_given":
            return plan

        def trying(text: str) -> None:
            say(f"it does not fit as it is; trying {text}")

        plan = advise(config, card, plan, trying, fakes, seen, dear=advice)
        return plan if host_gib is None else advise_host(config, card, plan, host_gib, trying, fakes, seen)


@contextmanager
def planning(console: Console) -> Iterator[Callable[[str], None]]:
    """Says that it plans while it does, on a terminal and in a log: it may take minutes. Yields what says more."""
    first = "planning one update on tensors without values …"
    with console.status(first) as status:
        say = status.update if can_redraw(console) else write_error
        say(first)
        yield say


def card_here(config: Config) -> Room | None:
    """Memory of this process's card, less what CUDA will load later. ``None`` on the CPU."""
    import torch

    from lowmem_drf.assembly.assemble import resolve_device

    device = resolve_device(config.device)
    if device.type != "cuda":
        return None
    free, total = (nbytes / GIB for nbytes in torch.cuda.mem_get_info(device))  # CUDA's context is there now
    free = math.floor((free - LATER_GIB) / STEP_GIB) * STEP_GIB
    return Room(total, free, measured=True).within(config.memory.vram_gib)


def require_fit(config: Config, console: Console, rooms: Sequence[Room | None]) -> Config:
    """Plans for this machine's card, and prints what the plan sets and one line. Does nothing on the CPU. Returns the
    configuration with the settings that make it fit, and the plan's choice of ``zero.rollout``.

    ``rooms``: ``card_here`` of all processes; the one with the least free memory is planned for.

    Raises:
        BadInputError: it does not fit. The message names the tightest stage and the changes that make it fit.
    """
    import torch

    cards = [room for room in rooms if room is not None]
    if not cards:
        return config
    room = min(cards, key=lambda card: card.free_gib)
    device = torch.cuda.get_device_name()
    card = card_named(device)
    arguments = laid_out(config), card, room, console
    plan = planned(*arguments)
    if not plan.fits:
        raise BadInputError(refusal(plan, config))
    free_gib = _free_host(plan.processes)
    if plan.host_gib > free_gib:
        plan = planned(*arguments, host_gib=math.floor(free_gib))
        if plan.host_gib > free_gib:
            raise BadInputError(host_refusal(plan, free_gib))
    if plan.applied:
        console.print(set_to_fit(plan), highlight=False, markup=False)
    peak = f"{plan.peak_gib:.1f} of {plan.usable_gib:.1f} GiB ({plan.largest}), {plan.host_gib:.1f} GiB of host memory"
    rates = _BENCHED if learned(card).measured else ""
    rates = rates if card.is_in(device) else f", if this card were an {card.name}: its own rates are unknown"
    console.print(f"planned peak: {peak}; about {times(plan, config.steps)}{rates}", highlight=False)
    config = change(config, plan.applied)
    log = _with_first(config, plan, console)
    return config.model_copy(update={"zero": _with_rollout(config.zero, plan), "log": log})


def _with_rollout(zero: Zero, plan: Plan) -> Zero:
    return zero if plan.rollout is None else zero.model_copy(update={"rollout": plan.rollout})


def _with_first(config: Config, plan: Plan, console: Console) -> Log:
    """Decides ``log.sample_first = "auto"`` by the plan's seconds, and says so where the clips are left out."""
    log = config.log
    if log.sample_first != "auto" or not log.sample_every:
        return log
    each = (plan.stages["rollout"].s + plan.stages["decode"].s) * config.processes / config.batch
    seconds = -(-log.sample_prompts // config.processes) * each
    if seconds >= FIRST_CLIPS_S:
        took = f"{log.sample_prompts} sample clips of the base model would take about {in_words(seconds)}"
        console.print(f"{took}: left out. To have them: -s log.sample_first=true", highlight=False)
    return log.model_copy(update={"sample_first": seconds < FIRST_CLIPS_S})


def times(plan: Plan, steps: int) -> str:
    """Of an update, of 100, and of the run's ``steps``, in words."""
    hundred = "" if steps == 100 else f"{in_words(100 * plan.update_s)} for 100 updates, "
    return f"{_seconds(plan.update_s)} an update, {hundred}{in_words(steps * plan.update_s)} for the run's {steps:,}"


def _seconds(update_s: float) -> str:
    return f"{update_s:,.{int(update_s < 10)}f} s" if update_s >= 0.1 else f"{update_s:.2g} s"


def in_words(seconds: float) -> str:
    """50 s, 6.5 min, 10.8 h, 12 days: about two figures, of the largest unit of which there are two."""
    for unit, size in {"days": 86_400, "h": 3600, "min": 60, "s": 1}.items():
        if seconds >= 2 * size or unit == "s":
            break
    return _seconds(seconds) if seconds < 0.1 else f"{seconds / size:,.{int(seconds < 20 * size)}f} {unit}"


def _free_host(processes: int) -> float:
    """GiB that may wait in the host's memory for each of this machine's processes. Infinite if the system does not
    report it."""
    import torch

    from lowmem_drf.models.weights.downloads import HOST_MARGIN, available_host_bytes

    free, here = available_host_bytes(), min(processes, max(1, torch.cuda.device_count()))
    return math.inf if free is None else (free / here - HOST_MARGIN) / GIB


def laid_out(config: Config) -> Config:
    """Replaces models whose configuration is unknown here by their folders. Downloads them if necessary."""
    from lowmem_drf.assembly.loading import prepare_generator, say
    from lowmem_drf.models.generators import KNOWN_GENERATORS
    from lowmem_drf.models.qwen_vl.known import KNOWN
    from lowmem_drf.models.weights.downloads import prepare

    model, critic = config.model, config.critic
    if model.id not in (TOYWORLD, *KNOWN_GENERATORS):
        model = model.model_copy(update={"id": str(prepare_generator(config))})
    if critic.id not in (TOYWORLD, READER, *KNOWN):
        critic = critic.model_copy(update={"id": str(prepare(critic.id, "critic", say))})
    return config.model_copy(update={"model": model, "critic": critic})


def refusal(plan: Plan, config: Config) -> str:
    """Why a plan does not fit, and what to change: at most five lines."""
    stage = plan.stages[plan.tightest]
    why = f"this does not fit: {_need(plan)} ({stage.what})" if stage.what else f"this does not fit: {_need(plan)}"
    return "\n".join([f"{why}.", f"{_room_words(plan)}.", *_cure(plan, config), *_made_for(plan, config)])


def host_refusal(plan: Plan, free_gib: float) -> str:
    """The same where the host's memory is too small."""
    each = f" of each of {plan.processes} processes" if plan.processes > 1 else ""
    need = (
        f"host memory: {plan.host_gib:.1f} GiB{each} would wait there for the card, and {free_gib:.1f} are free for it"
    )
    return "\n".join([f"{need}. Close other programs, or add swap.", *_cure(plan)])


def _need(plan: Plan) -> str:
    stage = plan.stages[plan.tightest]
    parts = f"a peak of {stage.peak_gib:.1f}, {SPARE:.0%} for fragments"
    parts += f", {stage.copies_gib:.1f} for cuDNN's copies" if stage.copies_gib >= 0.05 else ""
    return f"{plan.tightest} needs {stage.needs_gib:.1f} GiB: {parts}"


def _room_words(plan: Plan) -> str:
    """What of the card can be had, and where the rest is."""
    if plan.measured:
        return f"Of the card's {plan.vram_gib:.1f} GiB PyTorch can take the {plan.room_gib:.1f} that are free now"
    rest = plan.vram_gib - plan.room_gib
    return (
        f"Of {plan.vram_gib:g} GiB PyTorch is assumed to get {plan.room_gib:.1f}; {rest:.1f} are left to CUDA, the "
        "driver and a desktop"
    )


def _cure(plan: Plan, config: Config | None = None) -> list[str]:
    """``config``: where advice comes on top of what is set by itself."""
    if not plan.changes or not plan.changed:
        return ["No change of settings that is known here makes it fit."]
    after = plan.changed
    then = f"Then: peak {after.peak_gib:.1f} GiB, {after.host_gib:.1f} GiB of host memory, "
    auto = config is not None and config.memory.fit == "auto"
    besides = ", besides what is then set by itself" if auto else ""
    return [
        f"It would fit with{besides}: " + " ".join(f"-s {_quoted(text)}" for text in plan.changes),
        then + f"about {_seconds(after.update_s)} an update.",
    ]


def _made_for(plan: Plan, config: Config) -> list[str]:
    """A preset for such a card, if it trains something else than ``config``."""
    name = default_preset(plan.vram_gib * GIB / 1e9, plan.card)
    if name == DEFAULT_PRESET:
        return []
    trained = {"model", "critic", "video", "sampler", "lora"}
    if load_config(name).model_dump(include=trained) == config.model_dump(include=trained):
        return []
    return [f"A preset made for a card of {preset_gb(preset_path(name)):.0f} GB: --preset {name}"]


def set_to_fit(plan: Plan) -> str:
    """One line: what the card decided."""
    rounded = [text for text in plan.applied if text.startswith(ROUNDED)]
    same = f"same gradient; up to rounding by {', '.join(rounded)}" if rounded else "same gradient, to the bit"
    where = f"{plan.vram_gib:g} GiB" if not plan.measured else f"the {plan.room_gib:g} GiB that are free"
    return f"to fit {where}: {' '.join(plan.applied)} ({same})"


def _quoted(text: str) -> str:
    return f"'{text}'" if any(letter in text for letter in ' "[]') else text


def print_plan(plan: Plan, name: str, config: Config, console: Console) -> None:
    """Prints whether it fits and how long it takes, what was set or is advised, and the table."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    wrapped = console.is_terminal  # at words; a log has one line a message

    def say(text: str, style: str | None = None) -> None:
        console.print(Text(text), style=style, soft_wrap=not wrapped)

    each = f", each of {plan.processes} processes" if plan.processes > 1 else ""
    together = f" ({plan.all_host_gib:.1f} of all {plan.processes} processes)" if each else ""
    say(
        f"{'fits' if plan.fits else 'does not fit'}: peak {plan.peak_gib:.2f} GiB ({plan.largest}), host memory "
        f"{plan.host_gib:.1f} GiB{together}",
        "bold green" if plan.fits else "bold red",
    )
    say(f"on an {plan.card} about {times(plan, config.steps)}")
    if plan.applied:
        say(set_to_fit(plan))
    say(f"{_room_words(plan)}; {_need(plan)}.")
    for line in () if plan.fits else (*_cure(plan, config), *_made_for(plan, config)):
        console.print(Text(line), soft_wrap=True)
    title = Text(f"{name}, planned for {plan.card}, {plan.vram_gib:g} GiB{each}")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("stage", no_wrap=True)
    for heading in ("peak", "weights", "host", "s", "waits"):
        table.add_column(heading, justify="right", no_wrap=True)
    for stage, row in plan.stages.items():
        figures = (f"{row.peak_gib:.2f}", f"{row.weights_gib:.2f}", f"{row.host_gib:.2f}")
        style = "bold" if stage == plan.tightest else ""
        table.add_row(Text(stage, style=style), *figures, f"{row.s:,.1f}", f"{row.stall_s:,.1f}")
    console.print()
    console.print(table)
    console.print()
    if what := plan.stages[plan.tightest].what:
        say(f"largest in {plan.tightest}, weights apart: {what}")
    say(
        f"copies between card and host: {plan.moved_gib:,.0f} GiB, {plan.hidden_share:.0%} of their time behind "
        f"computation; waiting for them is {plan.stall_share:.1%} of an update"
    )
    if each:
        say(f"of these copies {plan.between_gib:,.0f} GiB are between the cards, through the host's memory")
    if plan.rollout:
        gathered, partitioned = "whole on each card, gathered once", "gathered block by block in every step"
        weights = gathered if plan.rollout == "gathered" else partitioned
        say(f"the transformer's weights in the rollout: {weights} (zero.rollout = {plan.rollout})")
    rates = _BENCHED if learned(card_named(plan.card)).measured else ""
    say(
        "GiB: what PyTorch's allocator is asked for. Seconds: an estimate from operations, traffic and the card's "
        f"rates{rates}.",
        "dim",
    )


def print_zero(config: Config, name: str, card: Card) -> None:
    """Prints DeepSpeed's settings on stdout, as comments behind the configuration's TOML, and on stderr the plan of
    each process."""
    from lowmem_drf.distributed.zero import deepspeed_config

    trained = "the transformer's engine" if config.engine == "zero3" else "the LoRA's engine"
    engines = {trained: deepspeed_config(config)}
    if config.zero.critic:
        engines["the critic's engine"] = deepspeed_config(config, trains=False)
    for engine, settings in engines.items():
        title = f"DeepSpeed, {engine}, in each of {config.processes} processes:"
        print("\n" + textwrap.indent(f"{title}\n{json.dumps(settings, indent=2)}", "# "), flush=True)
    console = make_console(stderr=True, soft_wrap=True)
    print_plan(
        planned(laid_out(config), card, room_of(card.gib, config.memory.vram_gib), console), name, config, console
    )
