"""Reports on a plan: the table, why it does not fit, and the check that ``train`` makes before it loads models.

Finished plans are kept on the disk (``PLANS``): to read one imports neither PyTorch nor a model library.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_drf.assembly.cache import Cache, cache_folder, code_versions, files_hash
from lowmem_drf.errors import BadInputError
from lowmem_drf.models.weights.sources import READER, TOYWORLD, resolve
from lowmem_drf.planner.cards import GIB, Card, card_named
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
FIRST_CLIPS_S = 60.0
"""Clips of the base model are made before the first update if they take less."""


def planned(config: Config, card: Card, vram_gib: float, console: Console, advice: bool = True) -> Plan:
    """The plan. If it does not fit, and ``advice`` is asked for: with the changes that make it fit. Made once, then
    read from the disk."""
    kept = Cache(cache_folder() / PLANS, MOST_PLANS)
    key = _depends_on(config, card, vram_gib) | {"advice": advice}
    try:
        return Plan.from_dict(kept.get(key))
    except (TypeError, KeyError, AttributeError):  # there is none, or another program wrote it
        plan = _planned(config, card, vram_gib, console, advice)
    kept.put(key, asdict(plan))
    return plan


def _depends_on(config: Config, card: Card, vram_gib: float) -> dict[str, Any]:
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
        "vram_gib": vram_gib,
        "generator": asdict(generator_config(config.model.id)),
        "files": files_hash(files),
        **code_versions(),
    }


def _planned(config: Config, card: Card, vram_gib: float, console: Console, advice: bool) -> Plan:
    from lowmem_drf.planner.ladder import advise
    from lowmem_drf.planner.plan import Seen, make_plan, new_fakes

    with planning(console) as say:
        fakes, seen = new_fakes(), Seen()
        plan = make_plan(config, card, vram_gib, fakes=fakes, seen=seen)
        if not advice:
            return plan
        return advise(config, card, plan, lambda text: say(f"it does not fit; trying {text}"), fakes, seen)


@contextmanager
def planning(console: Console) -> Iterator[Callable[[str], None]]:
    """Says that it plans while it does, on a terminal and in a log: it may take minutes. Yields what says more."""
    first = "planning one update on tensors without values …"
    with console.status(first) as status:
        say = status.update if can_redraw(console) else write_error
        say(first)
        yield say


def card_here(config: Config) -> float | None:
    """Memory of this process's card in GiB. ``None`` on the CPU."""
    import torch

    from lowmem_drf.assembly.assemble import resolve_device

    device = resolve_device(config.device)
    return torch.cuda.get_device_properties(device).total_memory / GIB if device.type == "cuda" else None


def require_fit(config: Config, console: Console, cards_gib: Sequence[float | None]) -> Config:
    """Plans for this machine's card and prints one line. Does nothing on the CPU. Returns the configuration with the
    plan's choice of ``zero.rollout``.

    ``cards_gib``: ``card_here`` of all processes; the smallest one is planned for.

    Raises:
        BadInputError: it does not fit. The message names the largest stage and the changes that make it fit.
    """
    import torch

    cards = [gib for gib in cards_gib if gib is not None]
    if not cards:
        return config
    vram_gib = min(config.memory.vram_gib or float("inf"), *cards)
    plan = planned(laid_out(config), card_named(torch.cuda.get_device_name()), vram_gib, console)
    if not plan.fits:
        raise BadInputError(refusal(plan))
    _require_host_memory(plan)
    peak = f"{plan.peak_gib:.1f} of {vram_gib:.1f} GiB ({plan.largest}), {plan.host_gib:.1f} GiB of host memory"
    console.print(f"planned peak: {peak}; about {times(plan, config.steps)}", highlight=False)
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
    update = f"{plan.update_s:,.{int(plan.update_s < 10)}f} s"
    return f"{update} an update, {hundred}{in_words(steps * plan.update_s)} for the run's {steps:,}"


def in_words(seconds: float) -> str:
    """50 s, 6.5 min, 10.8 h, 12 days: about two figures, of the largest unit of which there are two."""
    for unit, size in {"days": 86_400, "h": 3600, "min": 60, "s": 1}.items():
        if seconds >= 2 * size or unit == "s":
            break
    return f"{seconds / size:,.{int(seconds < 20 * size)}f} {unit}"


def _require_host_memory(plan: Plan) -> None:
    """Raises BadInputError, before anything is loaded, if the planned host memory of all processes on this machine
    exceeds what is free. Passes if the system does not report free memory."""
    import torch

    from lowmem_drf.models.weights.downloads import HOST_MARGIN, available_host_bytes

    free, here = available_host_bytes(), min(plan.processes, max(1, torch.cuda.device_count()))
    if free is not None and here * (plan.host_gib * GIB + HOST_MARGIN) > free:
        each = f" for each of {here} processes" if here > 1 else ""
        raise BadInputError(
            f"host memory: {plan.host_gib:.1f} GiB would wait there for the card{each}, and "
            f"{HOST_MARGIN / GIB:.0f} GiB are for everything else; {free / GIB:.1f} GiB are free. Close other programs "
            "or add swap, or let less "
            "wait: a higher memory.vae_cache_every, memory.record_rollout=false, "
            'memory.keep_attention="none", memory.checkpoint=true, a smaller or quantised model.'
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
        planned(laid_out(config), card, config.memory.vram_gib or card.gib, console), name, config.steps, console
    )


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


def refusal(plan: Plan) -> str:
    """Why a plan does not fit, and what to change."""
    stage = plan.stages[plan.largest]
    cure = "No change of settings that is known here makes it fit."
    if plan.changes:
        cure = "It would fit with: " + " ".join(f"-s {_quoted(text)}" for text in plan.changes)
    return (
        f"this does not fit: {plan.largest} would take {stage.peak_gib:.1f} GiB, and of {plan.vram_gib:.0f} GiB "
        f"{plan.usable_gib:.1f} can be planned with (largest: {stage.what}).\n{cure}"
    )


def _quoted(text: str) -> str:
    return f"'{text}'" if any(letter in text for letter in ' "[]') else text


def print_plan(plan: Plan, name: str, steps: int, console: Console) -> None:
    """Prints the table, whether it fits, and how long an update and the run's ``steps`` take."""
    from rich.table import Table
    from rich.text import Text

    each = f", each of {plan.processes} processes" if plan.processes > 1 else ""
    title = Text(f"{name}, planned for {plan.card}, {plan.vram_gib:g} GiB{each}")
    table = Table("stage", title=title, title_justify="left")
    for heading in ("peak GiB", "weights", "kept", "host GiB", "s", "waits s"):
        table.add_column(heading, justify="right")
    table.add_column("the largest at the peak, weights apart", overflow="fold")
    for stage, row in plan.stages.items():
        figures = (f"{value:.2f}" for value in (row.peak_gib, row.weights_gib, row.kept_gib, row.host_gib))
        seconds = (f"{row.s:,.1f}", f"{row.stall_s:,.1f}")
        table.add_row(Text(stage, style="bold" if stage == plan.largest else ""), *figures, *seconds, Text(row.what))
    console.print(table)

    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, highlight=False)

    together = f", {plan.all_host_gib:.1f} of all {plan.processes} processes" if each else ""
    say(
        f"{'fits' if plan.fits else 'does not fit'}: peak {plan.peak_gib:.2f} GiB ({plan.largest}) of the "
        f"{plan.usable_gib:.1f} that can be planned with; host memory {plan.host_gib:.1f} GiB{together}; "
        f"about {times(plan, steps)}",
        "green" if plan.fits else "red",
    )
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
    say(
        "Bytes: those PyTorch's allocator is asked for. Seconds: an estimate from operations, traffic and the card's "
        "rates.",
        "dim",
    )
    if not plan.fits:
        console.print(Text(refusal(plan).partition("\n")[2]), soft_wrap=True)
