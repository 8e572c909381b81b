"""``train --num-processes N``: starts the processes of a run on this machine and waits for them.

Torch's ``SubprocessContext`` starts and polls them. When one fails or dies, it sends SIGTERM to the others. They do not
catch it, so it ends them even inside a collective that would never return. ``torchrun`` and ``deepspeed`` do the same.

The user sees the output of rank 0, and one message if the run fails: a failing process writes its message into torch's
error file, and the launcher prints the first one. Under other launchers the process prints it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lowmem_drf.distributed.ranks import OURS, launched, launched_by_us
from lowmem_drf.errors import DEBUG, BadInputError, explain
from lowmem_drf.files import write_text
from lowmem_drf.models.weights.downloads import available_host_bytes
from lowmem_drf.terminal import hangup, printable

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing import SubprocessContext

POLL_S = 0.05
SETTLE_S = 5.0
"""Delay before a process reports a RuntimeError, which may only mean that a peer is gone: a launcher that saw the peer
fail ends the process in the meantime."""
LAST_LINES = 20
LIBRARIES_BYTES = 5 * 10**8
"""What a process takes at least, for torch and the libraries of the models."""

Advice = Callable[[], str]
"""Returns the last line of a failure's message: the saved update, and how to go on."""


def _require_place(count: int) -> None:
    """Raises BadInputError where there are fewer cards, or not the memory for the processes' libraries alone."""
    import torch

    free, cards = available_host_bytes(), torch.cuda.device_count()
    if cards and count > cards:
        raise BadInputError(f"{count} processes need {count} cards, and torch sees {cards}. Lower --num-processes.")
    if free is not None and count * LIBRARIES_BYTES > free:
        raise BadInputError(
            f"{count} processes take {count * LIBRARIES_BYTES / 1e9:.0f} GB of host memory with their libraries "
            f"alone, and {free / 1e9:.0f} GB are free. Lower --num-processes."
        )


def launch(count: int, command: Sequence[str], advice: Advice) -> int:
    """Runs ``command`` in ``count`` processes, with torchrun's environment variables.

    Forwards the first SIGINT, SIGTERM or SIGHUP to every process as SIGINT; a SIGINT after it kills them. The processes
    do not outlive this one (``ranks.join``).

    Returns:
        The exit code: 0, that of the first process that failed, 1 if a signal killed it, 130 after an interrupt.
    """
    _require_place(count)
    import torch.distributed as dist
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std, SubprocessContext

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the user reads our one message
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # by default torch kills the processes at the first SIGINT
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = OURS | {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    # torch's own log would print beside our one message what the exception says too
    shared["TORCH_CPP_LOG_LEVEL"] = os.environ.get("TORCH_CPP_LOG_LEVEL", "FATAL")
    shared["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(max(len(os.sched_getaffinity(0)) // count, 1)))
    with tempfile.TemporaryDirectory() as folder, _signals() as got:
        context = SubprocessContext(
            name="train",
            entrypoint=command[0],
            args={rank: tuple(command[1:]) for rank in range(count)},
            envs={rank: {"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(count)},
            logs_specs=DefaultLogsSpecs(folder, {rank: Std.ALL for rank in range(1, count)}),
        )
        try:
            context.start()
            text, code = _outcome(context, got, advice)
        finally:
            context.close(signal.SIGKILL)
    text = printable(text)
    if code and sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
        text = f"\x1b[?25h\n{text}"  # rank 0 ended while its progress line hid the cursor
    sys.stderr.write(text)
    return code


def _outcome(context: SubprocessContext, got: Sequence[int], advice: Advice) -> tuple[str, int]:
    """Waits for the processes. Returns the message for the user, and the exit code."""
    sent = False
    while (result := context.wait(POLL_S, POLL_S)) is None:
        if len(got) > 1:
            context.close(signal.SIGKILL)
        elif got and not sent:
            sent = True
            for handler in context.subprocess_handlers.values():
                handler.proc.send_signal(signal.SIGINT)
    if not result.failures:
        return "", 0
    failure = next(iter(result.failures.values()))  # the first one seen; torch ended the later ones
    reported = Path(context.error_files[failure.local_rank]).is_file()
    if len(got) > 1 or (got and not reported):
        return f"Interrupted. {_safe(advice)}\n", 130
    if reported:
        return failure.message, failure.exitcode
    how = f"exit code {failure.exitcode}" if failure.exitcode > 0 else failure.signal_name()
    how += " (out of host memory? see dmesg)" if failure.exitcode == -signal.SIGKILL else ""
    said = Path(context.stderrs[failure.local_rank] or os.devnull).read_text(errors="replace").splitlines()
    lines = [f"Error: rank {failure.local_rank} died with {how}. The run was stopped.", _safe(advice)]
    return "\n".join([*lines, *said[-LAST_LINES:]]) + "\n", max(failure.exitcode, 1)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Inside the block, SIGINT, SIGTERM and SIGHUP are only appended to the list; once it holds one, SIGINT alone."""
    got: list[int] = []

    def on_signal(number: int, frame: object) -> None:
        if not got or number == signal.SIGINT:
            got.append(number)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM, *hangup())}
    try:
        yield got
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def failing_together(advice: Advice) -> Iterator[Callable[[BaseException], None]]:
    """Ends a launched process at an exception that leaves the block. Without a launcher, exceptions propagate as usual.

    Yields:
        A function that ends the process for an exception that cannot propagate because a collective would be entered on
        the way. Without a launcher it does nothing.
    """
    try:
        yield lambda error: fail(error, advice) if launched() else None
    except BaseException as error:
        if launched():
            fail(error, advice)
        raise


def fail(error: BaseException, advice: Advice) -> NoReturn:
    """Ends this process with the exit code of ``errors.explain``, and reports the error unless another process does."""
    if isinstance(error, RuntimeError) and type(error).__name__ != "OutOfMemoryError":
        time.sleep(SETTLE_S)
    rank = int(os.environ["RANK"])
    message, code = explain(error)
    if code == 130 and rank and error.args:
        code = 0  # all processes agreed to stop, and saved (``train``): rank 0 reports it
    shown = "".join(traceback.format_exception(error)) if DEBUG in sys.argv else ""
    shown += f"Error: {f'rank {rank}: ' if rank else ''}{message}\n{_safe(advice)}" if code not in (0, 130) else message
    if launched_by_us():
        report = {"message": shown.rstrip() + "\n", "timestamp": time.time()}
        write_text(Path(os.environ["TORCHELASTIC_ERROR_FILE"]), json.dumps(report))
    elif rank == 0 or code not in (0, 130):
        print(printable(shown.rstrip()), file=sys.stderr)
    sys.stdout.flush()
    os._exit(code)


def _safe(advice: Advice) -> str:
    """The advice, or nothing: an error in it, for example an unreadable folder, must not hide the failure."""
    with suppress(Exception):
        return advice()
    return ""
