"""Questions as JSON, for programs and for editing: ``[{"prompt": …, "questions": [{"aspect", "kind", "text", "answer",
"weight", "name"}]}]``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowmem_drf.errors import BadInputError
from lowmem_drf.prompts import parse_question
from lowmem_drf.types import Question


def to_json(questions: Mapping[str, Sequence[Question]]) -> str:
    """Prompt text -> questions, as ``lowmem-drf questions --json`` prints them."""
    rows = [
        {"prompt": prompt, "questions": [_row(question) for question in asked]} for prompt, asked in questions.items()
    ]
    return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"


def _row(question: Question) -> dict[str, Any]:
    row = {
        "aspect": question.aspect,
        "kind": question.kind,
        "text": question.text,
        "answer": question.answer,
        "weight": question.weight,
    }
    return row | ({"name": question.name} if question.name else {})


def load_questions(path: str | Path) -> dict[str, tuple[Question, ...]]:
    """Prompt text -> questions of a file. Raises BadInputError with the place of what is wrong."""
    path = Path(path).expanduser()
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise BadInputError(
            f"critic.questions = {str(path)!r}: there is no such file. Use templates, critic, or a file made with: "
            "lowmem-drf questions --prompts PROMPTS.txt --output QUESTIONS.json"
        ) from error
    except (OSError, ValueError) as error:
        raise BadInputError(f"the questions {path} cannot be read as JSON: {error}") from error
    if not isinstance(rows, list):
        raise BadInputError(f'{path}: is to be a list of {{"prompt": …, "questions": [...]}}')
    found: dict[str, tuple[Question, ...]] = {}
    for number, row in enumerate(rows, 1):
        where = f"{path}: entry {number}"
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("prompt"), str)
            or not isinstance(row.get("questions"), list)
        ):
            raise BadInputError(f'{where}: is to be {{"prompt": …, "questions": [...]}}')
        if row["prompt"] in found:
            raise BadInputError(f"{where}: the prompt {row['prompt']!r} is there twice; keep one of them")
        if not row["questions"]:
            raise BadInputError(f"{where}: has no question; delete the entry to have them made for it")
        found[row["prompt"]] = tuple(
            parse_question(f"{where}, question {n}", item) for n, item in enumerate(row["questions"], 1)
        )
    return found
