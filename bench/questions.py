"""What do the questions that need no model ask of prompts as people write them?

    python -m bench.questions                # --prompts FILE: others in the form of tests/questions/prompts.jsonl

A line of that file is a prompt with what must be asked about (``must``: words that have to occur in the questions about
the prompt) and what must never be (``never``). Prints a line a prompt: how many of its ``must`` are asked about, which
``never`` is asked, its clauses, its questions (about the prompt; in all). Exit code 1 if something is missing, or is
asked that must not be.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowmem_drf.questions.clauses import cut
from lowmem_drf.questions.make import foils, make_questions
from lowmem_drf.types import Question

PROMPTS = Path(__file__).resolve().parents[1] / "tests" / "questions" / "prompts.jsonl"
ENOUGH = 12
"""At least as many questions about a prompt as it has clauses, up to this many."""


def measure(file: Path = PROMPTS) -> list[dict[str, Any]]:
    """A row a prompt; ``missing``, ``asked_never``, ``foreign`` and ``too_few`` are empty or 0 where all is well."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    others = foils((row["prompt"] for row in rows), "phrases")
    return [{**row, **_judged(row, make_questions(row["prompt"], "yesno", "phrases", others))} for row in rows]


def _judged(row: dict[str, Any], asked: tuple[Question, ...]) -> dict[str, Any]:
    clauses = cut(row["prompt"]).clauses
    about = [question for question in asked if question.aspect == "TA"]
    parts = [q for q in about if q.answer == "yes" and (q.name == "clause" or len(clauses) == 1)]
    # clauses, counted another way
    marks = [part for part in re.split(r"[.,;:!?](?=\s)|[\n，。；：、]", row["prompt"]) if re.search(r"\w", part)]
    return {
        "missing": [words for words in row["must"] if not any(words.casefold() in q.text.casefold() for q in parts)],
        "asked_never": [words for words in row["never"] if any(words.casefold() in q.text.casefold() for q in about)],
        "foreign": [q.text for q in about if q.name == "clause" and _words(_quoted(q)) not in _words(row["prompt"])],
        "too_few": max(min(max(len(clauses), len(marks)), ENOUGH) - len(about), 0),
        "clauses": len(clauses),
        "about": len(about),
        "questions": len(asked),
    }


def _quoted(question: Question) -> str:
    found = re.search(r'"(.*)"', question.text)
    return found[1] if found else question.text


def _words(text: str) -> str:
    return " " + " ".join(re.findall(r"\w+", text.casefold())) + " "


def table(rows: list[dict[str, Any]]) -> Table:
    """A line a prompt, and one for all."""
    made = Table("prompt", "must", "never", "clauses", "questions")
    for row in rows:
        trouble = [*(f"not asked: {words}" for words in row["missing"]), *row["foreign"]]
        must = f"{len(row['must']) - len(row['missing'])} of {len(row['must'])} {'; '.join(trouble)}".strip()
        never = ", ".join(row["asked_never"]) or f"0 of {len(row['never'])}"
        made.add_row(Text(row["prompt"][:60]), must, never, str(row["clauses"]), f"{row['about']}; {row['questions']}")
    count = {key: sum(len(row[key]) for row in rows) for key in ("must", "missing", "never", "asked_never")}
    made.add_section()
    made.add_row(
        f"{len(rows)} prompts",
        f"{count['must'] - count['missing']} of {count['must']}",
        f"{count['asked_never']} of {count['never']}",
        str(sum(row["clauses"] for row in rows)),
        f"{sum(row['about'] for row in rows)}; {sum(row['questions'] for row in rows)}",
    )
    return made


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    rows = measure(parser.parse_args(arguments).prompts)
    Console(width=None if sys.stdout.isatty() else 160).print(table(rows))
    return int(any(row[key] for row in rows for key in ("missing", "asked_never", "foreign", "too_few")))


if __name__ == "__main__":
    sys.exit(main())
