"""Questions from a prompt in any language, without a model: its clauses in the form of VQAScore (arXiv 2404.01291).

The clauses contain counts, colors, camera and style, so nothing has to be recognised. Questions with the right answer
"no" quote other prompts. ``fixed`` has the questions about every clip.
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
"""Maximum of questions about clauses, since each makes the packed pass longer. If there are more clauses, neighbours
share a question."""
FOILS = 2
"""Number of questions about things that are not in the prompt, of half weight each."""
MOST_DENSE = 8
"""Maximum of clauses with a dense question."""
NEUTRAL = (
    "a walrus plays the trumpet on an escalator",
    "two giraffes ride a rollercoaster",
    "a submarine is parked inside a library",
    "an ostrich delivers newspapers by bicycle",
    "three penguins assemble a refrigerator",
    "a medieval catapult hurls a piano",
)
"""Foils if the other prompts give none: so odd that a prompt in any language is unlikely to contain one."""
_CLAUSE = 'Does this video show "{}"?', 'Can you see "{}" in this clip?'
"""Question about a clause: the training wording, and the held-out one for evaluation."""
_WHOLE = 'Does this video show "{}"?', 'Is this a clip of "{}"?'
WORDINGS = (*_CLAUSE, *_WHOLE)
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
"""Function words by language: they identify it, and are ignored as content."""
_SMALL = frozenset().union(*_SMALL_WORDS.values())
_FILM = _wordset("came shot ligh lens focu cine film styl view qual moti slow colo soft macr wide clos dept fiel phot")
"""First letters of words that may be true of any clip."""


@dataclass(frozen=True, slots=True)
class Foil:
    """A clause for questions about other prompts' clips, with the wanted answer "no"."""

    text: str
    language: str
    words: frozenset[str]


def foils(prompts: Iterable[str]) -> tuple[Foil, ...]:
    """The first clause of each prompt, if it is specific enough to be false of another prompt's clip."""
    made = []
    for prompt in prompts:
        for text in cut(prompt).clauses[:1]:
            words = content(text)
            telling = sum(0.5 if re.match(f"[{UNSPACED}]", word) else 1 for word in words - _FILM)
            if telling >= 3 and not NEGATION.search(text) and size(text) <= LONGEST:
                made.append(Foil(text, language(prompt), words))
    return tuple(made)


def content(text: str) -> frozenset[str]:
    """Keys that texts about the same thing share: the first four letters of words; character pairs without spaces."""
    low = text.casefold()
    words = {word[:4] for word in re.findall(rf"[^\W_{UNSPACED}]{{3,}}", low) if word not in _SMALL}
    runs = re.findall(f"[{UNSPACED}]+", low)
    pairs = {run[i : i + 2] for run in runs for i in range(max(len(run) - 1, 1))}
    return frozenset(words | pairs)


def language(text: str) -> str:
    """A guess, good enough for foils: a clause in another language may say the same without sharing a word."""
    scripts = {"ja": "\u3040-\u30ff", "ko": "\uac00-\ud7af", "th": "\u0e00-\u0eff", "zh": "\u3400-\u9fff", "ru": "а-я"}
    for name, characters in scripts.items():
        if re.search(f"[{characters}]", text):
            return name
    words = re.findall(r"\w+", text.casefold())
    hits = {name: sum(word in small for word in words) for name, small in _SMALL_WORDS.items()}
    return max(hits, key=lambda name: hits[name]) if any(hits.values()) else "en"


def questions(
    prompt: str, mode: str, others: Sequence[Foil] = (), still: bool = False, begins: bool = False
) -> tuple[Question, ...]:
    """The questions of a prompt in a mode of ``make_questions``; arguments as there."""
    text, heldout = cut(prompt), mode == "heldout"
    if mode == "vanilla":
        return (_yesno(_WHOLE[0].format(text.whole) if text.whole else _NOTHING[0], "global"),)
    checks = fixed.checks(prompt, still=still, begins=begins)
    made: list[Question] = []
    if mode in {"yesno", "both", "heldout"}:
        made += about(text, heldout)
        made += about_others(prompt, others, heldout)
        made += fixed.yesno(checks, heldout)
    if mode in {"dense", "both"}:
        made += [*_dense(text), *fixed.dense(checks, still)]
    return tuple(made)


def _yesno(text: str, name: str, answer: str = "yes", weight: float = 1.0) -> Question:
    return Question("TA", text + fixed.ANSWER, answer, weight=weight, name=name)


def about(text: Clauses, heldout: bool = False) -> list[Question]:
    """A question about each clause, and one about the whole."""
    count = len(text.clauses)
    shares = min(count, MOST) if count > 1 else 0
    asked = [", ".join(text.clauses[i * count // shares : (i + 1) * count // shares]) for i in range(shares)]
    whole = _WHOLE[heldout].format(text.short) if text.short else _NOTHING[heldout]
    clauses = {_CLAUSE[heldout].format(clause): "clause" for clause in asked}
    return [_yesno(question, name) for question, name in {**clauses, whole: "whole"}.items()]


def about_others(
    prompt: str, others: Sequence[Foil], heldout: bool = False, neutral: Sequence[str] = NEUTRAL
) -> list[Question]:
    """A question about each foil of a prompt. ``neutral``: foils if ``others`` has too few."""
    chosen = _chosen(prompt, others, neutral)
    return [_yesno(_CLAUSE[heldout].format(foil), "foil", "no", 0.5) for foil in chosen]


def _chosen(prompt: str, others: Sequence[Foil], neutral_texts: Sequence[str]) -> list[str]:
    """The prompt's foils, always the same. The start depends on the prompt, so that a set uses all its foils."""
    words, spoken, start = content(prompt), language(prompt), zlib.crc32(prompt.encode())
    neutral = [Foil(text, spoken, content(text)) for text in neutral_texts]
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
    """Asks for the whole, then for each clause by naming the one before it."""
    whole = _sentence(text.short or "the video shows a recognizable scene")
    made = [Question("TA", "Describe what happens in this video in one sentence.", whole, "dense", name="whole")]
    shown = [clause for clause in text.clauses if not NEGATION.search(clause)][:MOST_DENSE]
    for before, clause in pairwise(shown):
        query = f'Besides "{before}", what does this video show? Answer in one short sentence.'
        made.append(Question("TA", query, _sentence(shorten(clause)), "dense", name="clause"))
    return made


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("。" if re.search(f"[{UNSPACED}]$", text) else ".")
