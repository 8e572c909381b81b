"""What ToyWorld's oracle says of clips: rates of what is right, and how far the rest has drifted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

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
    clips = oracle_by_clip(frames_BTCHW, texts)
    return {name: sum(clip[name] for clip in clips) / len(clips) for name in RATES}


def oracle_by_clip(frames_BTCHW: Tensor, texts: Sequence[str]) -> list[dict[str, float]]:
    """``oracle_rates`` of each clip: 1 or 0."""
    from lowmem_drf.toy.oracle import judge_clips

    return [{name: float(getattr(v, name)) for name in RATES} for v in judge_clips(frames_BTCHW, list(texts))]


class Drift:
    """Collects the looks of clips, batch by batch; ``result`` compares them with ToyWorld's scenes."""

    def __init__(self) -> None:
        self.rows: list[tuple[Any, str]] = []
        """Of each clip: its looks as floats, and its prompt."""

    def add(self, frames_BTCHW: Tensor, texts: Sequence[str]) -> None:
        from lowmem_drf.toy.oracle import measure

        looks = measure(frames_BTCHW).looks
        self.rows += zip(zip(*(values.tolist() for values in looks), strict=True), texts, strict=True)

    @staticmethod
    def result(parts: Iterable[Drift]) -> dict[str, float]:
        """``drift.drift`` of all parts together, and the mean ``radius``, its spread, and the mean ``edge``, in
        pixels. Empty if no clip shows a shape."""
        import torch

        from lowmem_drf.toy.captions import parse
        from lowmem_drf.toy.drift import drift, reference
        from lowmem_drf.toy.oracle import Looks

        rows = [row for part in parts for row in part.rows]
        looks = Looks(*torch.tensor([values for values, _ in rows]).unbind(-1))
        combos = [combo for _, text in rows if (combo := parse(text))]
        shown = looks.size > 0
        if not shown.any():
            return {}
        size, edge = looks.size[shown], looks.edge[shown]
        plain = {
            "radius": size.mean().item(),
            "radius_spread": size.std(correction=0).item(),
            "edge_px": edge.mean().item(),
        }
        return {**drift(looks, reference(combos)), **plain}
