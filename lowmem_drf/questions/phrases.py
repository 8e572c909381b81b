"""Questions from a prompt in any language, without a model: its own clauses in the form of VQAScore (arXiv 2404.01291).

Counts, colors, camera and style stand in the clauses; nothing has to be recognised. Questions whose right answer is
"no" quote other prompts. What is asked of every clip besides is in ``fixed``.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from lowmem_drf.questions import fixed
from lowmem_drf.questions.clauses import LONGEST, NEGATION, UNSPACED, Clauses, cut, shorten, size
from lowmem_drf.types import Question

MOST = 20
"""Questions about clauses. Where a prompt has more of them, neighbours share one: the packed pass grows with them."""
FOILS = 2
"""Questions about what the prompt does not say, half a weight each."""
MOST_DENSE = 8
"""Clauses that an explanation is asked about."""
NEUTRAL = (
    "a walrus plays the trumpet on an escalator",
    "two giraffes ride a rollercoaster",
    "a submarine is parked inside a library",
    "an ostrich delivers newspapers by bicycle",
    "three penguins assemble a refrigerator",
    "a medieval catapult hurls a piano",
)
"""Foils where the other prompts give none: so odd that no translation of them is likely to be in a prompt either."""
_CLAUSE = 'Does this video show "{}"?', 'Can you see "{}" in this clip?'
"""How a clause is asked for: in training, and held out for evaluation."""
_WHOLE = 'Does this video show "{}"?', 'Is this a clip of "{}"?'
_NOTHING = "Does the video show a recognizable scene?", "Can you tell what this clip shows?"


def _wordset(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SMALL_WORDS = {
    "en": _wordset("the and with for from into that this there are was his her its while then who"),
    "de": _wordset("der die das den dem des ein eine einen einem einer und mit von auf ist sind im am zum zur ihr"),
    "fr": _wordset("le la les des une un et dans sur avec sous par est au aux du qui son sa ses"),
    "es": _wordset("el la los las una un y en con por del al sobre bajo su sus que es"),
    "it": _wordset("il lo gli una un e di con nel nella sul sulla che è del della"),
    "pt": _wordset("os as uma um e com no na nos nas do da em que seu sua ao"),
}
"""They tell the language, and no content word is among them."""
_SMALL = frozenset().union(*_SMALL_WORDS.values())
_FILM = _wordset("came shot ligh lens focu cine film styl view qual moti slow colo soft macr wide clos dept fiel phot")
"""Stems of words that may be true of any clip."""


@dataclass(frozen=True, slots=True)
class Foil:
    """A clause that another prompt's clip may be asked for, wanted "no"."""

    text: str
    language: str
    words: frozenset[str]


def foils(prompts: Iterable[str]) -> tuple[Foil, ...]:
    """Of each prompt of a set its first clause, if that says enough to be false of another prompt's clip."""
    made = []
    for prompt in prompts:
        for text in cut(prompt).clauses[:1]:
            words = content(text)
            telling = sum(0.5 if re.match(f"[{UNSPACED}]", word) else 1 for word in words - _FILM)
            if telling >= 3 and not NEGATION.search(text) and size(text) <= LONGEST:
                made.append(Foil(text, language(prompt), words))
    return tuple(made)


def content(text: str) -> frozenset[str]:
    """What texts about the same share: the first four letters of words, pairs of characters where no spaces are."""
    low = text.casefold()
    words = {word[:4] for word in re.findall(rf"[^\W_{UNSPACED}]{{3,}}", low) if word not in _SMALL}
    runs = re.findall(f"[{UNSPACED}]+", low)
    pairs = {run[i : i + 2] for run in runs for i in range(max(len(run) - 1, 1))}
    return frozenset(words | pairs)


def language(text: str) -> str:
    """As far as foils need it: a clause in another language may say the same without sharing a word."""
    scripts = {"ja": "\u3040-\u30ff", "ko": "\uac00-\ud7af", "th": "\u0e00-\u0eff", "zh": "\u3400-\u9fff", "ru": "а-я"}
    for name, characters in scripts.items():
        if re.search(f"[{characters}]", text):
            return name
    words = re.findall(r"\w+", text.casefold())
    hits = {name: sum(word in small for word in words) for name, small in _SMALL_WORDS.items()}
    return max(hits, key=lambda name: hits[name]) if any(hits.values()) else "en"


def questions(prompt: str, mode: str, others: Sequence[Foil] = ()) -> tuple[Question, ...]:
    """The questions of a prompt in a mode of ``make_questions``. ``others``: ``foils`` of the set that it is from."""
    text, heldout = cut(prompt), mode == "heldout"
    if mode == "vanilla":
        return (_yesno(_WHOLE[0].format(text.whole) if text.whole else _NOTHING[0], "global"),)
    checks = fixed.checks(prompt)
    made: list[Question] = []
    if mode in {"yesno", "both", "heldout"}:
        made += _about_prompt(text, heldout)
        made += [_yesno(_CLAUSE[heldout].format(foil), "foil", "no", 0.5) for foil in _chosen(prompt, others)]
        made += fixed.yesno(checks, heldout)
    if mode in {"dense", "both"}:
        made += [*_dense(text), *fixed.dense(checks)]
    return tuple(made)


def _yesno(text: str, name: str, answer: str = "yes", weight: float = 1.0) -> Question:
    return Question("TA", text + fixed.ANSWER, answer, weight=weight, name=name)


def _about_prompt(text: Clauses, heldout: bool) -> list[Question]:
    count = len(text.clauses)
    shares = min(count, MOST) if count > 1 else 0
    asked = [", ".join(text.clauses[i * count // shares : (i + 1) * count // shares]) for i in range(shares)]
    whole = _WHOLE[heldout].format(text.short) if text.short else _NOTHING[heldout]
    clauses = {_CLAUSE[heldout].format(clause): "clause" for clause in asked}
    return [_yesno(question, name) for question, name in {**clauses, whole: "whole"}.items()]


def _chosen(prompt: str, others: Sequence[Foil]) -> list[str]:
    """Always the same ones; which, depends on the prompt, so that a set's foils are spread over it."""
    words, spoken, start = content(prompt), language(prompt), zlib.crc32(prompt.encode())
    neutral = [Foil(text, spoken, content(text)) for text in NEUTRAL]
    chosen: list[str] = []
    for pool in (others, neutral):
        for i in range(len(pool)):
            foil = pool[(start + i) % len(pool)]
            if len(chosen) == FOILS:
                break
            if foil.language == spoken and foil.words.isdisjoint(words) and foil.text not in chosen:
                chosen.append(foil.text)
    return chosen


def _dense(text: Clauses) -> list[Question]:
    """The whole is asked for, then clause after clause: what else than the one before is there?"""
    whole = _sentence(text.short or "the video shows a recognizable scene")
    made = [Question("TA", "Describe what happens in this video in one sentence.", whole, "dense", name="whole")]
    shown = [clause for clause in text.clauses if not NEGATION.search(clause)][:MOST_DENSE]
    for before, clause in pairwise(shown):
        query = f'Besides "{before}", what does this video show? Answer in one short sentence.'
        made.append(Question("TA", query, _sentence(shorten(clause)), "dense", name="clause"))
    return made


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("。" if re.search(f"[{UNSPACED}]$", text) else ".")
