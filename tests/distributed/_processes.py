"""Processes shared by many tests.

They are for tests that end no process; test_launch.py tests how processes start and end.
"""

import io
import os
import sys
import tempfile
import traceback
from contextlib import redirect_stdout
from multiprocessing.connection import wait
from pathlib import Path
from unittest import mock

from _killed import forked

HANG_S = 600.0


class Processes:
    """Called with a module's function and arguments: each process runs ``function(ranks, *arguments)``."""

    def __init__(self, count: int) -> None:
        from torch.distributed import TCPStore

        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._folder = tempfile.TemporaryDirectory()
        self._logs = [Path(self._folder.name) / f"rank{rank}" for rank in range(count)]
        self._ends, self._processes = [], []
        context = forked()
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, count, self._store.port, theirs, str(self._logs[rank])), daemon=True
            )
            process.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)

    def __call__(self, function, *arguments):
        """The function's results, by rank."""
        for end in self._ends:
            end.send((function, arguments))
        answers = {}
        while len(answers) < len(self._ends):  # the others may wait forever for a process that fails
            waiting = {end: rank for rank, end in enumerate(self._ends) if rank not in answers}
            ready = wait(list(waiting), HANG_S)
            assert ready, f"hanging: {sorted(waiting.values())}\n{self._said()}"
            for end in ready:
                try:
                    good, answers[waiting[end]] = end.recv()
                except EOFError:
                    raise AssertionError(f"rank {waiting[end]} died\n{self._said()}") from None
                assert good, answers[waiting[end]]
        return [answers[rank] for rank in range(len(self._ends))]

    def _said(self):
        return "\n".join(log.read_text() for log in self._logs)

    def close(self):
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def _serve(rank, count, port, end, log):
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    import torch

    from lowmem_drf.distributed.ranks import join

    torch.set_num_threads(1)
    ranks, linear = join("cpu"), torch.nn.functional.linear
    while True:
        function, arguments = end.recv()
        torch.nn.functional.linear = linear  # ZeRO-3 replaces it for good, with one that rounds differently
        try:
            end.send((True, function(ranks, *arguments)))
        except BaseException:
            end.send((False, traceback.format_exc()))


def trained(ranks, prompts, run, overrides, resume=False):
    """``lowmem-drf train`` as one process of a run; returns its output."""
    from lowmem_drf.commands import train as start

    said = io.StringIO()
    with (
        mock.patch.object(start, "join", lambda device: ranks),
        mock.patch.object(type(ranks), "leave", type(ranks).barrier),
        mock.patch.object(start, "end_process"),
        redirect_stdout(said),
    ):
        start.train_command(None if resume else "toy", prompts, run, None, None, resume, overrides, False)
    return said.getvalue()
