"""``lowmem-drf questions``: the questions of a prompt or a prompt file: a table, JSON, or a file to edit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem_drf.assembly.check import Checked
from lowmem_drf.assembly.questions import draft_questions, grammar_of, writers_of
from lowmem_drf.errors import BadInputError, quoted
from lowmem_drf.files import replaceable, require_output, write_text
from lowmem_drf.models.weights.sources import READER, TOYWORLD
from lowmem_drf.prompts import as_prompts, load_prompts
from lowmem_drf.questions import toyworld
from lowmem_drf.questions.check import Verdict, report
from lowmem_drf.questions.file import load_questions, to_json
from lowmem_drf.questions.make import Grammar
from lowmem_drf.schema import Config
from lowmem_drf.terminal import make_console, showing
from lowmem_drf.texts import escaped, toml_value
from lowmem_drf.types import Prompt, Question

if TYPE_CHECKING:
    from rich.console import Console

MOST_TABLES = 20
"""Prompts that are shown as tables, at most."""


def questions_command(
    prompt: str | None,
    file: Path | None,
    preset: str | None,
    overrides: Sequence[str],
    as_json: bool,
    output: Path | None,
    write: bool = False,
    check: Path | None = None,
    force: bool = False,
) -> None:
    """Prints a table, or prints or writes the JSON that ``critic.questions`` reads.

    Args:
        write: load the critic, and show what training would ask.
        check: a questions file, in place of prompts: load the critic, and show what it thinks of each question.
        force: ``output`` may replace a file that was edited.
    """
    from lowmem_drf.config import load_config
    from lowmem_drf.preset_files import chosen_preset

    if [prompt, file, check].count(None) != 2:
        raise BadInputError(
            "give one prompt, a prompt file with --prompts, or a questions file with --check. "
            'Example: lowmem-drf questions "a red ball rolls off a table"'
        )
    if check is not None:
        overrides = [*overrides, f"critic.questions={toml_value(str(check))}"]
    config = load_config(preset if preset is not None else chosen_preset()[0], overrides)
    given = as_prompts(list(load_questions(check))) if check is not None else None
    prompts = given or (as_prompts([prompt]) if prompt is not None else load_prompts(file or ""))
    # without --preset, show the prompt's questions even if this machine's preset trains ToyWorld
    free = preset is None and not all(toyworld.attributes(p.text) for p in prompts)
    config = config.model_copy(update={"prompts": ""}) if free else config
    console = make_console(stderr=as_json, soft_wrap=True)
    grammar = "phrases" if free else grammar_of(config)
    drafted = draft_questions(config, prompts, grammar)
    if output is not None:
        require_output(output, "--output", lambda path: _unedited(path, config, grammar), force, streams=True)
    asks = write or check is not None
    done = _asked(config, prompts, drafted, console) if asks else Checked(drafted)
    text = to_json({p.text: done.questions[p.id] for p in prompts})
    if output is not None:
        write_text(output, text)
        if replaceable(output):
            told = f"{output}: edit it, then run: lowmem-drf train -s {quoted(f'critic.questions={output}')}"
            console.print(told, highlight=False, markup=False)
    if as_json and check is not None:
        rows = [{"prompt": p.text, "questions": report(done.verdicts.get(p.id, ()), every=True)} for p in prompts]
        print(escaped(json.dumps(rows, indent=1, ensure_ascii=False)))
    elif as_json:
        print(text, end="")
    elif output is None:
        makers = writers_of(config, prompts, grammar) | dict.fromkeys(
            done.written, config.critic.writer or config.critic.id
        )
        for p in prompts:
            verdicts = done.verdicts.get(p.id) or [Verdict(q) for q in done.questions[p.id]]
            _print_questions(p, verdicts, makers[p.id], console, framed=len(prompts) <= MOST_TABLES)
        if not asks and grammar != "toyworld":
            told = "No model was asked. Before training the critic writes and checks questions; --write shows them."
            console.print(told, highlight=False)


def _asked(
    config: Config, prompts: Sequence[Prompt], draft: Mapping[str, tuple[Question, ...]], console: Console
) -> Checked:
    """What training asks: written, checked and finished by the critic."""
    from lowmem_drf.assembly.loading import load_run_critic
    from lowmem_drf.assembly.references import finish_questions

    if config.critic.id == TOYWORLD:
        raise BadInputError(
            "ToyWorld's default critic neither writes nor checks questions. Name another one: "
            f"-s critic.id={READER}, or a real one: -s critic.id=Qwen/Qwen2.5-VL-3B-Instruct"
        )
    with showing(console):
        critic = load_run_critic(config)
    return finish_questions(config, prompts, draft, critic, console)


def _unedited(path: Path, config: Config, grammar: Grammar) -> bool:
    """True for a file that this command would write, without the critic, for the prompts in it."""
    try:
        held = load_questions(path)
        prompts = as_prompts(list(held))
        drafts = [  # a file does not say which of its prompts have an image
            draft_questions(config, [replace(p, image=image) for p in prompts], grammar) for image in (None, "image")
        ]
        rows = {
            p.text: [to_json({p.text: some}) for some in (held[p.text], *(d[p.id] for d in drafts))] for p in prompts
        }
        return to_json(held) == path.read_text(encoding="utf-8") and all(own in made for own, *made in rows.values())
    except (BadInputError, ValueError):
        return False


def _print_questions(prompt: Prompt, verdicts: Sequence[Verdict], maker: str, console: Console, framed: bool) -> None:
    """``framed``: as a table; else a line a question, which is much faster for many prompts."""
    from rich.table import Table
    from rich.text import Text

    checked = any(verdict.told is not None for verdict in verdicts)
    headings = ["", "question", "answer wanted", "weight", *(["from text", "from nothing", ""] if checked else [])]
    table = Table(*headings, title=Text(prompt.text), title_justify="left", caption=Text(f"by: {maker}"))
    table.caption_justify = "left"
    lines = [f"{prompt.text}  (by: {maker})"]
    for verdict in verdicts:
        question = verdict.question
        cells = [question.aspect, question.text, question.answer, f"{question.weight:g}" if verdict.asked else "-"]
        if checked:
            cells += ["" if p is None else f"{p:.0%}" for p in (verdict.told, verdict.guessed)]
            cells.append(verdict.why if verdict.asked or not verdict.why else f"left out: {verdict.why}")
        lines.append("  ".join(("", *cells)))
        if framed:
            table.add_row(*map(Text, cells), style="" if verdict.asked else "dim")
    if framed:
        console.print(table)
    else:
        console.file.write("\n".join((*lines, "", "")))
