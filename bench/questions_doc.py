"""Writes docs/questions.md: what ``phrases`` asks of twenty prompts, and every question that is asked of any clip.

    python -m bench.questions_doc

A test holds the page to the code.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bench.questions import PROMPTS
from lowmem_drf.questions import fixed
from lowmem_drf.questions.make import foils, make_questions
from lowmem_drf.types import Question

PAGE = Path(__file__).resolve().parents[1] / "docs" / "questions.md"
LINES = (0, 2, 4, 6, 7, 10, 12, 14, 15, 16, 17, 18, 22, 23, 25, 28, 29, 30, 32, 33)
"""Of the prompts in tests/questions/prompts.jsonl, counted from 0."""

HEAD = """\
# Questions, by example

Made by `python -m bench.questions_doc`. Twenty prompts as people write them, and what
`critic.questions = "phrases"` asks of their clips: no model was asked, so nothing here was checked. By default the
critic writes the questions about the prompt itself, and checks every question from the prompt's text before it is asked
([critic.md](critic.md)). `lowmem-drf questions --prompts FILE --write` shows those.

Each question about the prompt ends with "Answer yes or no."; the answers wanted are yes, except for foils, which quote
other prompts. Physics and quality are named here by property; their questions are [at the end](#of-every-clip).
Explanations are asked for in the modes `dense` and `both`.
"""
END = """\
## Of every clip

Five properties of each, both ways, at half a weight a question. A property that the prompt contradicts gives its place
to the next one.
"""
IMAGE = """\
## Of a clip that begins with an image

Of a prompt with an `image`, first of all.
"""


def page() -> str:
    """The page, as it should be."""
    rows = [json.loads(line)["prompt"] for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    others = foils(rows, "phrases")
    parts = [HEAD, *(_prompt(rows[i], make_questions(rows[i], "both", "phrases", others)) for i in LINES)]
    parts.append(END)
    parts += [_properties("Physics", fixed.PHYSICS), _properties("Quality", fixed.QUALITY)]
    parts += [IMAGE, _properties("Quality", (fixed.FIRST_FRAME,))]
    return "\n".join(parts)


def _prompt(text: str, asked: tuple[Question, ...]) -> str:
    about = [q for q in asked if q.aspect == "TA" and q.kind == "yesno"]
    lines = [f"## {' '.join(text.split())}\n".replace("<", "&lt;")]
    lines += [f"- {q.text.removesuffix(fixed.ANSWER)}{' **no**' if q.answer == 'no' else ''}" for q in about]
    for aspect, name in (("Phy", "physics"), ("VQ", "quality")):
        named = dict.fromkeys(q.name for q in asked if q.aspect == aspect and q.kind == "yesno")
        lines.append(f"- *{name}*: {', '.join(named)}")
    explained = [q for q in asked if q.aspect == "TA" and q.kind == "dense"]
    lines.append(f"- *explanation*: {explained[0].answer}")
    lines += [f"- {q.text} *{q.answer}*" for q in explained[1:]]
    return "\n".join(lines) + "\n"


def _properties(title: str, every: tuple[fixed.Check, ...]) -> str:
    lines = [f"| {title} | yes | no |", "|---|---|---|"]
    lines += [f"| {check.name} | {check.good[0]} | {check.bad[0]} |" for check in every]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Writes the page."""
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
