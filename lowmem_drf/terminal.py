"""Progress of long work: a bar with an ETA on a terminal, plain lines in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_WORK_EVERY_S = 20.0

Item = TypeVar("Item")


def counted(console: Console, what: str, items: Sequence[Item]) -> Iterator[Item]:
    """Yields the items, with a ``work_bar`` if there are any."""
    if items:
        with work_bar(console, what, len(items)) as advance:
            for item in items:
                yield item
                advance(1)


@contextmanager
def work_bar(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function that advances a bar on a terminal, or elsewhere prints a line every
    ``PLAIN_WORK_EVERY_S``."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    done, start = 0, time.monotonic()
    last_line = start
    plain, piped = not console.is_terminal, not sys.stdout.isatty()
    # with the bar on stderr and stdout piped, rich must not redirect prints to the terminal
    with Progress(*columns, console=console, transient=True, disable=plain, redirect_stdout=not piped) as bar:
        task = bar.add_task(what, total=total)

        def advance(count: int) -> None:
            nonlocal done, last_line
            done += count
            bar.advance(task, count)
            now = time.monotonic()
            if plain and done < total and now - last_line > PLAIN_WORK_EVERY_S:
                last_line = now
                eta = clock((now - start) / done * (total - done))
                console.print(f"{what} {done}/{total}  ETA {eta}", highlight=False, markup=False)

        yield advance


def clock(seconds: float) -> str:
    """75 -> 1:15; 3700 -> 1:01:40."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
