"""Plans as commands ask for them: kept on the disk, made to fit, and checked before ``train`` loads models.

Finished plans are kept on the disk (``PLANS``): to read one imports neither PyTorch nor a model library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_drf.assembly.cache import Cache, cache_folder, code_versions, files_hash
from lowmem_drf.config import change
from lowmem_drf.errors import BadInputError
from lowmem_drf.libraries import uncollected
from lowmem_drf.models.weights.sources import READER, TOYWORLD, resolve
from lowmem_drf.planner.cards import GIB, LATER_GIB, Card, Room, card_named, learned
from lowmem_drf.planner.stages import Plan
from lowmem_drf.planner.words import (
    BENCHED,
    eight_bit,
    host_refusal,
    in_words,
    on_this_card,
    refusal,
    sample_count,
    sample_s,
    set_to_fit,
    unplanned,
)
from lowmem_drf.schema import Config
from lowmem_drf.terminal import can_redraw, say, write_error
from lowmem_drf.texts import expanded

if TYPE_CHECKING:
    from rich.console import Console

    from lowmem_drf.schema.running import Log, Zero

PLANS = "plans"
"""Folder of finished plans in the cache."""
MOST_PLANS = 200
"""About 4 KB each."""
STEP_GIB = 0.25
"""Free memory is rounded down to a multiple, so that a plan is found again."""
FIRST_CLIPS_S = 60.0
"""Clips of the base model are made before the first update if they take less."""


def planned(
    config: Config, card: Card, room: Room, console: Console, advice: bool = True, host_gib: float | None = None
) -> Plan:
    """The plan, made to fit by ``memory.fit``; where that does not suffice, with advice if that is asked for. Made
    once, then read from the disk.

    Args:
        card: with the shares to plan by, or without, for those measured here.
        room: the card's memory.
        host_gib: what may wait in the host's memory. ``None``: anything.
    """
    card, kept = card if card.measured else learned(card), Cache(cache_folder() / PLANS, MOST_PLANS)
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
    named = [expanded(text) for text in (config.prompts or "", config.critic.questions, config.model.decoder_file)]
    files = [path for path in named if path.is_file()]
    files += [path / "config.json" for reward in config.rewards.values() if (path := Path(reward.id)).is_dir()]
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


def require_fit(config: Config, console: Console, rooms: Sequence[Room | None]) -> tuple[Config, Plan | None]:
    """Plans for this machine's card, and prints what the plan sets and one line. Does nothing on the CPU. Returns the
    configuration with the settings that make it fit and the plan's choice of ``zero.rollout``, and the plan.

    ``rooms``: ``card_here`` of all processes; the one with the least free memory is planned for.

    Raises:
        BadInputError: it does not fit. The message names the tightest stage and the changes that make it fit.
    """
    import torch

    cards = [room for room in rooms if room is not None]
    if not cards:
        return config, None
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
    rates = BENCHED if learned(card).measured else ""
    rates = rates if card.is_in(device) else f", if this card were an {card.name}: its own rates are unknown"
    console.print(f"planned peak: {peak}", highlight=False)
    console.print(f"{on_this_card(plan, config.steps)}{rates}", highlight=False)
    for line in filter(None, (eight_bit(plan), unplanned(config))):
        console.print(line, highlight=False, markup=False)
    config = change(config, plan.applied)
    log = _with_first(config, plan, console)
    return config.model_copy(update={"zero": _with_rollout(config.zero, plan), "log": log}), plan


def _with_rollout(zero: Zero, plan: Plan) -> Zero:
    return zero if plan.rollout is None else zero.model_copy(update={"rollout": plan.rollout})


def _with_first(config: Config, plan: Plan, console: Console) -> Log:
    """Decides ``log.sample_first = "auto"`` by the plan's seconds, and says so where the clips are left out."""
    log = config.log
    if log.sample_first != "auto" or not log.sample_every:
        return log
    count = sample_count(config)
    seconds = -(-count // config.processes) * sample_s(plan, config)
    if seconds >= FIRST_CLIPS_S:
        took = f"{count} sample clips of the base model would take about {in_words(seconds)}"
        console.print(f"{took}: left out. To have them: -s log.sample_first=true", highlight=False)
    return log.model_copy(update={"sample_first": seconds < FIRST_CLIPS_S})


def _free_host(processes: int) -> float:
    """GiB that may wait in the host's memory for each of this machine's processes. Infinite if the system does not
    report it."""
    import torch

    from lowmem_drf.models.weights.downloads import HOST_MARGIN, available_host_bytes

    free, here = available_host_bytes(), min(processes, max(1, torch.cuda.device_count()))
    return math.inf if free is None else (free / here - HOST_MARGIN) / GIB


def laid_out(config: Config) -> Config:
    """Replaces models whose configuration is unknown here by their folders. Downloads them if necessary."""
    from lowmem_drf.assembly.loading import prepare_generator
    from lowmem_drf.models.generators import KNOWN_GENERATORS
    from lowmem_drf.models.qwen_vl.known import KNOWN
    from lowmem_drf.models.rewards.clip import KNOWN as KNOWN_CLIPS
    from lowmem_drf.models.weights.downloads import prepare

    model, critic = config.model, config.critic
    if model.id not in (TOYWORLD, *KNOWN_GENERATORS):
        model = model.model_copy(update={"id": str(prepare_generator(config))})
    if critic.weights.asked and critic.id not in (TOYWORLD, READER, *KNOWN):
        critic = critic.model_copy(update={"id": str(prepare(critic.id, "critic", say))})
    rewards = {
        name: one if one.id in KNOWN_CLIPS else one.model_copy(update={"id": _reward_place(one.id)})
        for name, one in config.rewards.items()
    }
    return config.model_copy(update={"model": model, "critic": critic, "rewards": rewards})


def _reward_place(reward_id: str) -> str:
    from lowmem_drf.assembly.loading import prepare_reward
    from lowmem_drf.models.rewards.users import is_entry

    return reward_id if is_entry(reward_id) else str(prepare_reward(reward_id, say))
