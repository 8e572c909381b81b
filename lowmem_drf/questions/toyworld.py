"""Template questions for ToyWorld's grammar: one for each attribute in the caption, and fixed questions about physics
and quality. The fixed ones are asked both ways, so that a bias towards yes or no cancels. Each question has two
wordings: DRF trains on the first, evaluation asks the second. Dense questions ask for a word, a description or an
explanation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from lowmem_drf.types import Aspect, Question

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
"""Attribute -> (training wording, held-out wording). The wanted answer is yes."""

PHYSICS: dict[str, tuple[str, str]] = {
    "jump": ("does it jump ?", "does its place change at once ?"),
    "jitter": ("does it shake ?", "is the motion shaky ?"),
    "vanish": ("does it vanish ?", "is it gone in a frame ?"),
    "morph": ("does its form change ?", "does it become another form ?"),
    "pulse": ("does its size change ?", "does it grow or shrink ?"),
    "recolor": ("does its color change ?", "does it become another color ?"),
}
"""Defect -> (training wording, held-out wording). The wanted answer is no."""

QUALITY: dict[str, tuple[str, str]] = {
    "noise": ("is the clip noisy ?", "is there noise ?"),
    "blur": ("is the clip blurry ?", "are the edges soft ?"),
    "flicker": ("does the light flicker ?", "does the brightness change ?"),
}
"""Defect -> (training wording, held-out wording). The wanted answer is no."""

SOUND: dict[str, tuple[str, str]] = {
    "jump": ("is it free of jumps ?", "does it move without a jump ?"),
    "jitter": ("is its motion steady ?", "does it move without shaking ?"),
    "vanish": ("is it there in all frames ?", "does it stay in the clip ?"),
    "morph": ("does it keep its form ?", "does its form stay the same ?"),
    "pulse": ("does it keep its size ?", "does its size stay the same ?"),
    "recolor": ("does it keep its color ?", "does its color stay the same ?"),
    "noise": ("is the clip clean ?", "is the clip free of noise ?"),
    "blur": ("is the clip sharp ?", "are the edges sharp ?"),
    "flicker": ("is the light steady ?", "does the brightness stay the same ?"),
}
"""Defect -> two wordings that ask if the clip is free of it. The wanted answer is yes."""

GLOBAL = ("does the clip show {caption} ?", "is this {caption} ?")
"""Vanilla-DRF's single question."""

OPEN: dict[str, str] = {
    "color": "what color is it ?",
    "shape": "what form is it ?",
    "direction": "where does it move ?",
    "background": "what is the background ?",
}
"""Attribute -> free-form question. The answer is the attribute's word."""

DESCRIBE = "describe the clip ."
EXPLAIN_MOTION = "explain the motion ."
EXPLAIN_PICTURE = "explain the picture ."

EXPLANATIONS: dict[str, str] = {
    "jump": "it jumps",
    "jitter": "it shakes",
    "vanish": "it vanishes",
    "morph": "it changes form",
    "pulse": "it changes size",
    "recolor": "it changes color",
    "noise": "it is noisy",
    "blur": "it is blurry",
    "flicker": "it is flickering",
}
"""Defect -> explanation of a clip with it: the words for a clean clip, up to the word that differs."""

SOUND_PICTURE = "it is clean and sharp and the light is steady"


def sound_motion(direction: str) -> str:
    """The explanation of a motion without defects."""
    return f"it {'stays still' if direction == 'still' else f'moves {direction}'} and keeps its form , size and color"


def describe(values: Mapping[str, str]) -> str:
    """The simplest caption with these attributes."""
    moves = "stays still" if values["direction"] == "still" else f"moves {values['direction']}"
    return f"a {values['color']} {values['shape']} {moves} on a {values['background']} background"


def attributes(text: str) -> dict[str, str] | None:
    """``"a red circle moves left on a gray background"`` -> ``{"shape": "circle", "color": "red", …}``.

    ``None`` unless the text is in ToyWorld's words and names exactly one value of each attribute.
    """
    words = set(re.findall(r"[a-z]+", text.lower().replace("grey", "gray")))
    found = {name: [v for v in values if v in words] for name, values in ATTRIBUTES.items()}
    return {name: values[0] for name, values in found.items()} if all(len(v) == 1 for v in found.values()) else None


def yesno(values: Mapping[str, str], wording: int = 0) -> tuple[Question, ...]:
    """The 22 questions of a caption: four about alignment, and two about each of nine defects (present? absent?)."""
    texts = {name: wordings[wording].format(value=values[name]) for name, wordings in ALIGNMENT.items()}
    alignment = [Question("TA", text, "yes", name=name) for name, text in texts.items()]
    return (*alignment, *(question for name in (*PHYSICS, *QUALITY) for question in _both_ways(name, wording)))


def fixed_texts() -> frozenset[str]:
    """The questions about physics and quality, in both wordings."""
    pairs = (*PHYSICS.values(), *QUALITY.values(), *SOUND.values())
    return frozenset((*(text for pair in pairs for text in pair), EXPLAIN_MOTION, EXPLAIN_PICTURE))


def _both_ways(name: str, wording: int) -> tuple[Question, Question]:
    aspect: Aspect = "Phy" if name in PHYSICS else "VQ"
    there = Question(aspect, (PHYSICS | QUALITY)[name][wording], "no", weight=0.5, name=name)
    return there, Question(aspect, SOUND[name][wording], "yes", weight=0.5, name=name)


def dense(values: Mapping[str, str]) -> tuple[Question, ...]:
    """The seven dense questions of a caption, with reference answers from the caption."""
    words = [Question("TA", text, values[name], kind="dense", name=f"{name}_word") for name, text in OPEN.items()]
    return (
        *words,
        Question("TA", DESCRIBE, describe(values), kind="dense", name="description"),
        Question("Phy", EXPLAIN_MOTION, sound_motion(values["direction"]), kind="dense", name="motion"),
        Question("VQ", EXPLAIN_PICTURE, SOUND_PICTURE, kind="dense", name="picture"),
    )


def vanilla(caption: str, wording: int = 0) -> tuple[Question, ...]:
    """One global yes/no question: the paper's baseline."""
    words = " ".join(caption.lower().replace("grey", "gray").replace(",", " ,").split())
    return (Question("TA", GLOBAL[wording].format(caption=words), "yes", name="global"),)
