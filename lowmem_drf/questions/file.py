"""Questions as JSON, to read by programs and to edit:
``[{"prompt": …, "questions": [{"aspect", "kind", "text", "answer", "weight", "name"}]}]``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowmem_drf.errors import BadInputError
from lowmem_drf.prompts import parse_question
from lowmem_drf.texts import escaped, expanded, parse_json, read_text, shown
from lowmem_drf.types import Prompt, Question

WRITERS = ("phrases", "critic", "grammar")
"""Values of ``critic.questions`` that are not a file."""


def to_json(questions: Mapping[str, Sequence[Question]]) -> str:
    """Prompt text -> questions, as ``lowmem-drf questions --json`` prints them."""
    rows = [{"prompt": prompt, "questions": list(map(_row, asked))} for prompt, asked in questions.items()]
    return escaped(json.dumps(rows, indent=1, ensure_ascii=False)) + "\n"


def _row(question: Question) -> dict[str, Any]:
    keys = ("aspect", "kind", "text", "answer", "weight", *(["name"] if question.name else []))
    return {key: getattr(question, key) for key in keys}


def load_questions(path: str | Path) -> dict[str, tuple[Question, ...]]:
    """Prompt text -> questions of a file. Raises BadInputError that says where the file is wrong."""
    path = expanded(path)
    if not os.path.exists(path):
        raise BadInputError(
            f"critic.questions = {str(path)!r}: there is no such file. Use phrases, critic, or a file made with: "
            "lowmem-drf questions --prompts PROMPTS.txt --output QUESTIONS.json"
        )
    try:
        rows = parse_json(read_text(path, f"questions file {path}"))
    except ValueError as error:
        problem = f"the questions {path} cannot be read as JSON: {error}"
        raise BadInputError(
            f"{problem}. Correct it there, or make the file again with: lowmem-drf questions"
        ) from error
    if not isinstance(rows, list):
        raise BadInputError(f'{path}: is to be a list of {{"prompt": …, "questions": [...]}}')
    found: dict[str, tuple[Question, ...]] = {}
    for number, row in enumerate(rows, 1):
        where = f"{path}: entry {number}"
        match row:
            case {"prompt": str(prompt), "questions": list(items)}:
                pass
            case _:
                raise BadInputError(f'{where}: is to be {{"prompt": …, "questions": [...]}}')
        if prompt in found:
            raise BadInputError(f"{where}: the prompt {shown(prompt)} is there twice; keep one of them")
        if not items:
            raise BadInputError(f"{where}: has no question. Add some, or take those of: lowmem-drf questions --json")
        found[prompt] = tuple(parse_question(f"{where}, question {n}", item) for n, item in enumerate(items, 1))
    return found


def require_same_prompts(path: str | Path, given: Mapping[str, Sequence[Question]], prompts: Sequence[Prompt]) -> None:
    """Raises BadInputError that names the prompts without questions: neither in the prompt file nor in this file."""
    missing = [prompt for prompt in prompts if not prompt.questions and prompt.text not in given]
    if not missing:
        return
    unused = sorted(given.keys() - {prompt.text for prompt in prompts})
    message = f"{path}: has no questions for {len(missing)} of {len(prompts)} prompts:"
    message += _named([f"{prompt.id} {shown(prompt.text, 100)}" for prompt in missing])
    if unused:
        message += f"\nIt has questions for {len(unused)} prompts that the run does not have:"
        message += _named([shown(text, 100) for text in unused])
    raise BadInputError(
        f"{message}\nThe texts have to be the same. Copy the changed ones into the file, or make it again: "
        "lowmem-drf questions --prompts PROMPTS.txt --output QUESTIONS.json"
    )


def _named(names: Sequence[str]) -> str:
    more = f", and {len(names) - 1} more" if len(names) > 1 else ""
    return f"\n  {names[0]}{more}"
