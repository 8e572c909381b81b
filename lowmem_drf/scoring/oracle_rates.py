"""Rates of ToyWorld's oracle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from lowmem_drf.models.weights.sources import TOYWORLD
from lowmem_drf.schema import Config

if TYPE_CHECKING:
    from torch import Tensor

RATES = ("color", "shape", "direction", "physics", "quality", "all")


def oracle_for(config: Config, texts: Sequence[str]) -> Callable[[Tensor, Sequence[str]], Mapping[str, float]] | None:
    """``oracle_rates``, or ``None`` for another model or size, a single frame, or a prompt outside ToyWorld's
    grammar."""
    video = config.video
    if config.model.id != TOYWORLD or not video.width == video.height == 32 or video.frames == 1:
        return None
    from lowmem_drf.toy.captions import parse

    return oracle_rates if all(parse(text) is not None for text in texts) else None


def oracle_rates(frames_BTCHW: Tensor, texts: Sequence[str]) -> dict[str, float]:
    """Share of correct clips by property; ``all`` means color, shape and direction."""
    from lowmem_drf.toy.oracle import judge_clips

    verdicts = judge_clips(frames_BTCHW, list(texts))
    return {name: sum(getattr(verdict, name) for verdict in verdicts) / len(verdicts) for name in RATES}
