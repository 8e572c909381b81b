"""Prompt -> the questions that the critic is asked about its clip."""

from __future__ import annotations

from lowmem_drf.errors import BadInputError
from lowmem_drf.method.questions import toyworld
from lowmem_drf.types import Question

MODES = ("structured", "vanilla", "heldout")


def make_questions(prompt: str, mode: str = "structured") -> tuple[Question, ...]:
    """Questions for a prompt of ToyWorld's grammar.

    mode: ``structured`` asks for every attribute, for physics and for quality; ``vanilla`` asks one global question; ``heldout`` is
    ``structured`` in wordings that training never uses, for evaluation.

    Raises:
        BadInputError: the prompt does not name one shape, one colour, one motion and one background.
    """
    if mode not in MODES:
        raise BadInputError(f"critic.mode = {mode!r} is unknown. Use one of: {', '.join(MODES)}.")
    values = toyworld.attributes(prompt)
    if values is None:
        wanted = "; ".join(f"{name}: {', '.join(options)}" for name, options in toyworld.ATTRIBUTES.items())
        raise BadInputError(
            f"No questions can be made from the prompt {prompt!r}: ToyWorld's grammar wants one word of each of {wanted}. "
            'Example: "a red circle moves left on a gray background". '
            'Or give the questions yourself in a .jsonl prompt file ("questions").'
        )
    if mode == "vanilla":
        return toyworld.vanilla(" ".join(prompt.lower().replace("grey", "gray").replace(",", " ,").split()))
    return toyworld.structured(values, wording=1 if mode == "heldout" else 0)
