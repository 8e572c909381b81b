"""Questions about a prompt's clip, made without a model: ``phrases`` quotes any prompt, ``toyworld`` knows ToyWorld's
grammar. ``writer`` lets a language model write them; ``file`` reads a user's file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal, get_args

from lowmem_drf.errors import BadInputError
from lowmem_drf.questions import phrases, toyworld
from lowmem_drf.questions.clauses import cut
from lowmem_drf.questions.still import TOYWORLDS, about_image
from lowmem_drf.types import Question

Grammar = Literal["phrases", "toyworld", "toyworld_phrases"]
"""``phrases``: for critics that understand any words. ``toyworld``: ToyWorld's own questions. ``toyworld_phrases``: in
their place quoted clauses, with ToyWorld's questions about physics and quality."""

MODES = ("yesno", "dense", "both", "vanilla", "heldout")


def make_questions(
    prompt: str,
    mode: str = "yesno",
    grammar: Grammar = "phrases",
    others: Sequence[phrases.Foil] = (),
    still: bool = False,
    begins: bool = False,
) -> tuple[Question, ...]:
    """The questions of a prompt.

    Args:
        mode: ``yesno`` asks about every part of the prompt, physics and quality; ``dense`` asks for explanations of all
            three; ``both``; ``vanilla`` asks one global question; ``heldout`` is ``yesno`` in wordings that training
            never uses.
        others: ``foils`` of the prompt's set.
        still: about an image (``still``).
        begins: the clip begins with a given image. Critics of ToyWorld's grammar are not asked about that.

    Raises:
        BadInputError: unknown mode or grammar; ToyWorld's: not exactly one shape, color, motion and background.
    """
    if mode not in MODES:
        raise BadInputError(f"critic.mode = {mode!r} is unknown. Use one of: {', '.join(MODES)}.")
    if grammar not in get_args(Grammar):
        raise BadInputError(f"the grammar {grammar!r} is unknown. Use one of: {', '.join(get_args(Grammar))}.")
    if grammar == "phrases":
        asked = phrases.questions(prompt, mode, others, still, begins)
        return about_image(asked) if still else asked
    made = _toyworld_questions(prompt, mode)
    made = tuple(question for question in made if not (still and question.name in TOYWORLDS))
    if grammar == "toyworld" or mode == "dense":
        return made
    if mode == "vanilla":
        return phrases.questions(prompt, mode, others)
    heldout = mode == "heldout"
    quoted = [*phrases.about(cut(prompt), heldout), *phrases.about_others(prompt, others, heldout, neutral=())]
    return (*quoted, *(question for question in made if question.aspect != "TA" or question.kind == "dense"))


def foils(prompts: Iterable[str], grammar: Grammar) -> tuple[phrases.Foil, ...]:
    """``others`` of ``make_questions``. In ToyWorld a foil shares no attribute with the prompt, but other words."""
    made = phrases.foils(prompts) if grammar != "toyworld" else ()
    if grammar == "phrases":
        return made
    values = phrases.content(" ".join(value for values in toyworld.ATTRIBUTES.values() for value in values))
    return tuple(replace(foil, words=foil.words & values) for foil in made)


def _toyworld_questions(prompt: str, mode: str) -> tuple[Question, ...]:
    values = toyworld.attributes(prompt)
    if values is None:
        wanted = "; ".join(f"{name}: {', '.join(options)}" for name, options in toyworld.ATTRIBUTES.items())
        raise BadInputError(
            f"No questions can be made from the prompt {prompt!r}: "
            f"ToyWorld's grammar wants one word of each of {wanted}. "
            'Example: "a red circle moves left on a gray background". '
            'Or give the questions yourself in a .jsonl prompt file ("questions").'
        )
    if mode == "vanilla":
        return toyworld.vanilla(prompt)
    yesno = toyworld.yesno(values, wording=1 if mode == "heldout" else 0) if mode != "dense" else ()
    return (*yesno, *(toyworld.dense(values) if mode in ("dense", "both") else ()))
