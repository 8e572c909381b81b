"""``lowmem-drf plan``: peak memory, host memory and time of an update, as a table or as JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowmem_drf.config import chosen_preset, load_config, preset_card, preset_path
from lowmem_drf.planner.cards import Card, card_named, parse_vram, room_of
from lowmem_drf.planner.report import cure, laid_out, made_for, need, planned, room_words, set_to_fit, times
from lowmem_drf.planner.stages import Plan
from lowmem_drf.schema import Config
from lowmem_drf.terminal import make_console

if TYPE_CHECKING:
    from rich.console import Console


def plan_command(preset: str | None, vram: str | None, overrides: Sequence[str], as_json: bool) -> None:
    """Prints a table or JSON, and what to change if it does not fit."""
    name = preset if preset is not None else chosen_preset()[0]
    config = load_config(name, overrides)
    card = card_named(preset_card(preset_path(name)))
    console = make_console(stderr=as_json, soft_wrap=True)
    plan = planned(config, card, room_of(parse_vram(vram) if vram else card.gib, config.memory.vram_gib), console)
    if as_json:
        run = {"steps": config.steps, "run_s": config.steps * plan.update_s}
        print(json.dumps(plan.as_json(name) | run, indent=2))
        return
    print_plan(plan, name, config, console)


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
    say(f"about {times(plan, config.steps)}")
    if plan.applied:
        say(set_to_fit(plan))
    say(f"{room_words(plan)}; {need(plan)}.")
    for line in () if plan.fits else (*cure(plan), *made_for(plan, config)):
        console.print(Text(line), soft_wrap=True)
    title = Text(f"{name}, planned for {plan.card}, {plan.vram_gib:g} GiB{each}")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("stage", no_wrap=True)
    for heading in ("peak", "weights", "host", "s", "waits"):
        table.add_column(heading, justify="right", no_wrap=True)
    for stage, row in plan.stages.items():
        figures = (f"{row.peak_gib:.2f}", f"{row.weights_gib:.2f}", f"{row.host_gib:.2f}")
        style = "bold" if stage == plan.tightest else ""
        table.add_row(Text(stage, style=style), *figures, f"{row.s:,.1f}", f"{row.stall_s:,.1f}")
    console.print(table)
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
    say(
        "GiB: what PyTorch's allocator is asked for. Seconds: an estimate from operations, traffic and the card's "
        "rates.",
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
