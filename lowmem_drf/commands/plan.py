"""``lowmem-drf plan``: peak memory, host memory and time of an update, as a table or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lowmem_drf.config import load_config
from lowmem_drf.planner.cards import at_share, card_named, parse_vram, room_of
from lowmem_drf.planner.report import planned
from lowmem_drf.planner.words import print_plan, times
from lowmem_drf.preset_files import chosen_preset, preset_card, preset_path
from lowmem_drf.terminal import make_console

if TYPE_CHECKING:
    from rich.console import Console

    from lowmem_drf.planner.stages import Plan
    from lowmem_drf.schema import Config


def plan_command(
    preset: str | None, vram: str | None, overrides: Sequence[str], as_json: bool, share: float | None = None
) -> None:
    """Prints a table or JSON, and what to change if it does not fit. ``share``: also the time at this share of the
    card's arithmetic (``cards.at_share``)."""
    name = preset if preset is not None else chosen_preset()[0]
    config = load_config(name, overrides)
    console = make_console(stderr=as_json, soft_wrap=True)
    plan = plan_of(name, vram, config, console)
    other = plan_of(name, vram, config, console, share) if share else None
    if as_json:
        run: dict[str, Any] = {"steps": config.steps, "run_s": config.steps * plan.update_s}
        run |= {"at_share": {"share": share, "update_s": other.update_s}} if other else {}
        print(json.dumps(plan.as_json(name) | run, indent=2))
        return
    print_plan(plan, name, config, console)
    if other:
        said = f"with every share of the arithmetic's peak at {share:g}: about {times(other, config.steps)}"
        console.print(said, highlight=False)


def plan_of(name: str, vram: str | None, config: Config, console: Console, share: float | None = None) -> Plan:
    """The plan of a preset's configuration on the card that it is made for, of which ``vram`` may be used."""
    card = card_named(preset_card(preset_path(name)))
    room = room_of(parse_vram(vram) if vram else card.gib, config.memory.vram_gib)
    return planned(config, at_share(card, share) if share else card, room, console)
