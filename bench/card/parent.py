"""Runs sections one after another, each in a process of its own with its own limit, and goes on after a failure."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from bench.card.sections import Section
from lowmem_drf.files import write_text

Outcome = Literal["done", "failed", "limit", "cut", "not started"]
"""``limit``: it took longer than its own limit. ``cut``: then the minutes were over; ``not started``: before it."""

LEAST_S = 5.0
"""With less time left than this no section begins: Python and torch take as long to start."""
Command = Callable[[Section, Path], Sequence[str]]
"""The command of a section, which writes its rows to the path."""


@dataclass
class Result:
    """What came of a section."""

    name: str
    outcome: Outcome
    seconds: float = 0.0
    reason: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return self.outcome == "done" and all(row["state"] not in ("wrong", "failed") for row in self.rows)


def run_all(
    sections: Sequence[Section], minutes: float, folder: Path, command: Command, about: Mapping[str, Any] | None = None
) -> Iterator[Result]:
    """A result for every section, as they end. Output of a section goes to ``NAME.log`` in the folder, its rows to
    ``NAME.json``; ``results.json`` has what the run is ``about``, and all sections that ended."""
    folder.mkdir(parents=True, exist_ok=True)
    end, results = time.monotonic() + 60 * minutes, []
    for section in sections:
        left = end - time.monotonic()
        if left < LEAST_S:
            result = Result(section.name, "not started", reason=f"{max(left, 0):.0f} s were left")
        else:
            result = _run(section, left, folder, command)
        results.append(result)
        whole = {**(about or {}), "sections": [asdict(one) for one in results]}
        write_text(folder / "results.json", json.dumps(whole, indent=2) + "\n")
        yield result


def _run(section: Section, left: float, folder: Path, command: Command) -> Result:
    rows, log = folder / f"{section.name}.json", folder / f"{section.name}.log"
    rows.unlink(missing_ok=True)
    started, limit = time.monotonic(), min(section.limit_s, left)
    outcome: Outcome = "done"
    reason = ""
    with log.open("w", encoding="utf-8") as output:
        # a session of its own, so that its children end with it
        child = subprocess.Popen(
            command(section, rows), stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            if code := child.wait(timeout=limit):
                outcome, reason = "failed", f"exit code {code}: {_reason(log)}"
        except subprocess.TimeoutExpired:
            outcome = "limit" if limit == section.limit_s else "cut"
            reason = f"stopped after {limit:.0f} s" + (", when the minutes were over" if outcome == "cut" else "")
        finally:
            _end(child)
    found = Result(section.name, outcome, time.monotonic() - started, reason)
    try:
        found.rows = json.loads(rows.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError):
        if outcome == "done":
            found.outcome, found.reason = "failed", "it wrote no rows"
    return found


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ends the section and what it started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):  # all of it has ended
            os.killpg(child.pid, signal.SIGKILL)
    elif child.poll() is None:
        child.kill()
    child.wait()


def _reason(log: Path) -> str:
    """The first error that a command of ours reported, else the last line, where Python writes what was raised."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    reported = (line for line in lines if line.startswith("Error: "))
    return next(reported, lines[-1] if lines else "it said nothing")[:200]
