"""Reads a run's folder for its report. Whatever is missing or damaged is left out and named: an interrupted run, and
one of an earlier version, has a report too."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem_drf.assembly.check import LEFT_OUT
from lowmem_drf.config import load_config
from lowmem_drf.errors import BadInputError
from lowmem_drf.questions.file import load_questions
from lowmem_drf.reporting.notes import NOTES, RESULT, read_notes
from lowmem_drf.schema import Config
from lowmem_drf.scoring.alarm import BEST, FILE
from lowmem_drf.texts import one_line, parse_json, read_text
from lowmem_drf.training.metrics import read_metrics
from lowmem_drf.types import Question

LARGEST = 1e30
"""Of a number. Axes have no room for more; NaN is no number either."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Record:
    """A run, as far as its folder tells."""

    run: Path
    config: Config
    updates: Sequence[Row]
    """Lines of ``metrics.jsonl`` with a finite reward."""
    skipped: Sequence[Row]
    """Those of updates that changed nothing."""
    watch: Sequence[Row]
    """Lines of ``watch.jsonl``; the first is the base's."""
    questions: Mapping[str, tuple[Question, ...]]
    """By prompt."""
    left_out: Sequence[Row] | None
    """Prompts with the questions that the check left out or gave less weight. None: the run did not check any."""
    notes: Row
    result: Row
    """``eval.json``. Empty: base and tuned were not compared."""
    best: int | None
    """The update of the checkpoint that the watch marked as the best."""
    problems: Sequence[str]
    """What could not be read, in words."""

    @property
    def done(self) -> int:
        return max((row["step"] for row in (*self.updates, *self.skipped)), default=0)

    @property
    def alarm(self) -> int | None:
        """The update at which the last alarm began."""
        spoken = (number(row.get("alarm")) for row in self.watch)
        return next((int(step) for step in reversed(list(spoken)) if step is not None), None)

    @property
    def alarmed(self) -> bool:
        """Whether the alarm lasts to the end."""
        return bool(self.watch) and number(self.watch[-1].get("alarm")) is not None

    @property
    def plan(self) -> Row:
        return as_row(self.notes.get("plan"))


def read_record(run: Path) -> Record:
    """Reads a run. Raises BadInputError if its ``config.toml`` cannot be read."""
    config, problems = load_config(run / "config.toml"), list[str]()
    rows = [row for row in read_metrics(run) if _step(row)] if (run / "metrics.jsonl").is_file() else []
    questions: Mapping[str, tuple[Question, ...]] = {}
    left_out: list[Row] | None = None
    try:
        questions = load_questions(run / "questions.json") if (run / "questions.json").is_file() else {}
    except BadInputError as error:
        problems.append(f"The questions cannot be read: {one_line(str(error), 200)}")
    try:
        if (run / LEFT_OUT).is_file():
            left_out = [as_row(row) for row in parse_json(read_text(run / LEFT_OUT, LEFT_OUT))]
    except (BadInputError, ValueError, TypeError):
        problems.append(f"{LEFT_OUT} cannot be read.")
    return Record(
        run,
        config,
        [row for row in rows if number(row.get("reward")) is not None],
        [row for row in rows if "skipped" in row],
        list(_lines(run / FILE)),
        questions,
        left_out,
        read_notes(run / NOTES),
        read_notes(run / RESULT),
        _best(run / BEST),
        problems,
    )


def number(value: object) -> float | None:
    """A number that can be drawn, or None."""
    if isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST < value < LARGEST:
        return float(value)
    return None


def outside(row: Row) -> list[str]:
    """Names of the measures that a line of ``watch.jsonl`` says are outside of their band."""
    found = row.get("outside")
    return [str(name) for name in found] if isinstance(found, list) else []


def as_row(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def curve(rows: Iterable[Row], *keys: str) -> tuple[list[int], list[float]]:
    """(updates, values) of one entry of the rows: ``curve(rows, "reward_by_aspect", "TA")``."""
    points = [(row["step"], value) for row in rows if (value := number(_entry(row, keys))) is not None]
    return [step for step, _ in points], [value for _, value in points]


def names(rows: Iterable[Row], key: str) -> list[str]:
    """The names below an entry of the rows, in the order in which they come."""
    return list(dict.fromkeys(name for row in rows for name in as_row(row.get(key))))


def _entry(row: Row, keys: Sequence[str]) -> object:
    value: object = row
    for key in keys:
        value = as_row(value).get(key)
    return value


def _step(row: Row) -> bool:
    """Whether it is of an update."""
    step = row.get("step")
    return isinstance(step, int) and 0 <= step < 2**53


def _lines(path: Path) -> Iterable[Row]:
    """Rows with a step, ascending. Damaged ones, such as a last one that a killed process left unfinished, are passed
    over; of two with one step, the later one counts."""
    rows: dict[int, Row] = {}
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        with suppress(ValueError, RecursionError):
            row = as_row(json.loads(line))
            if _step(row):
                rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def _best(path: Path) -> int | None:
    """``checkpoints/best``: a link to a checkpoint's folder, or a text that names its update."""
    with suppress(OSError, ValueError):
        text = path.resolve().name if path.is_dir() else path.read_text("utf-8")
        if found := re.search(r"\d+", text):
            return int(found[0])
    return None
