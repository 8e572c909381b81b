"""Settings of 8 bit that may be ``auto``: a card takes 8 bit only where it has shown at the start of the run that this
is faster, and by a clear margin. Here is what the choice depends on and what is said of it; ``kernel_choice`` makes it.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from lowmem_drf.assembly.conditions import DTYPES
from lowmem_drf.assembly.rungs import value_of
from lowmem_drf.models.attention import BEHIND_INT8
from lowmem_drf.ops import AttentionName, why_no_int8
from lowmem_drf.schema import Config

ROLLOUT, GRADED, PRODUCTS = "kernels.rollout_attention", "kernels.graded_attention", "model.products"
LEVERS = {
    ROLLOUT: "attention without gradient",
    GRADED: "attention of graded steps",
    PRODUCTS: "products of frozen layers",
}
"""Settings of 8 bit that may be ``auto``, with what of a run they are about."""
MARGIN = 1.1
"""8 bit changes rollout and gradient by more than rounding: ``auto`` takes it only if it is so many times as fast."""


def on_auto(config: Config) -> list[str]:
    """Those of ``LEVERS``."""
    return [key for key in LEVERS if value_of(config, key) == "auto"]


def as_chosen(config: Config, record: Mapping[str, Any] | None) -> Config:
    """With what a run's record says in the place of ``auto`` in ``LEVERS``; exact where it says nothing."""
    answers = (record or {}).get("int8", {})
    return decided(config, {key: key in answers and answers[key]["taken"] for key in on_auto(config)})


def decided(config: Config, taken: Mapping[str, bool]) -> Config:
    """With these of ``LEVERS`` on or off. Weights stay as they are stored."""
    attentions = {
        key.removeprefix("kernels."): "int8" if on else "same" for key, on in taken.items() if key != PRODUCTS
    }
    parts: dict[str, Any] = {"kernels": config.kernels.model_copy(update=attentions)}
    if (on := taken.get(PRODUCTS)) is not None:
        products = {"products": "int8" if on else "16bit", "quant": config.model.storage}
        parts["model"] = config.model.model_copy(update=products)
    return config.model_copy(update=parts)


def in_8_bit(config: Config, head_dim: int) -> list[str]:
    """``LEVERS`` on ``auto`` that a card may decide to take. Imports Triton if an attention is."""

    def can(key: str) -> bool:
        if key == PRODUCTS:
            return config.model.storage == "int8"
        refused = key == GRADED and config.kernels.attention == "xformers"
        return not refused and not why_no_int8(DTYPES[config.dtype], head_dim)

    return [] if config.kernels.deterministic else [key for key in on_auto(config) if can(key)]


@dataclass(frozen=True)
class Option:
    """A back end for the attention, and whether it gives way to 8 bit in the rollout and in the forward of graded
    steps."""

    name: AttentionName
    rollout: bool = False
    graded: bool = False


def options_of(
    found: Mapping[AttentionName, tuple[float, float]],
    int8: float | None,
    passes: tuple[int, int, int],
    forms: tuple[str, str],
) -> list[Option]:
    """All that the settings allow, by the seconds of an update, the fastest first; among equals that of fewer 8 bits.

    Args:
        found: seconds of forward and backward.
        int8: what a forward in 8 bit counts. ``None``: it cannot run, or is not timed because no setting is ``auto``.
        passes: see ``Work.passes``.
        forms: ``kernels.rollout_attention`` and ``kernels.graded_attention``.
    """

    def cost(option: Option) -> tuple[float, int]:
        forward, backward = found[option.name]
        forwards = [int8 or 0.0 if on else forward for on in (option.rollout, option.graded)]
        return sum(map(operator.mul, passes, [*forwards, backward])), option.rollout + option.graded

    auto = (False,) if int8 is None else (False, True)
    rollout, graded = ({"same": (False,), "int8": (True,), "auto": auto}[form] for form in forms)
    options = (Option(*sides) for sides in product(found, rollout, graded))
    return sorted((one for one in options if not one.graded or one.name in BEHIND_INT8), key=cost)


def attention_answers(
    best: Option, options: Sequence[Option], found: Mapping[AttentionName, tuple[float, float]], int8: float | str,
    rollout: int,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Of both attentions. ``rollout``: forwards that ``rollout_attention`` is for."""
    if isinstance(int8, str) or not found:
        no = _refused(int8 if isinstance(int8, str) else "no other attention could be timed")
        return {ROLLOUT: no, GRADED: no}
    forwards = [ms(int8), ms(found[best.name][0])] if best.rollout else [ms(found[best.name][0]), ms(int8)]
    rolled = _answer(best.rollout, *forwards) if rollout else _refused("no pass of an update would take it")

    def took(option: Option) -> str:
        forward, backward = found[option.name]
        return f"{ms(int8 if option.graded else forward, backward)} with {option.name}"

    other = next((option for option in options if option.graded != best.graded), None)
    if other is None:
        return {ROLLOUT: rolled, GRADED: _refused(f"the backward of {best.name} cannot follow it")}
    return {ROLLOUT: rolled, GRADED: _answer(best.graded, took(best), took(other))}


def layers_answer(layers: Sequence[float | str]) -> dict[str, dict[str, Any]]:
    """``layers``: what those of a block take in 8 and in 16 bit."""
    reasons = [took for took in layers if isinstance(took, str)]
    times = [took for took in layers if not isinstance(took, str)]
    if reasons or not times:
        return {PRODUCTS: _refused("".join(reasons[:1]))}
    taken = MARGIN * times[0] <= times[1]
    mine, other = times if taken else times[::-1]
    return {PRODUCTS: _answer(taken, f"{ms(mine)} for a block in an update", ms(other))}


def _answer(taken: bool, took: str, other: str) -> dict[str, Any]:
    mine, others = (8, 16) if taken else (16, 8)
    return {"taken": taken, "why": f"in {mine} bit ({took}; {others} bit: {other})"}


def _refused(reason: str) -> dict[str, Any]:
    return {"taken": False, "why": f"in 16 bit (not in 8: {reason})"}


def ms(*seconds: float) -> str:
    return f"{' + '.join(f'{1000 * one:.1f}' for one in seconds)} ms"
