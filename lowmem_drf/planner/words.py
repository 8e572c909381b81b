"""What is said of a plan: the table, why it does not fit, what was set or would help."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lowmem_drf.assembly.rungs import ROUNDED
from lowmem_drf.config import load_config
from lowmem_drf.planner.cards import GIB, SPARE, card_named, learned
from lowmem_drf.planner.stages import Plan
from lowmem_drf.preset_files import DEFAULT_PRESET, default_preset, preset_gb, preset_path
from lowmem_drf.prompts import named_prompts
from lowmem_drf.schema import Config

if TYPE_CHECKING:
    from rich.console import Console

BENCHED = ", as lowmem-drf bench measured them here"
"""Of seconds by measured rates."""


def times(plan: Plan, steps: int) -> str:
    """Of an update, of 100, and of the run's ``steps``, in words."""
    hundred = "" if steps == 100 else f"{in_words(100 * plan.update_s)} for 100 updates, "
    return f"{_seconds(plan.update_s)} an update, {hundred}{in_words(steps * plan.update_s)} for the run's {steps:,}"


def on_this_card(plan: Plan, steps: int) -> str:
    """What ``train`` begins with: how long the run takes."""
    run = in_words(steps * plan.update_s)
    return f"{steps:,} updates, about {run} on this card: {_seconds(plan.update_s)} an update"


def clip_s(plan: Plan, config: Config) -> float:
    """Seconds of a clip without gradient, by the rollout and the decode of an update."""
    return (plan.stages["rollout"].s + plan.stages["decode"].s) * config.processes / config.batch


def sample_count(config: Config) -> int:
    """Sample clips of an update."""
    chosen = config.log.sample_prompts
    return chosen if isinstance(chosen, int) else len(named_prompts(chosen))


def sample_s(plan: Plan, config: Config) -> float:
    """Seconds of a sample clip: of a larger one at least, because attention takes the square."""
    log, video = config.log, config.video
    sides = ((log.sample_width, video.width), (log.sample_height, video.height), (log.sample_frames, video.frames))
    steps = (log.sample_steps, config.sampler.steps)
    return clip_s(plan, config) * math.prod((own or known) / known for own, known in (*sides, steps))


def watching(plan: Plan, config: Config) -> str:
    """What the watch and the sample clips take besides; empty where there are none."""
    log, parts = config.log, list[str]()
    # the watch looks at the base too
    rows = (
        (log.watch_every, log.watch_prompts * 2, "watch", 1, clip_s(plan, config)),
        (log.sample_every, sample_count(config) if log.sample_every else 0, "sample", 0, sample_s(plan, config)),
    )
    for every, clips, name, more, each_s in rows:
        if every:
            times = -(-config.steps // every) + more
            seconds = times * -(-clips // config.processes) * each_s
            parts.append(f"{in_words(seconds)} for {times} x {clips} {name} clips (log.{name}_every)")
    return f"besides, about {' and '.join(parts)}" if parts else ""


def _seconds(update_s: float) -> str:
    return f"{update_s:,.{int(update_s < 10)}f} s" if update_s >= 0.1 else f"{update_s:.2g} s"


def in_words(seconds: float) -> str:
    """50 s, 6.5 min, 10.8 h, 12 days: about two figures, of the largest unit of which there are two."""
    for unit, size in {"days": 86_400, "h": 3600, "min": 60, "s": 1}.items():
        if seconds >= 2 * size or unit == "s":
            break
    return _seconds(seconds) if seconds < 0.1 else f"{seconds / size:,.{int(seconds < 20 * size)}f} {unit}"


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


def eight_bit(plan: Plan) -> str | None:
    """One line of what the card decides when the run starts."""
    if plan.exact_s is None:
        return None
    without = f"without it about {_seconds(plan.exact_s)} an update"
    return f"8 bit where this card shows that it is faster: assumed here; {without}"


def set_to_fit(plan: Plan) -> str:
    """One line: what the card decided."""
    rounded = [text for text in plan.applied if text.startswith(ROUNDED)]
    same = f"same gradient; up to rounding by {', '.join(rounded)}" if rounded else "same gradient, to the bit"
    where = f"{plan.vram_gib:g} GiB" if not plan.measured else f"the {plan.room_gib:g} GiB that are free"
    return f"to fit {where}: {' '.join(plan.applied)} ({same})"


def _quoted(text: str) -> str:
    return f"'{text}'" if any(letter in text for letter in ' "[]') else text


def unplanned(config: Config) -> str:
    """What no plan counts, as a sentence; empty if it counts all."""
    from lowmem_drf.models.rewards.users import is_entry

    names = [f"rewards.{name} ({reward.id})" for name, reward in config.rewards.items() if is_entry(reward.id)]
    return f"not counted: the memory of {', '.join(names)}; leave room for it with --vram" if names else ""


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
    for line in (watching(plan, config), eight_bit(plan), unplanned(config)):
        if line:
            say(line)
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
    if config.model.decoder != "exact" and (every := config.model.decoder_check_every) > 1:
        say(f"one update in {every} compares the tiny decoder with the VAE: its peaks, and seconds on average")
    rates = BENCHED if learned(card_named(plan.card)).measured else ""
    say(
        "GiB: what PyTorch's allocator is asked for. Seconds: an estimate from operations, traffic and the card's "
        f"rates{rates}.",
        "dim",
    )
