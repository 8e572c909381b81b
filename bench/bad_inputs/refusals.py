"""Runs a command, and says what is wrong with its refusal."""

from __future__ import annotations

import io
import signal
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout

MOST_LINES = 6
MOST_S = 20


def run(main: object, arguments: Sequence[str], most_s: int = MOST_S) -> tuple[int, str]:
    """(exit code, what was printed on stderr, or on stdout if nothing was). ``most_s``: 0: as long as it takes."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    before = signal.signal(signal.SIGALRM, _too_slow)
    with redirect_stdout(out), redirect_stderr(err):
        try:
            signal.alarm(most_s)
            main(list(arguments))  # type: ignore[operator]
        except SystemExit as error:
            code = error.code
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
    return code if isinstance(code, int) else 0 if code is None else 1, err.getvalue() or out.getvalue()


def _too_slow(number: int, frame: object) -> None:
    raise TimeoutError(f"nothing was said within {MOST_S} s")


def faults(code: int, text: str, cure: str, wanted: int = 2) -> list[str]:
    """What is wrong with a refusal."""
    lines = [line for line in text.splitlines() if line.strip()]
    found = {
        f"exit code {code}": code != wanted,
        f"{len(lines)} lines": len(lines) > MOST_LINES,
        "a traceback": "Traceback" in text,
        "unexpected": "Error: unexpected" in text,
        f"no {cure!r}": cure not in " ".join(text.split()),
    }
    return [fault for fault, there in found.items() if there]
