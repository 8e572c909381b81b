"""``lowmem-drf questions``: the questions of a prompt or a prompt file: a table, JSON, or a file to edit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem_drf.assembly.questions import draft_questions, needs_writer, written_questions
from lowmem_drf.errors import BadInputError
from lowmem_drf.prompts import as_prompts, load_prompts
from lowmem_drf.questions import toyworld
from lowmem_drf.questions.file import to_json
from lowmem_drf.types import Prompt, Question

if TYPE_CHECKING:
    from rich.console import Console


def questions_command(
    prompt: str | None,
    file: Path | None,
    preset: str | None,
    overrides: Sequence[str],
    as_json: bool,
    output: Path | None,
) -> None:
    """Prints a table, or prints or writes the JSON that ``critic.questions`` reads."""
    from rich.console import Console

    from lowmem_drf.config import chosen_preset, load_config
    from lowmem_drf.files import write_text

    if (prompt is None) == (file is None):
        raise BadInputError(
            'give one prompt, or a file with --prompts. Example: lowmem-drf questions "a red ball rolls off a table"'
        )
    prompts = as_prompts([prompt]) if prompt is not None else load_prompts(file or "")
    config = load_config(preset or chosen_preset()[0], overrides)
    # without --preset, show the prompt's questions even if this machine's preset trains ToyWorld
    free = preset is None and not all(toyworld.attributes(p.text) for p in prompts)
    console = Console(stderr=as_json, soft_wrap=True)
    questions = draft_questions(config, prompts, "phrases" if free else None)
    if needs_writer(config):
        from lowmem_drf.assembly.loading import load_run_critic

        questions = written_questions(config, prompts, questions, load_run_critic(config), console)
    text = to_json({p.text: questions[p.id] for p in prompts})
    if output is not None:
        write_text(output, text)
        told = f"{output}: edit it, then run: lowmem-drf train -s critic.questions={output}"
        console.print(told, highlight=False, markup=False)
    if as_json:
        print(text, end="")
    elif output is None:
        for p in prompts:
            _print_table(p, questions[p.id], console)


def _print_table(prompt: Prompt, questions: Sequence[Question], console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("", "question", "answer wanted", "weight", title=Text(prompt.text), title_justify="left")
    for question in questions:
        table.add_row(question.aspect, Text(question.text), Text(question.answer), f"{question.weight:g}")
    console.print(table)
