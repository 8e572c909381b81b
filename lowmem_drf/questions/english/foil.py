"""One question that contradicts the prompt: the wrong colour, direction, number, place or thing. Its answer is no."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from lowmem_drf.questions.english import nouns, wording
from lowmem_drf.questions.english.facts import Claim, Cue, Facts
from lowmem_drf.questions.english.lexicon import wordset

COLORS = {
    "red": "blue", "blue": "red", "green": "purple", "yellow": "blue", "orange": "blue", "purple": "green", "pink": "green",
    "brown": "blue", "black": "white", "white": "black", "gray": "red", "grey": "red", "golden": "blue", "gold": "blue",
    "silver": "red", "turquoise": "red", "teal": "red", "crimson": "blue", "scarlet": "blue", "blonde": "black", "ginger": "blue",
    "navy": "yellow",
}  # fmt: skip
"""Far enough that no light makes one look like the other."""
DIRECTIONS = {
    "left": "right", "right": "left", "up": "down", "down": "up", "in": "out", "out": "in", "forward": "backward",
    "backward": "forward", "forwards": "backwards", "upward": "downward", "downward": "upward",
}  # fmt: skip
OPPOSITES = {
    "young": "elderly", "elderly": "young", "huge": "tiny", "large": "tiny", "big": "tiny", "giant": "tiny", "massive": "tiny",
    "tiny": "huge", "small": "huge", "little": "huge", "tall": "short", "happy": "sad", "sad": "happy", "smiling": "crying",
    "wet": "dry", "empty": "full", "crowded": "empty", "wooden": "made of glass", "fluffy": "bald", "round": "square",
    "modern": "medieval", "old": "brand-new",
}  # fmt: skip
"""Attributes that cannot hold at once."""
RESTING = re.compile(
    r"sleep|asleep|lying|\bl(?:ie|ies|ay)\b|nap|rest|dream|doz|snooz|reclin|unconscious|bed|dead|relax|meditat"
)
INDOORS = wordset(
    """
    bakery ballroom bar bathroom bedroom cafe cinema classroom corridor diner factory gallery gym hallway hospital kitchen lab
    laboratory library museum nightclub office pub restaurant room shop stage store studio theater theatre warehouse
    """
)
ABSENT = ("elephant", "grand piano", "giraffe")


@dataclass(frozen=True, slots=True)
class Foil:
    texts: tuple[str, str]
    twin: str
    """The question that it contradicts, in its training wording."""


def foil(facts: Facts, speaker: wording.Speaker, asked: list[tuple[str, str, Claim | None]]) -> Foil | None:
    """asked: training wording, name and claim of the alignment questions. ``None`` if nothing can be contradicted
    safely."""
    said = set(re.findall(r"[a-z]+", facts.prompt.lower()))
    for text, _, claim in asked:
        other = COLORS.get(claim.words.lower(), "") if claim and claim.topic == "color" and claim.form == "be" else ""
        several = claim and sum(c.topic == "color" and c.subjects == claim.subjects for c in facts.attributes) > 1
        if (
            claim
            and other
            and other not in said
            and not several
            and not re.search(r"rainbow|colou?rful|multi-?colou?r|chang", facts.prompt.lower())
        ):
            return Foil(speaker.claim(replace(claim, words=other)), text)
    for text, _, claim in asked:
        other = (
            OPPOSITES.get(claim.words.lower(), "") if claim and claim.kind == "attribute" and claim.form == "be" else ""
        )
        if claim and other and not set(other.split()) & said and facts.subjects[claim.subjects[0]].ask:
            return Foil(speaker.claim(replace(claim, words=other)), text)
    for cue in facts.camera:
        word = cue.words.split()[1] if len(cue.words.split()) > 1 else ""
        if (
            cue.subject == "the camera"
            and word in DIRECTIONS
            and len(facts.camera) == 1
            and DIRECTIONS[word] not in said
        ):
            return _cue(cue, f"{cue.words.split()[0]} {DIRECTIONS[word]}", asked)
    for i, entity in enumerate(facts.subjects):
        wrong = (entity.count or 0) + 2
        text = speaker.count(i)[0] if entity.count and entity.ask else ""
        if (
            entity.plural
            and entity.count
            and entity.count < 6
            and entity.label == ""
            and any(text == a for a, _, _ in asked)
        ):
            return Foil(speaker.count(i, wrong), text)
    for text, name, claim in asked:
        if (
            claim
            and name == "action"
            and claim.topic != "manner"
            and len(claim.subjects) == 1
            and facts.subjects[claim.subjects[0]].animate
            and not RESTING.search(facts.prompt.lower())
        ):
            return Foil(speaker.claim(replace(claim, words="sleeping" if claim.form == "be" else "sleep")), text)
    for cue in facts.places:
        indoors = bool(set(cue.words.split()) & INDOORS)
        if (
            cue.words.startswith("take place")
            and set(cue.words.lower().split()) & nouns.PLACES
            and not said & {"beach", "sea", "ocean", "kitchen", "home", "house", "restaurant"}
        ):
            return _cue(cue, "take place on a beach" if indoors else "take place in a kitchen", asked)
    for i in range(len(facts.subjects)):
        twin = speaker.existence(i)[0] if facts.subjects[i].ask else ""
        absent = next((thing for thing in ABSENT if not set(thing.split()) & said), None)
        if absent and any(twin == text for text, _, _ in asked) and not said & {"zoo", "animals", "circus", "safari"}:
            noun = f"{wording.article(absent)} {absent}"
            return Foil((f"Is there {noun} in the video?", f"Can you see {noun} in this clip?"), twin)
    return None


def _cue(cue: Cue, words: str, asked: list[tuple[str, str, Claim | None]]) -> Foil | None:
    twin = wording.cue(cue)[0]
    return Foil(wording.cue(replace(cue, words=words)), twin) if any(twin == text for text, _, _ in asked) else None
