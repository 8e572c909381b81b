"""Prompt files, and a seeded, resumable stream of prompts.

``txt``: one prompt per line; blank lines and lines that start with ``#`` are skipped. ``jsonl``: one object per line,
``{"prompt": str, "id"?: str, "questions"?: [...], "reference_video"?: str, "image"?: str}`` where a question is
``{"aspect": "TA"|"Phy"|"VQ", "text": str, "answer": str, "kind"?: "yesno"|"dense", "weight"?: number, "name"?: str}``.
UTF-8, with or without a byte order mark.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from lowmem_drf.errors import BadInputError
from lowmem_drf.texts import expanded, parse_json, read_text, shown
from lowmem_drf.types import Aspect, Kind, Prompt, Question

PromptRow = str | Mapping[str, Any]
"""A prompt as a program gives it: a text, or the object of a line of a jsonl prompt file."""
_FILES = ("reference_video", "image")
_PROMPT_KEYS = {"prompt", "id", "questions", *_FILES}
_OTHER_FORMATS = (
    *(".csv", ".tsv", ".xls", ".xlsx", ".ods", ".parquet", ".arrow", ".yaml", ".yml", ".toml", ".xml", ".html"),
    *(".rtf", ".doc", ".docx", ".pdf"),
)
"""Endings of files whose lines are no prompts, though some could be read as text."""
_QUESTION_KEYS = {"aspect", "text", "answer", "kind", "weight", "name"}


def load_prompts(path: str | Path) -> tuple[Prompt, ...]:
    """The prompts of a file, in order. Raises BadInputError with file and line."""
    path = expanded(path)
    if not path.is_file():
        raise BadInputError(
            f"prompt file {path} does not exist. Write one prompt a line into it, or give another file with --prompts."
        )
    if path.suffix.lower() in _OTHER_FORMATS:
        raise BadInputError(
            f"prompt file {path}: {path.suffix} files are not read. Save the prompts alone, one a line, as .txt; "
            'or one object a line as .jsonl: {"prompt": "..."}'
        )
    lines = read_text(path, f"prompt file {path}").split("\n")  # splitlines breaks at characters that JSON may contain
    is_json = path.suffix.lower() in (".jsonl", ".json")
    rows = [
        (n, text.strip())
        for n, text in enumerate(lines, 1)
        if text.strip() and (is_json or not text.lstrip().startswith("#"))
    ]
    if rows and not is_json and re.match(r"\{ *\"prompt\" *:", rows[0][1]):
        raise BadInputError(f"{path}:{rows[0][0]}: is JSON, which is read from .jsonl files. Rename the file.")
    if not rows:
        raise BadInputError(f"prompt file {path} holds no prompt. Write one prompt a line into it.")
    if is_json:
        return _parsed(rows, f"{path}:", path.parent)
    return tuple(Prompt(id=f"{n:04d}", text=text) for n, text in rows)


def named_prompts(chosen: str | Sequence[str]) -> tuple[Prompt, ...]:
    """The prompts of a file, or texts."""
    return load_prompts(chosen) if isinstance(chosen, str) else as_prompts(chosen)


def parse_rows(rows: Sequence[PromptRow]) -> tuple[Prompt, ...]:
    """The prompts that a program gives, by the rules of a jsonl file; paths are relative to the current folder. Raises
    BadInputError with the number of the row."""
    if not rows:
        raise BadInputError("the list of prompts is empty. Give one at least.")
    return _parsed([(n, as_jsonl(row)) for n, row in enumerate(rows, 1)], "prompt ", Path())


def _parsed(rows: Iterable[tuple[int, str]], where: str, folder: Path) -> tuple[Prompt, ...]:
    prompts: dict[str, tuple[int, Prompt]] = {}
    for n, text in rows:
        prompt = _from_json(f"{where}{n}", n, text, folder)
        if used := prompts.get(prompt.id):
            raise BadInputError(
                f"{where}{n}: id {shown(prompt.id)} is already used in line {used[0]}. Give each prompt its own."
            )
        prompts[prompt.id] = n, prompt
    return tuple(prompt for _, prompt in prompts.values())


def as_prompts(texts: Iterable[str]) -> tuple[Prompt, ...]:
    """Prompts from plain texts, numbered from 0001 like the lines of a txt file. Raises BadInputError for one that is
    not UTF-8: models could not read it, and no file could hold it."""
    texts = list(texts)
    for text in texts:
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise BadInputError(
                f"the prompt {shown(text)} is not UTF-8. Write it in UTF-8, or give a file with --prompts."
            )
    return tuple(Prompt(id=f"{n:04d}", text=text) for n, text in enumerate(texts, 1))


def as_jsonl(row: PromptRow) -> str:
    """A line of a jsonl prompt file. Raises BadInputError for what no file can hold."""
    try:
        named = {"prompt": row} if isinstance(row, str) else dict(row)
        line = json.dumps(named, ensure_ascii=False, default=os.fspath)
        line.encode()
    except (TypeError, ValueError) as error:
        raise BadInputError(f"the prompt {shown(row)} is no text, and no line of a jsonl prompt file.") from error
    return line


def with_absolute_files(row: PromptRow) -> PromptRow:
    """The same prompt for a prompt file in any folder; its paths are relative to the current one."""
    if isinstance(row, str) or not isinstance(row, Mapping):
        return row
    files = {key: row[key] for key in _FILES if isinstance(row.get(key), str | os.PathLike)}
    return {**row, **{key: os.path.abspath(file) for key, file in files.items()}}


def without(prompts: Sequence[Prompt], skipped: Collection[str]) -> tuple[Prompt, ...]:
    """The prompts but for those with these ids. Raises BadInputError for an unknown id, or if none is left."""
    if unknown := sorted(set(skipped) - {prompt.id for prompt in prompts}):
        raise BadInputError(
            f"skip_prompts: no prompt has the id {shown(unknown[0])}. Ids are those of the jsonl file, or line numbers "
            f"of four digits ({prompts[0].id!r} to {prompts[-1].id!r})."
        )
    left = tuple(prompt for prompt in prompts if prompt.id not in skipped)
    if not left:
        raise BadInputError("skip_prompts names every prompt: leave at least one.")
    return left


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """A hash of the prompts, with which a resumed run checks that they are the same. Images count by their content,
    wherever they are."""
    images = {prompt.id: _content(prompt.image) for prompt in prompts if prompt.image}
    return hashlib.sha256((repr(tuple(prompts)) + (repr(images) if images else "")).encode()).hexdigest()


def _content(file: str) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _from_json(where: str, number: int, text: str, folder: Path) -> Prompt:
    try:
        row = parse_json(text)
    except ValueError as error:
        said = str(error).replace(" at line 1", " at")
        raise BadInputError(f'{where}: not JSON ({said}). Write one object a line: {{"prompt": "..."}}') from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise BadInputError(f'{where}: there is no "prompt". Write one object a line: {{"prompt": "..."}}')
    _refuse_unknown(where, row, _PROMPT_KEYS)
    files = {key: row.get(key) for key in _FILES}
    for key, file in files.items():
        if file is not None and not (isinstance(file, str) and os.path.isfile(folder / file)):
            raise BadInputError(f"{where}: {key} {shown(file)} does not exist (paths are relative to the prompt file).")
    questions = row.get("questions", [])
    if not isinstance(questions, list):
        raise BadInputError(f"{where}: questions is to be a list of objects.")
    name = row.get("id", f"{number:04d}")
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise BadInputError(f"{where}: id {shown(name)} is to be a text or a whole number.")
    return Prompt(
        id=str(name),
        text=row["prompt"].strip(),
        questions=tuple(parse_question(f"{where}: question {n}", item) for n, item in enumerate(questions, 1)),
        **{key: None if file is None else str(folder / file) for key, file in files.items()},
    )


def _refuse_unknown(where: str, row: dict[str, Any], keys: set[str]) -> None:
    if unknown := sorted(set(row) - keys):
        raise BadInputError(
            f"{where}: unknown key {shown(unknown[0])}. Take it out, or use one of: {', '.join(sorted(keys))}"
        )


def parse_question(where: str, item: Any) -> Question:
    """A question of a prompt file, a questions file or a writer. Raises BadInputError that starts with ``where``."""
    if not isinstance(item, dict):
        raise BadInputError(f"{where}: is to be an object with {', '.join(sorted(_QUESTION_KEYS))}.")
    _refuse_unknown(where, item, _QUESTION_KEYS)
    kind = item.get("kind", "yesno")
    choices = {"aspect": get_args(Aspect), "kind": get_args(Kind), "answer": ("yes", "no") if kind == "yesno" else ()}
    for key, allowed in choices.items():
        value = kind if key == "kind" else item.get(key)
        if allowed and value not in allowed:
            raise BadInputError(f"{where}: {key} {shown(value)} is to be one of {', '.join(allowed)}.")
    for key in ("text", "answer"):
        if not isinstance(item.get(key), str) or not item[key].strip():
            raise BadInputError(f'{where}: there is no "{key}". Add one, as a text.')
    weight = item.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not (weight == 0 or 1e-6 <= weight <= 1e6):
        raise BadInputError(f"{where}: weight {shown(weight)} is to be 0, or a number from 1e-6 to 1e6.")
    name = item.get("name", "")
    if not isinstance(name, str):
        raise BadInputError(f"{where}: name {shown(name)} is to be a text.")
    return Question(item["aspect"], item["text"], item["answer"], kind, float(weight), name)


@dataclass(frozen=True, slots=True)
class Cursor:
    """Position of a stream: the next prompt is number ``index`` of pass ``epoch``."""

    epoch: int = 0
    index: int = 0


class PromptStream:
    """Endless passes over the prompts, each shuffled by (seed, epoch), so that a cursor restores the position. Prompts
    with an id in ``skipped``, which must leave some, are passed over; the order of the others is the same."""

    def __init__(
        self, prompts: Sequence[Prompt], seed: int, cursor: Cursor | None = None, skipped: Collection[str] = ()
    ) -> None:
        self._prompts = tuple(prompts)
        self._seed = seed
        self._skipped = frozenset(skipped)
        self.cursor = cursor or Cursor()

    def take(self, count: int) -> tuple[Prompt, ...]:
        """The next ``count`` prompts; advances the cursor."""
        taken: list[Prompt] = []
        epoch, index = self.cursor.epoch, self.cursor.index
        order = self._order(epoch)
        while len(taken) < count:
            prompt = self._prompts[order[index]]
            taken += [] if prompt.id in self._skipped else [prompt]
            index += 1
            if index == len(order):
                epoch, index = epoch + 1, 0
                order = self._order(epoch)
        self.cursor = Cursor(epoch, index)
        return tuple(taken)

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self._prompts)))
        random.Random(f"{self._seed}/{epoch}").shuffle(order)
        return order
