"""A plan in words: the table, why it does not fit, and the check that ``train`` makes before it loads anything."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowmem_drf.errors import BadInputError
from lowmem_drf.models.weights.sources import TOYWORLD
from lowmem_drf.planner.cards import GIB, Card, card_named
from lowmem_drf.schema import Config

if TYPE_CHECKING:
    from rich.console import Console

    from lowmem_drf.planner.stages import Plan


def planned(config: Config, card: Card, vram_gib: float, console: Console) -> Plan:
    """The plan, with the changes that make it fit where it does not."""
    from lowmem_drf.planner.ladder import advise
    from lowmem_drf.planner.plan import make_plan

    with console.status("planning one update on tensors without values …") as status:
        plan = make_plan(config, card, vram_gib)
        return advise(config, card, plan, lambda text: status.update(f"it does not fit; trying {text}"))


def card_here(config: Config) -> float | None:
    """GiB of this process's card. ``None`` on the CPU."""
    import torch

    from lowmem_drf.assembly.assemble import resolve_device

    return (
        torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / GIB
        if resolve_device(config.device).type == "cuda"
        else None
    )


def require_fit(config: Config, console: Console, cards_gib: Sequence[float | None]) -> Config:
    """Plans for the card that is here, and says so in a line. Nothing on the CPU. Returns the configuration, with what
    the plan decides.

    ``cards_gib``: ``card_here`` of all processes; the smallest is planned with.

    Raises:
        BadInputError: it does not fit; with the stage that is too large, and what would make it fit.
    """
    import torch

    cards = [gib for gib in cards_gib if gib is not None]
    if not cards:
        return config
    vram_gib = min(config.memory.vram_gib or float("inf"), *cards)
    plan = planned(_laid_out(config), card_named(torch.cuda.get_device_name()), vram_gib, console)
    if not plan.fits:
        raise BadInputError(refusal(plan))
    _require_host_memory(plan)
    console.print(
        f"planned peak: {plan.peak_gib:.1f} of {vram_gib:.1f} GiB ({plan.largest}), {plan.host_gib:.1f} GiB of host memory",
        highlight=False,
    )
    return (
        config
        if plan.rollout is None
        else config.model_copy(update={"zero": config.zero.model_copy(update={"rollout": plan.rollout})})
    )


def _require_host_memory(plan: Plan) -> None:
    """Raises BadInputError where what waits on the host would not fit into what is free there, before any process of
    this machine loads anything. Where the system does not say, nothing is checked."""
    import torch

    from lowmem_drf.models.weights.downloads import HOST_MARGIN, available_host_bytes

    free, here = available_host_bytes(), min(plan.processes, max(1, torch.cuda.device_count()))
    if free is not None and here * (plan.host_gib * GIB + HOST_MARGIN) > free:
        each = f" for each of {here} processes" if here > 1 else ""
        raise BadInputError(
            f"host memory: {plan.host_gib:.1f} GiB would wait there for the card{each}, and {HOST_MARGIN / GIB:.0f} GiB are for everything else; "
            f"{free / GIB:.1f} GiB are free. Close other programs or add swap, or let less wait: a higher memory.vae_cache_every, memory.record_rollout=false, "
            'memory.keep_attention="none", memory.checkpoint=true, a smaller or quantised model.'
        )


def print_zero(config: Config, name: str, card: Card) -> None:
    """What DeepSpeed will be told, as comments behind the configuration's TOML on stdout, and on stderr the plan of
    each process."""
    from rich.console import Console

    from lowmem_drf.distributed.zero import deepspeed_config

    engines = {
        "the transformer's engine" if config.engine == "zero3" else "the LoRA's engine": deepspeed_config(config)
    }
    if config.zero.critic:
        engines["the critic's engine"] = deepspeed_config(config, trains=False)
    for whose, settings in engines.items():
        told = f"DeepSpeed, {whose}, in each of {config.processes} processes:\n{json.dumps(settings, indent=2)}"
        print(f"\n{textwrap.indent(told, '# ')}", flush=True)
    console = Console(stderr=True, soft_wrap=True)
    print_plan(planned(_laid_out(config), card, config.memory.vram_gib or card.gib, console), name, console)


def _laid_out(config: Config) -> Config:
    """Models whose configuration is not known here, by the folders they are in; downloaded first, if they have to
    be."""
    from lowmem_drf.assembly.loading import prepare_generator, say
    from lowmem_drf.models.generators import KNOWN_GENERATORS
    from lowmem_drf.models.qwen_vl.known import KNOWN
    from lowmem_drf.models.weights.downloads import prepare

    model, critic = config.model, config.critic
    if model.id not in (TOYWORLD, *KNOWN_GENERATORS):
        model = model.model_copy(update={"id": str(prepare_generator(config))})
    if critic.id not in (TOYWORLD, *KNOWN):
        critic = critic.model_copy(update={"id": str(prepare(critic.id, "critic", say))})
    return config.model_copy(update={"model": model, "critic": critic})


def refusal(plan: Plan) -> str:
    """Why a plan does not fit, and the cure."""
    stage = plan.stages[plan.largest]
    cure = (
        "It would fit with: " + " ".join(f"-s {_quoted(text)}" for text in plan.changes)
        if plan.changes
        else "No change of settings that is known here makes it fit."
    )
    return (
        f"this does not fit: {plan.largest} would take {stage.peak_gib:.1f} GiB, and of {plan.vram_gib:.0f} GiB {plan.usable_gib:.1f} can be planned with "
        f"(largest: {stage.what}).\n{cure}"
    )


def _quoted(text: str) -> str:
    return f"'{text}'" if any(letter in text for letter in ' "[]') else text


def print_plan(plan: Plan, name: str, console: Console) -> None:
    """The table, and whether it fits."""
    from rich.table import Table
    from rich.text import Text

    each = f", each of {plan.processes} processes" if plan.processes > 1 else ""
    table = Table(
        "stage", title=Text(f"{name}, planned for {plan.card}, {plan.vram_gib:g} GiB{each}"), title_justify="left"
    )
    for heading in ("peak GiB", "weights", "kept", "host GiB", "s", "waits s"):
        table.add_column(heading, justify="right")
    table.add_column("the largest at the peak, weights apart", overflow="fold")
    for stage, row in plan.stages.items():
        figures = (f"{value:.2f}" for value in (row.peak_gib, row.weights_gib, row.kept_gib, row.host_gib))
        seconds = (f"{row.s:,.1f}", f"{row.stall_s:,.1f}")
        table.add_row(Text(stage, style="bold" if stage == plan.largest else ""), *figures, *seconds, Text(row.what))
    console.print(table)
    verdict = "fits" if plan.fits else "does not fit"
    console.print(
        f"{verdict}: peak {plan.peak_gib:.2f} GiB ({plan.largest}) of the {plan.usable_gib:.1f} that can be planned with; host memory {plan.host_gib:.1f} GiB"
        f"{f', {plan.all_host_gib:.1f} of all {plan.processes} processes' if each else ''}; "
        f"about {plan.update_s:,.0f} s an update",
        style="green" if plan.fits else "red", highlight=False,
    )  # fmt: skip
    console.print(
        f"copies between card and host: {sum(row.moved_gib for row in plan.stages.values()):,.0f} GiB, {plan.hidden_share:.0%} of their time behind "
        f"computation; waiting for them is {plan.stall_share:.1%} of an update",
        highlight=False,
    )  # fmt: skip
    if each:
        console.print(
            f"of these copies {plan.between_gib:,.0f} GiB are between the cards, through the host's memory",
            highlight=False,
        )
    if plan.rollout:
        weights = {
            "gathered": "whole on each card, gathered once",
            "partitioned": "gathered block by block in every step",
        }[plan.rollout]
        console.print(
            f"the transformer's weights in the rollout: {weights} (zero.rollout = {plan.rollout})", highlight=False
        )
    console.print(
        "Bytes: those PyTorch's allocator is asked for. Seconds: an estimate from operations, traffic and the card's rates.",
        style="dim",
        highlight=False,
    )
    if not plan.fits:
        console.print(Text(refusal(plan).partition("\n")[2]), soft_wrap=True)
