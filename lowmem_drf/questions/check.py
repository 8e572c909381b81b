"""Checks questions before a critic asks them of clips: it answers them from the prompt's text alone, and from nothing.

A question that the prompt itself does not answer as wanted is wrong. One that needs neither prompt nor clip tells
nothing about the clip. The fixed questions are only about what prompts leave open, so a prompt has to contradict them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lowmem_drf.questions import fixed, toyworld
from lowmem_drf.types import Question

VERSION = 1
"""Part of the cache's key; raise it when a text below changes."""
SURE = 0.8
"""Probability from which on an answer counts as given."""
GUESSED_SHARE = 0.2
"""Share of its weight that a question keeps if it is answered without prompt and clip."""
DESCRIBED = "This is an exact description of a video: {prompt}"
"""What the critic reads in the clip's place."""
BLIND = "Guess about a video that you have not seen."
"""What it reads to guess."""
RIGHT = 'To the question "{text}" somebody answered: "{answer}". Is that right? Answer yes or no.'
"""The yes/no question that checks a dense one."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The check of one question."""

    question: Question
    """As it is asked: with the weight that the check gave it."""
    told: float | None = None
    """Probability of the wanted answer from the prompt's text, against the other answer. ``None``: not checked."""
    guessed: float | None = None
    """The same without the text. ``None``: not asked for."""
    why: str = ""
    """Why it is left out, or weighs little. Empty: it is asked as it was."""
    asked: bool = True


def is_fixed(question: Question) -> bool:
    """True for the questions that are asked of every clip."""
    return question.text in _FIXED


def checkable(question: Question) -> Question:
    """The yes/no question whose answer tells whether this one is right: itself, or for a dense one, whether its
    reference answer is right."""
    if question.kind == "yesno":
        return question
    return replace(question, text=RIGHT.format(text=question.text, answer=question.answer), answer="yes", kind="yesno")


def needs_guess(question: Question, told: float) -> bool:
    """True for a question about the prompt that was answered as wanted from the text."""
    return question.aspect == "TA" and not is_fixed(question) and told >= SURE


def verdict(question: Question, told: float, guessed: float | None = None) -> Verdict:
    """Whether a question is asked, and with what weight.

    Args:
        told: probability of the wanted answer to ``checkable(question)`` from the text.
        guessed: the same without it.
    """
    if is_fixed(question):
        if contradicted(told):
            return Verdict(question, told, None, "the prompt contradicts it", asked=False)
        return Verdict(question, told)
    if told < SURE:
        right = "its reference answer" if question.kind == "dense" else f"the answer {question.answer}"
        return Verdict(question, told, None, f"{right} does not follow from the prompt", asked=False)
    if guessed is not None and guessed >= SURE:
        light = replace(question, weight=GUESSED_SHARE * question.weight)
        return Verdict(light, told, guessed, "it is answered as wanted without the prompt")
    return Verdict(question, told, guessed)


def contradicted(told: float) -> bool:
    """True if the opposite of the wanted answer follows from the text."""
    return 1 - told >= SURE


def report(verdicts: Sequence[Verdict], every: bool = False) -> list[dict[str, object]]:
    """Verdicts as JSON: those of questions that are not asked as they were, or every one."""
    return [
        {
            "text": v.question.text,
            "answer": v.question.answer,
            "asked": v.asked,
            "weight": v.question.weight if v.asked else 0.0,
            "from_text": v.told,
            "from_nothing": v.guessed,
            "why": v.why,
        }
        for v in verdicts
        if every or v.why
    ]


_FIXED = fixed.texts() | toyworld.fixed_texts()
