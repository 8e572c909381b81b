"""``python -m bench.bad_inputs``."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from bench.bad_inputs.files import make_files
from bench.bad_inputs.refusals import faults, run
from bench.bad_inputs.rows import BRACKETS, DIGITS, LONG, OTHERS, ROWS


def _short(command: str) -> str:
    for long in (LONG, DIGITS, BRACKETS):
        command = command.replace(long, f"{long[0]}…{long[0]}")
    return command


def main(arguments: list[str] | None = None) -> int:
    """Prints a line a row; given words choose the rows that contain all of them."""
    words = sys.argv[1:] if arguments is None else arguments
    os.environ |= {"HF_HUB_OFFLINE": "1", "COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    from lowmem_drf.cli import main as cli
    from lowmem_drf.training.run_lock import locked

    rows = [(command, 2, cure) for command, cure in ROWS] + list(OTHERS)
    rows = [row for row in rows if all(word in row[0] for word in words)]
    wrong, start, before = 0, time.perf_counter(), Path.cwd()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        os.chdir(folder)
        try:
            make_files()
            stack.enter_context(locked(Path("run-locked"), print))
            for command, wanted, cure in rows:
                began = time.perf_counter()
                there = set(os.listdir())
                code, text = run(cli, shlex.split(command))
                found, seconds = faults(code, text, cure, wanted), time.perf_counter() - began
                found += [f"left {name}" for name in set(os.listdir()) - there]
                wrong += bool(found)
                lines = [line for line in text.splitlines() if line.strip()]
                verdict = f"WRONG ({', '.join(found)})" if found else "ok"
                print(
                    f"{verdict}: lowmem-drf {_short(command)}\n    exit code {code}, {len(lines)} lines, "
                    f"{seconds:.1f} s: {' / '.join(lines)[:300]}",
                    flush=True,
                )
        finally:
            os.chdir(before)
    seconds = time.perf_counter() - start
    print(f"{len(rows) - wrong} of {len(rows)} bad inputs were refused as they should be, in {seconds:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
