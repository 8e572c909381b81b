"""Chooses the implementation of each operation, and the tiles of our kernels, once, at the start of a run.

On a card a choice is timed, so two of them may differ, and with them the last bits of a gradient, or with 8 bit on
``auto`` (``LEVERS``) more than those. A run therefore keeps its choice in ``kernels.json``: all its processes take that
of the first, and a resumed run takes it again.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowmem_drf.assembly.conditions import DTYPES
from lowmem_drf.assembly.eight_bit import (
    GRADED,
    LEVERS,
    MARGIN,
    Option,
    as_chosen,
    attention_answers,
    decided,
    in_8_bit,
    layers_answer,
    ms,
    on_auto,
    options_of,
)
from lowmem_drf.assembly.trials import Timer, Work, card_seconds, tried
from lowmem_drf.distributed.ranks import ALONE, Ranks
from lowmem_drf.errors import BadInputError
from lowmem_drf.models.attention import (
    BEHIND_INT8,
    NAMES,
    attention_named,
    refusal,
    why_not,
    with_int8_forward,
)
from lowmem_drf.ops import (
    Attention,
    AttentionName,
    RowOps,
    choose_rows,
    fused_ops,
    int8_attention,
    int8_forward,
    naive_ops,
    require_int8_products,
    tiles,
)
from lowmem_drf.schema import Config
from lowmem_drf.schema.running import Kernels
from lowmem_drf.terminal import working
from lowmem_drf.texts import parse_json, read_text

if TYPE_CHECKING:
    from lowmem_drf.ops import RowChoice

KERNELS = "kernels.json"
"""Of a run's folder."""
KEPT = "kept attentions"
"""A setting that a choice depends on, beside those of ``kernels``."""


@dataclass(frozen=True)
class Chosen:
    """The chosen implementations."""

    rows: RowOps
    attention: Attention
    why: str
    """Reason for the attention, printed."""
    rollout_attention: Callable[[Tensor, Tensor, Tensor], Tensor] | None
    """Attention without gradients; ``None``: ``attention``."""
    graded_attention: Attention | None = None
    """Attention among the tokens with gradients, or recorded for them; ``None``: ``attention``."""
    ranged: bool = False
    """The critic's attention is our kernel."""
    integers: bool = False
    """Frozen layers multiply in 8 bit."""
    auto: str = ""
    """What became of ``LEVERS`` that are ``auto``, printed."""
    record: Mapping[str, Any] | None = None
    """For ``kernels.json``. ``None``: nothing was timed."""

    def __str__(self) -> str:
        int8 = ["without gradient"] if self.rollout_attention else []
        int8 += ["in the forward of graded steps"] if self.graded_attention else []
        more = f"; int8 attention {' and '.join(int8)}" if int8 else ""
        more += "; products of integers in frozen layers" if self.integers else ""
        more += f"; 8 bit on auto: {self.auto}" if self.auto else ""
        return f"kernels: {self.rows.name}; attention: {self.attention.name} ({self.why}){more}"


def choose(config: Config, work: Work, before: Mapping[str, Any] | None = None, ranks: Ranks = ALONE) -> Chosen:
    """For a run on ``work.device``.

    Args:
        before: in the first process the record of the run's first choice, which is taken again where card, versions
            and settings are the same.

    Raises BadInputError: a requested implementation cannot run here.
    """
    device = work.device
    require_kernels(config, device, work.shape[-1])
    if config.kernels.deterministic and device.type == "cuda":
        _same_bits()
        config = config.model_copy(update={"kernels": config.kernels.model_copy(update={"attention": "triton"})})
    auto = ""
    if on_auto(config) and (device.type != "cuda" or config.kernels.deterministic):
        card = "kernels.deterministic asks for the same bits, and another timing may decide otherwise"
        auto = f"not used: {'this is a CPU' if device.type != 'cuda' else card}"
        config = as_chosen(config, None)
    rows = choose_rows(config.kernels.ops, device)
    if device.type != "cuda":
        kernels, integers = config.kernels, config.model.products == "int8"
        name: AttentionName = "sdpa" if kernels.attention == "auto" else kernels.attention
        why = "the CPU's own" if kernels.attention == "auto" else "as asked"
        attention = attention_named(name)
        return Chosen(rows, attention, why, *_in_int8(kernels, attention, device), name == "triton", integers, auto)
    record, why = ranks.from_chief(_record(config, work, rows, before) if ranks.chief else ({}, ""))
    if not why_not("triton", device):
        tiles().take_choices(record["tiles"])
    attention, ranged = attention_named(record["attention"]), record["critic"] == "triton"
    if said := [f"{LEVERS[key]} {record['int8'][key]['why']}" for key in on_auto(config)]:
        auto = f"taken where it is {MARGIN:g} times as fast: {', '.join(said)}"
    config = as_chosen(config, record)
    int8, integers = _in_int8(config.kernels, attention, device), config.model.products == "int8"
    return Chosen(rows, attention, why, *int8, ranged, integers, auto, record)


def _in_int8(
    kernels: Kernels, attention: Attention, device: torch.device | None
) -> tuple[Callable[[Tensor, Tensor, Tensor], Tensor] | None, Attention | None]:
    """``rollout_attention`` and ``graded_attention`` of ``Chosen``."""
    rollout = int8_attention(device) if kernels.rollout_attention == "int8" else None
    return rollout, with_int8_forward(attention, device) if kernels.graded_attention == "int8" else None


def require_kernels(config: Config, device: torch.device, head_dim: int = 128) -> None:
    """Raises BadInputError if a requested implementation cannot run here. ``train`` asks before it downloads or reads
    anything; ``head_dim`` is that of all published models."""
    kernels = config.kernels
    name = kernels.attention
    if kernels.deterministic and device.type == "cuda":
        if name not in ("auto", "triton"):
            cure = "-s kernels.attention=triton, or -s kernels.deterministic=false"
            raise BadInputError(
                f"kernels.deterministic: gradients of kernels.attention={name} differ by rounding. Cure: {cure}"
            )
        name = "triton"
    choose_rows(kernels.ops, device)
    if kernels.rollout_attention == "int8":
        int8_attention(device)
    if kernels.graded_attention == "int8":
        int8_forward(device)
    if config.model.products == "int8":
        require_int8_products()
    if name == "auto":
        return
    on_card = device.type == "cuda"
    reason = refusal(name, device, DTYPES[config.dtype], head_dim) if on_card else why_not(name, device)
    if reason:
        raise BadInputError(f"kernels.attention = {name!r} cannot run: {reason}")


def _same_bits() -> None:
    """Makes PyTorch's operations and our kernels give the same bits every time, from now on in this process."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else PyTorch warns of every product
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings: Any = torch.utils.deterministic
    settings.fill_uninitialized_memory = False  # a pass over every new tensor, whose values nothing here reads


def choose_planned(config: Config, head_dim: int = 128) -> Chosen:
    """For a plan, which computes nothing: ``auto`` means a CUDA card with Triton, whatever this machine has, and 8 bit
    wherever it can run. All attentions need the same bytes (output, log-sum-exp, gradients), so two stand for all; in 8
    bit they need more."""
    answers = {key: {"taken": key in in_8_bit(config, head_dim)} for key in LEVERS}
    config = as_chosen(config, {"int8": answers})
    kernels, integers = config.kernels, config.model.products == "int8"
    rows: RowChoice = "fused" if kernels.ops == "auto" else kernels.ops
    attention = attention_named("triton" if kernels.attention == "triton" else "sdpa")
    int8, ranged = _in_int8(kernels, attention, None), attention.name == "triton"
    return Chosen(fused_ops() if rows == "fused" else naive_ops(), attention, "planned", *int8, ranged, integers)


def saved_choice(run: Path | None, say: Callable[[str], None]) -> Mapping[str, Any] | None:
    """The record in a run's folder. One that cannot be read is said, and replaced by a new one."""
    file = (run or Path()) / KERNELS
    if run is None or not file.is_file():
        return None
    try:
        record = parse_json(read_text(file, "a run's choice of kernels"))
        named = record["attention"] in NAMES and isinstance(record["about"], dict) and record["critic"]
        answers = record.get("int8", {})
        named = named and all(answer["taken"] in (True, False) and answer["why"] for answer in answers.values())
        words = [row[key] for row in record["tiles"] for key in ("kernel", "case", "tile")]
        sizes = [size for row in record["tiles"] for size in row["sizes"]]
        if named and all(isinstance(word, str) for word in words) and all(type(n) is int and n > 0 for n in sizes):
            return dict(record)
    except (BadInputError, AttributeError, KeyError, TypeError, ValueError):
        pass
    differ = "the last bits may differ, with 8 bit on auto more than those"
    say(f"{file} does not hold a choice of kernels: they are chosen anew, and {differ}")
    return None


def as_run(config: Config, run: Path) -> Config:
    """With what the run in this folder chose in the place of ``auto``."""
    return as_chosen(config, saved_choice(run, lambda _: None))


def record_text(record: Mapping[str, Any]) -> str:
    """A record as the text of ``kernels.json``, a line for each tile."""
    rows = ",\n".join(f"  {json.dumps(row)}" for row in record["tiles"])
    rest = json.dumps({key: value for key, value in record.items() if key != "tiles"}, indent=1)
    return f'{rest[:-2]},\n "tiles": [\n{rows}\n ]\n}}\n'


def _record(
    config: Config, work: Work, rows: RowOps, before: Mapping[str, Any] | None
) -> tuple[Mapping[str, Any], str]:
    """The record and, for printing, the reason for the attention."""
    now = _about(config, work.device)
    # a setting that the run's version did not have was at its default
    defaults = {f"kernels.{name}": value for name, value in Kernels().model_dump().items()}
    about: dict[str, Any] = {**defaults, **before["about"]} if before else {}
    auto, answers = on_auto(config), (before or {}).get("int8", {})
    changed = _changed(about, now) if before else ""
    changed = changed or "; ".join(f"{key} is auto" for key in auto if before and key not in answers)
    if before and not changed:
        return before, f"as {KERNELS} says"
    # the same machine answers once: settings that keep the gradient must not change it by another timing
    kept = {key: answers[key] for key in auto if key in answers and _machine(about) == _machine(now)}
    if config.kernels.attention not in ("auto", *BEHIND_INT8):
        kept.pop(GRADED, None)
    taken = {key: bool(answer["taken"]) for key, answer in kept.items()}
    config = decided(config, taken)
    record = {"about": now, **_timed(config, replace(work, config=config), rows)}
    if both := kept | record.get("int8", {}):
        record["int8"] = both
    turned = [key for key in both if key in answers and both[key]["taken"] != answers[key]["taken"]]
    if changed:
        changed = f"; chosen anew, {changed}"
    if turned:
        to = (f"{LEVERS[key]} {'from 16 bit to 8' if both[key]['taken'] else 'from 8 bit to 16'}" for key in turned)
        changed += f", so from here on gradients differ by more than rounding: {', '.join(to)}"
    return record, record["why"] + changed


def _machine(about: Mapping[str, Any]) -> dict[str, Any]:
    """Card and versions."""
    return {name: value for name, value in about.items() if not name.startswith("kernels.") and name != KEPT}


def _about(config: Config, device: torch.device) -> dict[str, str]:
    """What a choice depends on."""
    kernels, kept = config.kernels, config.memory.keep_attention != "none"
    packages = {"torch": str(torch.__version__)}
    for package in ("triton", "triton-windows", "xformers", "flash-attn"):
        try:
            packages[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    settings = {f"kernels.{name}": value for name, value in kernels.model_dump().items()}
    return {"card": torch.cuda.get_device_name(device), **packages, **settings, KEPT: str(kept)}


def _changed(before: Mapping[str, Any], now: Mapping[str, str]) -> str:
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return "; ".join(f"{name} was {before.get(name, 'absent')} and is {now.get(name, 'absent')}" for name in names[:2])


def _timed(config: Config, work: Work, rows: RowOps, seconds: Timer = card_seconds) -> dict[str, Any]:
    """The record of a new choice, without ``about``."""
    kernels, device, asked = config.kernels, work.device, config.kernels.attention
    forms = (kernels.rollout_attention, kernels.graded_attention)
    names: Sequence[AttentionName] = [asked] if asked == "triton" or "auto" in forms else []  # its tiles are timed
    if asked == "auto":
        possible = BEHIND_INT8 if kernels.graded_attention == "int8" else NAMES
        names = [name for name in possible if not why_not(name, device)]
    ours = not why_not("triton", device)
    found: dict[AttentionName, tuple[float, float]] = {}
    failed: dict[str, str] = {}
    forward: float | str = ""
    layers: list[float | str] = []
    if ours:
        tiles().take_choices([])
    with tiles().timing(seconds) if ours else nullcontext(), working("choosing kernels", len(names) + 1) as advance:
        for name in names:
            took = tried(partial(work.attention_seconds, attention_named(name), seconds))
            if isinstance(took, str):
                failed[name] = took
            else:
                found[name] = took
            advance(1)
        if "auto" in forms:
            forward = tried(partial(work.int8_seconds, seconds))
        if config.model.products == "auto":
            layers = [tried(partial(work.layers_seconds, int8, seconds)) for int8 in (True, False)]
        options = options_of(found, None if isinstance(forward, str) else MARGIN * forward, work.passes, forms)
        best = options[0] if options else Option("sdpa" if asked == "auto" else asked)
        attention, ranged = attention_named(best.name), "triton" in found
        rolled = int8_attention(device) if "int8" in forms else None
        for trial in work.trials(rows, attention, rolled, ranged):
            tried(trial)  # what fails takes its first tiles; a run that needs it says what is wrong
        advance(1)
    order = dict.fromkeys(option.name for option in options)
    times = [f"{name} {ms(*found[name])}" for name in order]
    why = f"the fastest here, forward + backward: {', '.join(times)}" if asked == "auto" else "as asked"
    if failed:
        why += f"; cannot: {', '.join(failed)}"
    record = {
        "attention": attention.name, "why": why, "failed": failed, "critic": "triton" if ranged else "sdpa",
        "tiles": tiles().choices() if ours else [],
    }  # fmt: skip
    answers = attention_answers(best, options, found, forward, work.passes[0]) | layers_answer(layers)
    answers = {key: answers[key] for key in on_auto(config)}
    return record | ({"int8": answers} if answers else {})
