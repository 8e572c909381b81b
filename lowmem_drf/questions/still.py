"""Questions about an image, a clip of one frame: none is about motion or change, and they say image for video."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from lowmem_drf.types import Question

OVER_TIME = frozenset({"smooth", "appear", "shape", "constant", "forward", "flicker", "ghosting"})
"""Properties of ``fixed`` that one frame cannot have."""
TOYWORLDS = frozenset(
    {"direction", "direction_word", "motion", "jump", "jitter", "vanish", "morph", "pulse", "recolor", "flicker"}
)
"""Names of ToyWorld's questions that one frame cannot answer."""
_WORDS = re.compile(r'".*"|\b([Aa]) (?:video|clip)\b|\bthe motion in (?=this)|\b(?:video|clip)\b')


def of_image(text: str) -> str:
    """The same about an image. What stands in quotation marks stays as it is."""

    def said(found: re.Match[str]) -> str:
        if found[1]:
            return f"{found[1]}n image"
        return {"video": "image", "clip": "image", "the motion in ": ""}.get(found[0], found[0])

    return _WORDS.sub(said, text)


def about_image(questions: Iterable[Question]) -> tuple[Question, ...]:
    """The same questions, asked of an image."""
    return tuple(replace(question, text=of_image(question.text)) for question in questions)
