"""Questions that a language model, usually the critic itself, writes as JSON.

It writes the questions that depend on the prompt: text alignment, and the physics of this scene. ``fixed`` has those
about physics and quality of any clip. Each question is checked. An unusable answer is sent back once, with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lowmem_drf.errors import BadInputError
from lowmem_drf.prompts import parse_question
from lowmem_drf.questions.fixed import ANSWER
from lowmem_drf.questions.still import of_image
from lowmem_drf.types import Question

Generate = Callable[[Sequence[str]], Sequence[str]]
"""A language model: instructions -> answers."""

VERSION = 2
"""Part of the cache's key; raise it when an instruction changes."""

FEWEST, MOST = 2, 24

_YESNO = '["TA", "Are there exactly two dogs in the video?", "yes"]'
_DENSE = '["TA", "What do the dogs do?", "The two dogs chase a red ball."]'

_RULES = {
    "yesno": "Every question is answered by yes or no. Its answer is what a video that follows the description "
    'perfectly would get; ask two or three questions whose right answer is "no", about details that contradict the '
    "description.",
    "dense": "Every question asks for a short explanation. Its answer is one sentence, what a viewer would say of a "
    "video that follows the description perfectly.",
    "both": 'Write questions whose answer is "yes" or "no" (two or three whose right answer is "no"), and questions '
    "that ask for a short explanation, whose answer is one sentence, what a viewer would say of a perfect video.",
}
_INSTRUCTION = """\
A video was made from this description:

{prompt}

Write questions that check whether the video shows what the description says. Ask about one fact at a time: each \
subject, how many there are, each attribute (color, material, size), each action, where things are in relation to each \
other, the place, the camera and the style. Ask about nothing that the description does not say. Use aspect "TA" for \
these. Then ask one or two questions with aspect "Phy": whether the motion in this very scene obeys the laws of physics.
{rules}
Answer with a JSON array of {fewest} to {most} rows and nothing else, each of this form: [aspect, question, answer]. \
For example:
[{example}]
"""
_REPAIR = """\
{instruction}
Your last answer could not be used: {reason}.
It began: {said}
Answer again, with the corrected JSON array and nothing else."""


class UnusableError(ValueError):
    """The reason why a writer's answer is unusable."""


def write_questions(
    prompts: Sequence[str], mode: str, generate: Generate, still: bool = False
) -> list[tuple[Question, ...] | UnusableError]:
    """Questions of aspects TA and Phy for each prompt, or the error of its second unusable answer.

    ``mode``: ``yesno``, ``dense`` or ``both``. ``still``: about images.
    """
    instructions = [instruction(prompt, mode, still) for prompt in prompts]
    answers = generate(instructions)
    made = [_read(said, mode) for said in answers]
    again = [i for i, found in enumerate(made) if isinstance(found, UnusableError)]
    if again:
        repairs = [
            _REPAIR.format(instruction=instructions[i], reason=made[i], said=answers[i].strip()[:200] or "(nothing)")
            for i in again
        ]
        for i, said in zip(again, generate(repairs), strict=True):
            made[i] = _read(said, mode)
    return made


def instruction(prompt: str, mode: str, still: bool = False) -> str:
    """What a writer is told."""
    example = ",\n ".join([_YESNO] * (mode != "dense") + [_DENSE] * (mode != "yesno"))
    frame, rules = _INSTRUCTION, _RULES[mode]
    if still:
        frame, rules, example = of_image(frame), of_image(rules), example.replace("video", "image")
    return frame.format(prompt=prompt, rules=rules, fewest=FEWEST, most=MOST, example=example)


def _read(said: str, mode: str) -> tuple[Question, ...] | UnusableError:
    try:
        return read_questions(said, mode)
    except UnusableError as error:
        return error


def read_questions(said: str, mode: str) -> tuple[Question, ...]:
    """Questions of the first JSON array in a text, checked, without duplicates. Raises UnusableError."""
    made: dict[str, Question] = {}
    for number, row in enumerate(_first_array(said), 1):
        try:
            question = parse_question(f"question {number}", _lenient(row, mode))
        except BadInputError as error:
            raise UnusableError(str(error)) from error
        if question.aspect not in ("TA", "Phy"):
            raise UnusableError(f'question {number}: aspect "{question.aspect}" is to be TA or Phy')
        if mode != "both" and question.kind != mode:
            raise UnusableError(f'question {number}: kind "{question.kind}" is to be {mode}')
        made.setdefault(question.text.casefold(), question)
    if not FEWEST <= len(made) <= MOST:
        raise UnusableError(f"it holds {len(made)} different questions, and there are to be {FEWEST} to {MOST}")
    if all(question.aspect != "TA" for question in made.values()):
        raise UnusableError('no question has aspect "TA"')
    # the same ending as the fixed questions: the critic's first word is scored
    return tuple(replace(q, text=q.text.strip() + ANSWER) if q.kind == "yesno" else q for q in made.values())


def _first_array(said: str) -> list[Any]:
    at = said.find("[")
    if at < 0:
        raise UnusableError("there is no JSON array in it")
    try:
        rows, _ = json.JSONDecoder().raw_decode(said[at:])
    except json.JSONDecodeError as error:
        raise UnusableError(f"it is not JSON ({error.msg} at character {at + error.pos})") from error
    return list(rows)


def _lenient(row: Any, mode: str) -> Any:
    """A row as ``parse_question`` takes it. Objects, ``question`` for ``text`` and ``Yes.`` for ``yes`` will do too."""
    if isinstance(row, list) and len(row) == 3:
        row = dict(zip(("aspect", "text", "answer"), row, strict=True))
    if not isinstance(row, dict):
        return row
    row = {key: value for key, value in row.items() if key not in ("id", "number", "weight", "name", "token_weights")}
    if "text" not in row and "question" in row:
        row["text"] = row.pop("question")
    answer = {True: "yes", False: "no"}.get(row["answer"]) if isinstance(row.get("answer"), bool) else row.get("answer")
    short = answer.strip().rstrip(".").lower() if isinstance(answer, str) else answer
    if "kind" not in row:
        row["kind"] = mode if mode != "both" else ("yesno" if short in ("yes", "no") else "dense")
    if row["kind"] == "yesno":
        row["answer"] = short
    return row
