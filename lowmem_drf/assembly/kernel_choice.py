"""Chooses the implementation of each operation, and the tiles of our kernels, once, at the start of a run.

On a card a choice is timed, so two of them may differ, and with them the last bits of a gradient. A run therefore keeps
its choice in ``kernels.json``: all its processes take that of the first, and a resumed run takes it again.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowmem_drf.assembly.text_cache import DTYPES
from lowmem_drf.assembly.trials import Work, card_seconds
from lowmem_drf.distributed.ranks import ALONE, Ranks
from lowmem_drf.errors import BadInputError
from lowmem_drf.models.wan.attention import (
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
from lowmem_drf.schema import Config, Kernels
from lowmem_drf.shortage import let_go
from lowmem_drf.terminal import working
from lowmem_drf.texts import one_line, parse_json, read_text

if TYPE_CHECKING:
    from lowmem_drf.ops import RowChoice

KERNELS = "kernels.json"
"""Of a run's folder."""


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
    """``model.products = "int8"``."""
    record: Mapping[str, Any] | None = None
    """For ``kernels.json``. ``None``: nothing was timed."""

    def __str__(self) -> str:
        int8 = ["without gradient"] if self.rollout_attention else []
        int8 += ["in the forward of graded steps"] if self.graded_attention else []
        more = f"; int8 attention {' and '.join(int8)}" if int8 else ""
        more += "; products of integers in frozen layers" if self.integers else ""
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
    kernels, integers = config.kernels, config.model.products == "int8"
    rows = choose_rows(kernels.ops, device)
    if device.type != "cuda":
        name: AttentionName = "sdpa" if kernels.attention == "auto" else kernels.attention
        why = "the CPU's own" if kernels.attention == "auto" else "as asked"
        attention = attention_named(name)
        return Chosen(rows, attention, why, *_in_int8(kernels, attention, device), name == "triton", integers)
    record, why = ranks.from_chief(_record(config, work, rows, before) if ranks.chief else ({}, ""))
    if not why_not("triton", device):
        tiles().take_choices(record["tiles"])
    attention, ranged = attention_named(record["attention"]), record["critic"] == "triton"
    return Chosen(rows, attention, why, *_in_int8(kernels, attention, device), ranged, integers, record)


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


def choose_planned(config: Config) -> Chosen:
    """For a plan, which computes nothing: ``auto`` means a CUDA card with Triton, whatever this machine has. All
    attentions need the same bytes (output, log-sum-exp, gradients), so two stand for all."""
    kernels = config.kernels
    rows: RowChoice = "fused" if kernels.ops == "auto" else kernels.ops
    attention = attention_named("triton" if kernels.attention == "triton" else "sdpa")
    int8, ranged = _in_int8(kernels, attention, None), attention.name == "triton"
    return Chosen(fused_ops() if rows == "fused" else naive_ops(), attention, "planned", *int8, ranged)


def saved_choice(run: Path | None, say: Callable[[str], None]) -> Mapping[str, Any] | None:
    """The record in a run's folder. One that cannot be read is said, and replaced by a new one."""
    file = (run or Path()) / KERNELS
    if run is None or not file.is_file():
        return None
    try:
        record = parse_json(read_text(file, "a run's choice of kernels"))
        named = record["attention"] in NAMES and isinstance(record["about"], dict) and record["critic"]
        words = [row[key] for row in record["tiles"] for key in ("kernel", "case", "tile")]
        sizes = [size for row in record["tiles"] for size in row["sizes"]]
        if named and all(isinstance(word, str) for word in words) and all(type(n) is int and n > 0 for n in sizes):
            return dict(record)
    except (BadInputError, KeyError, TypeError, ValueError):
        pass
    say(f"{file} does not hold a choice of kernels: they are chosen anew, and the last bits may differ")
    return None


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
    changed = _changed({**defaults, **before["about"]}, now) if before else ""
    if before and not changed:
        return before, f"as {KERNELS} says"
    record = {"about": now, **_timed(config, work, rows)}
    return record, record["why"] + (f"; chosen anew, {changed}" if changed else "")


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
    return {"card": torch.cuda.get_device_name(device), **packages, **settings, "kept attentions": str(kept)}


def _changed(before: Mapping[str, Any], now: Mapping[str, str]) -> str:
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return "; ".join(f"{name} was {before.get(name, 'absent')} and is {now.get(name, 'absent')}" for name in names[:2])


def _timed(config: Config, work: Work, rows: RowOps, seconds: Callable[..., float] = card_seconds) -> dict[str, Any]:
    """The record of a new choice, without ``about``."""
    kernels, device = config.kernels, work.device
    asked, graded_int8 = kernels.attention, kernels.graded_attention == "int8"
    int8 = int8_attention(device) if graded_int8 or kernels.rollout_attention == "int8" else None
    named = [asked] if asked == "triton" else []  # its tiles are timed
    names = (
        [name for name in (BEHIND_INT8 if graded_int8 else NAMES) if not why_not(name, device)]
        if asked == "auto"
        else named
    )
    ours = not why_not("triton", device)
    found: dict[AttentionName, tuple[float, float]] = {}
    failed: dict[str, str] = {}
    if ours:
        tiles().take_choices([])
    with tiles().timing(seconds) if ours else nullcontext(), working("choosing kernels", len(names) + 1) as advance:
        for name in names:
            try:
                found[name] = work.attention_seconds(attention_named(name), seconds)
            except Exception as error:  # what libraries raise has many types; an explicit one has been tried
                failed[name] = one_line(f"{type(error).__name__}: {error}")
                let_go(error)
            advance(1)
        forwards, backwards = work.passes
        order = sorted(found, key=lambda name: forwards * found[name][0] + backwards * found[name][1])
        attention = attention_named(order[0] if order else "sdpa" if asked == "auto" else asked)
        ranged = "triton" in found
        for trial in work.trials(rows, attention, int8, ranged):
            try:
                trial()
            except Exception as error:  # its kernels take their first tiles; a run that needs them says what is wrong
                let_go(error)
        advance(1)
    times = [f"{name} {1000 * found[name][0]:.1f} + {1000 * found[name][1]:.1f} ms" for name in order]
    why = f"the fastest here, forward + backward: {', '.join(times)}" if asked == "auto" else "as asked"
    if failed:
        why += f"; cannot: {', '.join(failed)}"
    return {
        "attention": attention.name, "why": why, "failed": failed, "critic": "triton" if ranged else "sdpa",
        "tiles": tiles().choices() if ours else [],
    }  # fmt: skip
