"""What reaches the terminal or the log: streams whose failures stop nothing, text without control characters, and
progress of long work (a bar with an ETA on a terminal, plain lines in a log file)."""

from __future__ import annotations

import codecs
import errno
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_WORK_FIRST_S, PLAIN_WORK_EVERY_S = 4.0, 20.0
"""Where nothing is redrawn, work says how far it is after so many seconds, and then every so many."""
NARROW = 60
"""Columns. Up to this width tables are wrapped by the terminal, and nothing is redrawn."""
_CONTROLS = {code: "?" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}

Item = TypeVar("Item")


class QuietStream:
    """A standard stream that drops what it cannot write: the reader of a pipe is gone, the disk behind a log is full,
    the terminal was closed. Once it can write again, it does."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self.lost: Exception | None = None
        """Why text was dropped, if any was."""

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            self.lost = error
            return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self.lost = error

    def give_up(self) -> None:
        """Last flush. What cannot be written is sent to nowhere: at its end the interpreter would flush once more, and
        report the failure."""
        self.flush()
        if self.lost:
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def quiet_streams() -> Iterator[None]:
    """Inside the block no failure to print is raised (``QuietStream``), and characters that the terminal's encoding
    lacks are written as JSON's escapes, so that JSON stays JSON."""
    _open_standard_handles()
    codecs.register_error("json_escapes", _escaped)
    before = sys.stdout, sys.stderr
    streams = [QuietStream(stream or open(os.devnull, "w", encoding="utf-8")) for stream in before]  # noqa: SIM115
    for stream in streams:
        with suppress(AttributeError, OSError, ValueError):  # not a text file (a notebook's), or one that cannot flush
            stream.reconfigure(errors="json_escapes")
    sys.stdout, sys.stderr = cast("list[Any]", streams)
    try:
        yield
    finally:
        for stream in streams:
            stream.give_up()
        sys.stdout, sys.stderr = before


def lost_output() -> str:
    """Why text to stdout was lost, in words; "" if none was, or if its reader did not want more of it."""
    sys.stdout.flush()
    error = getattr(sys.stdout, "lost", None)
    return "" if error is None or getattr(error, "errno", None) in (errno.EPIPE, errno.EIO) else str(error)


def printable(text: str) -> str:
    """The text without control characters: those of a prompt or a file's name must not command the terminal."""
    return text.translate(_CONTROLS)


def make_console(**settings: Any) -> Console:
    """A rich console that prints no control characters but its own, and leaves it to a narrow terminal to wrap tables,
    which rich would shorten until no figure can be read. Inside ``called_with``: that console."""
    if (caller := _caller.get()) is not None and not settings.get("quiet"):
        return caller
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class PrintableConsole(Console):
        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else Segment(printable(segment.text), segment.style)

    made = PrintableConsole(**settings)
    made.width = max(made.width, NARROW)
    return made


def can_redraw(console: Console) -> bool:
    """Whether lines can be drawn again in place: on a terminal that knows how to move its cursor, and is so wide that
    they are not wrapped."""
    return console.is_terminal and not console.is_dumb_terminal and console.width > NARROW


def hangup() -> list[signal.Signals]:
    """SIGHUP, which a closed session sends, or Windows' SIGBREAK (Ctrl-Break), unless ``nohup`` has it ignored."""
    numbers = [getattr(signal, name) for name in ("SIGHUP", "SIGBREAK") if hasattr(signal, name)]
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


def say(text: str) -> None:
    """Prints a line for the user who waits: on stderr, or on the console of ``called_with``."""
    if (console := _caller.get()) is not None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    else:
        print(printable(text), file=sys.stderr, flush=True)


_caller: ContextVar[Console | None] = ContextVar("caller", default=None)


@contextmanager
def called_with(console: Console) -> Iterator[None]:
    """Around a call of the Python API: all that is printed goes to this console, and if it is quiet nowhere."""
    token = _caller.set(console)
    try:
        yield
    finally:
        _caller.reset(token)


def is_called() -> bool:
    """Whether a Python program called (``called_with``). Its process goes on when a run has ended."""
    return _caller.get() is not None


def write_error(text: str) -> None:
    """Writes a line to stderr from a signal handler: past ``sys.stderr`` and rich, because the interrupted code may
    hold their locks."""
    if (console := _caller.get()) is not None and console.quiet:
        return
    with suppress(OSError, ValueError, AttributeError):  # AttributeError: there is no stderr
        os.write(sys.stderr.fileno(), f"{text}\n".encode(errors="replace"))


def counted(console: Console, what: str, items: Sequence[Item]) -> Iterator[Item]:
    """Yields the items, with a ``work_bar`` if there are any."""
    if items:
        with work_bar(console, what, len(items)) as advance:
            for item in items:
                yield item
                advance(1)


@contextmanager
def work_bar(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function that advances a bar on a terminal, or elsewhere prints a line now and then
    (``PLAIN_WORK_EVERY_S``), also while one step takes long."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    done, start, ended = 0, time.monotonic(), threading.Event()
    plain, piped = not can_redraw(console), not (sys.stdout and sys.stdout.isatty())

    def say_now_and_then() -> None:
        wait = PLAIN_WORK_FIRST_S
        while not ended.wait(wait) and done < total:
            wait = PLAIN_WORK_EVERY_S
            eta = f"  ETA {clock((time.monotonic() - start) / done * (total - done))}" if done else ""
            console.print(f"{what} {done}/{total}{eta}", highlight=False, markup=False)

    # with the bar on stderr and stdout piped, rich must not redirect prints to the terminal
    bar = Progress(*columns, console=console, transient=True, disable=plain, redirect_stdout=not piped)
    with _watching(), bar:  # one display at a time
        task = bar.add_task(what, total=total)

        def advance(count: int) -> None:
            nonlocal done
            done += count
            bar.advance(task, count)

        if plain and not console.quiet:
            with suppress(RuntimeError):  # no thread can be started where memory is short: work goes on without lines
                threading.Thread(target=say_now_and_then, daemon=True).start()
        try:
            yield advance
        finally:
            ended.set()


_watched: list[Console] = []
"""The console of ``showing``; none inside of a bar."""


@contextmanager
def showing(console: Console) -> Iterator[None]:
    """Inside the block ``working`` shows on this console what goes on below, where nobody knows of consoles."""
    with _watching(console):
        yield


@contextmanager
def _watching(*consoles: Console) -> Iterator[None]:
    before, _watched[:] = _watched[:], consoles
    try:
        yield
    finally:
        _watched[:] = before


@contextmanager
def working(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A ``work_bar`` on the console of ``showing``. Without one, and inside of another bar, it shows nothing."""
    if not _watched or _watched[-1].quiet:
        yield lambda count: None
        return
    with work_bar(_watched[-1], what, total) as advance:
        yield advance


def clock(seconds: float) -> str:
    """75 -> 1:15; 3700 -> 1:01:40."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _open_standard_handles() -> None:
    """Opens nowhere in place of standard handles that are closed (``>&-``). The next file opened would get the number,
    and what libraries print would land in it."""
    for handle in range(3):
        try:
            os.fstat(handle)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """Handler of encoding errors: ``\\u00e9``."""
    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end
