"""A process of a run that fails or dies ends the run: within seconds, with one message, under any launcher.

Without it the others wait in a collective for hours. Their main threads cannot be asked (they are inside NCCL or gloo,
and never come back), so a thread of each process listens to rank 0, that of rank 0 to all, and ends the process where
it is (``os._exit``). What is saved is good: checkpoints are written aside and renamed.

Who says what: a process that fails tells rank 0 why, rank 0 tells the others to go and prints. One that says nothing
was killed: rank 0 prints that; if it was rank 0, the first of the others.
"""

from __future__ import annotations

import os
import select
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from lowmem_drf.distributed.links import Link, Message, connect
from lowmem_drf.distributed.ranks import Ranks
from lowmem_drf.errors import DEBUG, explain

SETTLE_S = 5.0
"""A RuntimeError may be what a collective says when another process is gone: so long the true cause may take to be
known. (A KeyboardInterrupt may be the launcher's doing, for that cause: ``2 * SIGNAL_S``.)"""
SAME_S = 0.5
"""What fails in another process often fails in rank 0 too, which then says it as if it were alone."""
INTERRUPT_S = 30.0
"""An interrupted process ends when the update is saved: so long rank 0, which saves, may take after the first that has
ended."""
ANSWER_S = INTERRUPT_S + 5.0
SIGNAL_S = 0.3
"""A signal to all processes reaches one after the other."""
STOP_S = 2.0
"""So long the main thread has to end by itself at a second signal."""
TURN_S = 0.02
"""Where several may speak in rank 0's place, each leaves it so long to the one before, and the one that speaks keeps
the others off for ``HOLD_S``."""
HOLD_S = 0.5
FLUSH_S = 0.5


@contextmanager
def watch(ranks: Ranks, advice: Callable[[], str]) -> Iterator[Watch]:
    """Around everything in which processes wait for each other. Entering is a collective; leaving is not: whoever is
    done goes, and nobody is alarmed.

    An exception that leaves the block on rank 0 is raised as usual; on other ranks it ends the process, and rank 0
    prints it. The exit code is that of ``errors.explain``, the same everywhere; 1 after a death without a word; 130
    after a second Ctrl-C.

    Args: advice: the end of the message, for example how to go on from what is saved. Called when it is needed, in
        another thread.

    Raises:
        LowmemError: the processes do not reach each other.
    """
    guard = Watch(ranks, advice)
    try:
        yield guard
    except BaseException as error:
        guard.fail(error)
        raise
    guard.done()


class Watch:
    """What ``watch`` yields."""

    def __init__(self, ranks: Ranks, advice: Callable[[], str]) -> None:
        self._ranks, self._advice = ranks, advice
        # who takes it, the main thread or the listening one, decides how this process ends; it is never released
        self._first = threading.Lock()
        self._ending = threading.Event()  # the listening one took it
        self._heard = threading.Event()  # rank 0 knows that the main thread took it
        self._left = False
        self._signals = 0
        # another process failed, or a second signal came: when to end, exit code, text
        self._told: tuple[float, int, str] | None = None
        self._place: socket.socket | None = None
        self._links: dict[int, Link] = {}
        if ranks.count > 1:
            self._links, self._token = connect(ranks)
            # signals ring, also while the main thread is in a collective and runs no handler
            self._alarm, self._bell = socket.socketpair()
            self._bell.setblocking(False)
            self._bell_before = signal.set_wakeup_fd(self._bell.fileno(), warn_on_full_buffer=False)
            # torchrun ends the others with it as soon as one is dead: before they could say why
            self._sigterm_before = signal.signal(signal.SIGTERM, signal.default_int_handler)
            threading.Thread(target=self._listen, name="watch", daemon=True).start()

    # the main thread

    def fail_now(self, error: BaseException) -> NoReturn:
        """Ends the run with ``error`` here, where raising it would enter a collective on its way out. Alone, raises
        it."""
        if self._ranks.count == 1:
            raise error
        self.fail(error)
        message, code = explain(error)
        self._exit(code, _traceback(error) + self._text(message, code, self._ranks.rank or None))

    def fail(self, error: BaseException) -> None:
        """Tells the others. Returns where this process is to say itself what happened."""
        if self._ranks.count == 1:
            return
        _wait(self._ending, _settling(error))
        self._take_over()
        message, code = explain(error)
        if self._ranks.chief:
            self._tell(say="stop", code=code)
        elif self._links:
            self._tell(say="failed", code=code, message=message, traceback=_traceback(error))
            # a launcher that sees a process end stops the others: not before rank 0 has spoken
            _wait(self._heard, ANSWER_S)
            self._exit(code)
        self._close()

    def done(self) -> None:
        """Says goodbye."""
        if self._ranks.count > 1:
            self._take_over()
            self._tell(say="bye")
            self._close()

    def _take_over(self) -> None:
        """Returns where the main thread is the first to decide; else the listening thread ends the process any
        moment."""
        while not self._first.acquire(blocking=False):
            with suppress(KeyboardInterrupt):
                time.sleep(60)

    def _close(self) -> None:
        signal.set_wakeup_fd(self._bell_before)
        signal.signal(signal.SIGTERM, self._sigterm_before or signal.SIG_DFL)
        self._bell.send(b"\0")

    # the listening thread

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._alarm, selectors.EVENT_READ, None)
            for rank, link in self._links.items():
                selector.register(link.connection, selectors.EVENT_READ, rank)
            while not self._left:
                ready = [
                    key
                    for key, _ in selector.select(
                        None if self._told is None else max(self._told[0] - time.monotonic(), 0)
                    )
                ]
                if any(key.data is None for key in ready):
                    self._rung()
                elif self._told is not None and time.monotonic() >= self._told[0]:
                    self._end_as_told(self._told)
                else:
                    for key in ready:
                        selector.unregister(key.fileobj)  # nobody says two things
                        self._hear(key.data)
        for link in self._links.values():
            link.close()
        self._alarm.close()
        self._bell.close()

    def _rung(self) -> None:
        numbers = self._alarm.recv(256)
        self._signals += sum(number in (signal.SIGINT, signal.SIGTERM) for number in numbers)
        self._left = 0 in numbers
        if self._signals >= 2:  # the main thread stops at once if it can, and says so
            self._told = (
                time.monotonic() + STOP_S,
                130,
                f"Interrupted. {self._safe_advice()}\n" if self._ranks.chief else "",
            )

    def _hear(self, rank: int) -> None:
        try:
            self._obey(rank, self._links[rank].receive())
        except (OSError, EOFError):
            self._died(rank)

    def _obey(self, rank: int, message: Message) -> None:
        if message["say"] == "bye":
            self._links.pop(rank).close()
            self._heard.set()
        elif message["say"] == "stop":
            self._end(message["code"])
        elif self._told is None:
            code = message["code"]
            wait = INTERRUPT_S if code == 130 else SAME_S
            self._told = (
                time.monotonic() + wait,
                code,
                message["traceback"] + self._text(message["message"], code, rank),
            )

    def _died(self, rank: int) -> None:
        """There was no goodbye of ``rank``."""
        if self._told is None and self._signals == 1 and select.select([self._alarm], [], [], SIGNAL_S)[0]:
            self._rung()
        if self._told is not None:  # that is why; of an interruption the main thread may still save something
            return self._end_as_told(self._told) if self._told[1] != 130 else None
        cause = f"rank {rank} died without a word (killed, or out of host memory: see dmesg). The run was stopped."
        self._end(1, lambda: self._text(cause, 1) if self._ranks.chief or self._speaks() else "")

    def _end_as_told(self, told: tuple[float, int, str]) -> None:
        self._end(told[1], lambda: told[2])

    def _speaks(self) -> bool:
        """Whether this is the first process on its machine that speaks in place of rank 0. The name is free again when
        the process has ended."""
        time.sleep(TURN_S * (self._ranks.rank - 1))
        place = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        with suppress(OSError):
            place.bind(f"\0lowmem-drf-{self._token}")
            self._place = place
        return self._place is not None

    def _end(self, code: int, text: Callable[[], str] = str) -> None:
        """Ends the process, if its main thread is not about to."""
        if not self._first.acquire(blocking=False):
            self._heard.set()
            return
        self._ending.set()
        self._tell(say="stop", code=code)
        self._exit(code, text())

    # both

    def _tell(self, **message: object) -> None:
        for link in list(self._links.values()):
            link.send(**message)

    def _text(self, message: str, code: int, rank: int | None = None) -> str:
        if code == 130:  # no failure: the message says all
            return f"{message}\n"
        return f"Error: {'' if rank is None else f'rank {rank}: '}{message}\n{self._safe_advice()}".rstrip() + "\n"

    def _safe_advice(self) -> str:
        """Or nothing: a folder that cannot be read, for example, must not hide the message."""
        with suppress(Exception):
            return self._advice()
        return ""

    def _exit(self, code: int, text: str = "") -> NoReturn:
        """At once: nothing is unwound, nothing that waits for another process is entered."""
        # the interrupted code may hold the locks of the streams
        flushing = threading.Thread(target=_flush, daemon=True)
        flushing.start()
        flushing.join(FLUSH_S)
        with suppress(OSError):
            if (self._ranks.chief or text) and os.isatty(2):
                # the progress bar hides the cursor, and its last line is open
                text = f"\x1b[?25h{text and chr(10)}{text}"
            os.write(2, text.encode(errors="backslashreplace"))
        if self._place is not None:
            time.sleep(HOLD_S)
        os._exit(code)


def _wait(event: threading.Event, seconds: float) -> None:
    """Whatever signals come meanwhile."""
    until = time.monotonic() + seconds
    while not event.is_set() and time.monotonic() < until:
        with suppress(KeyboardInterrupt):
            event.wait(until - time.monotonic())


def _settling(error: BaseException) -> float:
    """Seconds in which another cause of ``error`` may become known."""
    if isinstance(error, KeyboardInterrupt):
        return 2 * SIGNAL_S
    return SETTLE_S if isinstance(error, RuntimeError) and type(error).__name__ != "OutOfMemoryError" else 0.0


def _traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)) if DEBUG in sys.argv else ""


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
