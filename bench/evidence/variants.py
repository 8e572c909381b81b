"""What the study trains: a line each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """A training that is measured on its way."""

    preset: str
    overrides: tuple[str, ...] = ()
    updates: int = 400
    method: str = "drf"
    """See ``baselines.py``."""
    levers: tuple[str, ...] = ()
    """See ``levers.py``."""


def _screen(**settings: str) -> dict[str, Variant]:
    """Name -> changes to ``toy``, 400 updates."""
    return {name: Variant("toy", tuple(change.split())) for name, change in settings.items()}


VARIANTS: dict[str, Variant] = {
    **_screen(
        default="",
        anchor1="optim.anchor=1",
        hinge="critic.hinge=-0.05",
        decay="optim.weight_decay=0.5",
        rank4="lora.rank=4 lora.alpha=4",
        slow="optim.lr=3e-4",
        **{f"anchor{weight}".replace(".", ""): f"optim.anchor={weight}" for weight in (0.1, 0.3, 3, 10)},
    ),
    **{name: Variant("toy", levers=(name,)) for name in ("ema", "dropout", "aspects")},
    "fast": Variant("toy-fast"),
    "vanilla": Variant("toy", ("critic.mode=vanilla",)),
    "yesno": Variant("toy", ("critic.mode=yesno",)),
    "ta_only": Variant("toy", ("critic.weights.Phy=0", "critic.weights.VQ=0")),
    "draft_1": Variant("toy", ("sampler.graded_steps=1",)),
    "draft_lv": Variant("toy", ("sampler.graded=last", "sampler.graded_steps=1", "sampler.lv_samples=2")),
    "drtune": Variant("toy", ("sampler.graded=random", "sampler.graded_steps=3", "sampler.chain=drtune")),
    "refl": Variant("toy", method="refl"),
    "best_of_n": Variant("toy", method="best_of_n"),
    "awm": Variant("toy", method="awm"),
}
"""A new idea is a line."""
