"""Template questions for ToyWorld's grammar: a caption is taken apart and every part is asked for, besides fixed questions for
physical fidelity and visual quality. Each question has two wordings: DRF trains on the first, evaluation asks the second.
"""

from __future__ import annotations

import re

from lowmem_drf.types import Question

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": ("circle", "square", "triangle"),
    "color": ("red", "green", "blue", "yellow", "purple", "cyan"),
    "direction": ("left", "right", "up", "down", "still"),
    "background": ("black", "gray", "white"),
}

ALIGNMENT: dict[str, tuple[str, str]] = {
    "color": ("is the shape {value} ?", "do you see a {value} thing ?"),
    "shape": ("is it a {value} ?", "does the clip show a {value} ?"),
    "direction": ("does it move {value} ?", "is the motion {value} ?"),
    "background": ("is the background {value} ?", "is it on {value} ?"),
}
"""Name -> the training wording and the held-out wording. The answer wanted is yes."""

PHYSICS: dict[str, tuple[str, str]] = {
    "jump": ("does it jump ?", "does its place change at once ?"),
    "jitter": ("does it shake ?", "is the motion shaky ?"),
    "vanish": ("does it vanish ?", "is it gone in a frame ?"),
    "morph": ("does its form change ?", "does it become another form ?"),
    "pulse": ("does its size change ?", "does it grow or shrink ?"),
    "recolor": ("does its color change ?", "does it become another color ?"),
}
"""Name of the defect -> its two wordings. The answer wanted is no."""

QUALITY: dict[str, tuple[str, str]] = {
    "noise": ("is the clip noisy ?", "is there noise ?"),
    "blur": ("is the clip blurry ?", "are the edges soft ?"),
    "flicker": ("does the light flicker ?", "does the brightness change ?"),
}
"""Name of the defect -> its two wordings. The answer wanted is no."""

GLOBAL = ("does the clip show {caption} ?", "is this {caption} ?")
"""Vanilla-DRF's single question."""


def attributes(text: str) -> dict[str, str] | None:
    """``"a red circle moves left on a gray background"`` -> ``{"shape": "circle", "color": "red", …}``.

    ``None`` unless the text names exactly one value of each attribute.
    """
    words = set(re.findall(r"[a-z]+", text.lower().replace("grey", "gray")))
    found = {name: [v for v in values if v in words] for name, values in ATTRIBUTES.items()}
    return {name: values[0] for name, values in found.items()} if all(len(v) == 1 for v in found.values()) else None


def structured(values: dict[str, str], wording: int = 0) -> tuple[Question, ...]:
    """The thirteen questions of a caption: four of alignment, six of physics, three of quality."""
    alignment = [Question("TA", ALIGNMENT[name][wording].format(value=values[name]), "yes", name=name) for name in ALIGNMENT]
    physics = [Question("Phy", words[wording], "no", name=name) for name, words in PHYSICS.items()]
    quality = [Question("VQ", words[wording], "no", name=name) for name, words in QUALITY.items()]
    return (*alignment, *physics, *quality)


def vanilla(caption: str, wording: int = 0) -> tuple[Question, ...]:
    """One global yes/no question: the baseline that collapses."""
    return (Question("TA", GLOBAL[wording].format(caption=caption), "yes", name="global"),)
