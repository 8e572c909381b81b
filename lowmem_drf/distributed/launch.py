"""``train --num-processes N``: starts the processes of a run on this machine, and ends with them.

Imports the standard library only: it is up before torch would be loaded. What torchrun does beyond this (several
machines, restarts) is left to torchrun.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

POLL_S = 0.05
LEAVE_S = 10.0
"""So long the others may take to end by themselves when one has ended badly: ``watch`` ends them, and prints why."""
TERM_S = 5.0
"""Between SIGTERM and SIGKILL."""
LAST_LINES = 20
PR_SET_PDEATHSIG = 1
"""prctl(2)."""
REPORTS = "Error: rank "
"""How ``watch`` begins when it speaks in place of rank 0."""


@dataclass
class Child:
    """A process of the run."""

    rank: int
    process: subprocess.Popen[bytes]
    errors: IO[bytes] | None
    """What it writes to stderr; rank 0 writes to the terminal."""
    pushed: bool = False
    """It was made to end: how it ended says nothing."""


def launch(count: int, arguments: Sequence[str], program: Sequence[str] = (sys.executable, "-m", "lowmem_drf")) -> int:
    """Runs ``program`` with ``arguments`` in ``count`` processes, each knowing its rank from the environment as
    torchrun sets it (``ranks.join`` reads it).

    Rank 0 has the terminal. Of the others nothing is seen, but the last lines of one that ended badly where rank 0 has
    not said why. SIGINT and SIGTERM reach each process once; the processes do not outlive this one, however it ends.

    Returns: The exit code: 0 if all ended well, else that of rank 0, else that of the first that ended badly. A process
        killed by a signal counts as 1, and as 130 where this one was signalled too.
    """
    children: list[Child] = []
    with _signals() as got:
        try:
            port = _free_port()
            for rank in range(count):
                children.append(_start(rank, count, port, [*program, *arguments]))
            bad = _wait(children, got)
        finally:
            for child in children:
                if child.process.poll() is None:
                    child.process.kill()
                    child.process.wait()
    culprit = next((child for child in sorted(bad, key=lambda child: child.rank != 0) if not child.pushed), None)
    if culprit is None:
        return _code(bad[0].process.returncode, bool(got)) if bad else 0
    if not got and not (culprit.rank == 0 and culprit.process.returncode > 0):  # else rank 0 has said why
        sys.stderr.write(_last_words(culprit, bad))
    return _code(culprit.process.returncode, bool(got))


def _start(rank: int, count: int, port: int, command: list[str]) -> Child:
    env = dict(os.environ, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env.setdefault("OMP_NUM_THREADS", str(max(_cores() // count, 1)))
    errors = tempfile.TemporaryFile() if rank else None  # noqa: SIM115 - open as long as the child
    nothing = subprocess.DEVNULL if rank else None
    # a session of its own: Ctrl-C on the terminal reaches this process only, which hands it on
    process = subprocess.Popen(
        command,
        env=env,
        stdin=nothing,
        stdout=nothing,
        stderr=errors,
        start_new_session=True,
        preexec_fn=_dies_with_parent(),
    )
    return Child(rank, process, errors)


def _dies_with_parent() -> Callable[[], None] | None:
    if not sys.platform.startswith("linux"):
        return None
    prctl, parent = ctypes.CDLL(None, use_errno=True).prctl, os.getpid()

    def in_child() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was faster
            os._exit(1)

    return in_child


def _wait(children: Sequence[Child], got: Sequence[int]) -> list[Child]:
    """Returns those that ended badly, in the order in which they did."""
    bad: list[Child] = []
    living, forwarded, push_at, push = list(children), 0, float("inf"), signal.SIGTERM
    while living:
        for number in got[forwarded:]:
            _send(living, number)
            forwarded += 1
        ended = [child for child in living if child.process.poll() is not None]
        bad += [child for child in ended if child.process.returncode]
        living = [child for child in living if child not in ended]
        now = time.monotonic()
        if push_at == float("inf") and (bad or forwarded > 1):
            push_at = now + LEAVE_S
        if now > push_at:
            for child in living:
                child.pushed = True
            _send(living, push)
            push, push_at = signal.SIGKILL, now + TERM_S
        time.sleep(POLL_S)
    return bad


def _send(children: Sequence[Child], number: int) -> None:
    for child in children:
        child.process.send_signal(number)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Within the block SIGINT and SIGTERM only fill the list."""
    got: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: got.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield got
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _last_words(culprit: Child, bad: Sequence[Child]) -> str:
    """Why the run ended, where rank 0 has not said it."""
    words = {child.rank: _tail(child) for child in bad}
    for _, lines in sorted(words.items()):
        reports = [number for number, line in enumerate(lines) if line.startswith(REPORTS)]
        if reports:
            return "\n".join(lines[reports[-1] :]) + "\n"
    code = culprit.process.returncode
    how = (
        f"ended with exit code {code}"
        if code > 0
        else f"was killed by {signal.Signals(-code).name} (out of host memory? see dmesg)"
    )
    return "\n".join([f"Error: rank {culprit.rank} {how}. The run was stopped.", *words[culprit.rank]]) + "\n"


def _tail(child: Child) -> list[str]:
    if child.errors is None:
        return []
    child.errors.seek(0)
    return child.errors.read().decode(errors="replace").splitlines()[-LAST_LINES:]


def _code(code: int, interrupted: bool) -> int:
    if code < 0:
        return 130 if interrupted else 1
    return code


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port
