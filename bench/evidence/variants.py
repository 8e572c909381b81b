"""What the study trains: a line each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """A training that is measured on its way."""

    preset: str
    overrides: tuple[str, ...] = ()
    updates: int = 400


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
    "fast": Variant("toy-fast"),
}
"""A new idea is a line."""
