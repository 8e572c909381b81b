"""Processes of a run for tests: forked from a server that has torch already, stdout and stderr in files. Their work is
a function of this module."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from lowmem_drf.distributed import watch
from lowmem_drf.distributed.ranks import join
from lowmem_drf.errors import BadInputError, NonFiniteError, explain

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch.distributed", "lowmem_drf.distributed.watch"])
ADVICE = "Go on with: again"
HANG_S = 60.0


@dataclass
class Ended:
    """How the processes of a run ended, by rank."""

    codes: list[int]
    out: list[str]
    err: list[str]
    at: list[float] = field(repr=False)
    """Seconds on one clock."""

    def said(self) -> list[str]:
        """What a user reads on stderr."""
        return [line for text in self.err for line in text.splitlines()]


class Group:
    """``count`` processes that do ``work(ranks, guard)`` under a watch."""

    def __init__(self, folder: Path, work, count: int = 2, argv: tuple[str, ...] = ()) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        self.out, self.err = ([folder / f"{name}-{rank}" for rank in range(count)] for name in ("out", "err"))
        self.processes = [
            CONTEXT.Process(target=_run, args=(work, rank, count, port, str(self.out[rank]), str(self.err[rank]), argv))
            for rank in range(count)
        ]
        for process in self.processes:
            process.start()

    def until(self, rank: int, text: str) -> None:
        """Waits for a line of stdout."""
        until = time.monotonic() + HANG_S
        while text not in (self.out[rank].read_text() if self.out[rank].exists() else ""):
            assert time.monotonic() < until and self.processes[rank].exitcode is None, self.err[rank].read_text()
            time.sleep(0.01)

    def send(self, number: int, *ranks: int) -> None:
        for rank in ranks or range(len(self.processes)):
            os.kill(self.processes[rank].pid, number)

    def ended(self) -> Ended:
        at: dict[int, float] = {}
        until = time.monotonic() + HANG_S
        while len(at) < len(self.processes):
            at |= {
                rank: time.monotonic()
                for rank, process in enumerate(self.processes)
                if rank not in at and process.exitcode is not None
            }
            if time.monotonic() > until:
                for process in self.processes:
                    process.kill()
                raise AssertionError(f"hangs: {[process.exitcode for process in self.processes]}")
            time.sleep(0.01)
        codes = [process.exitcode for process in self.processes]
        return Ended(
            codes,
            [path.read_text() for path in self.out],
            [path.read_text() for path in self.err],
            [at[rank] for rank in range(len(codes))],
        )


def _run(work, rank, count, port, out, err, argv):
    """One process, with the command line's way of telling what went wrong."""
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    sys.argv = ["lowmem-drf", *argv]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server of forks ignores it
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = 0
    try:
        train(work)
    except (Exception, KeyboardInterrupt) as error:
        message, code = explain(error)
        print(message if code == 130 else f"Error: {message}", file=sys.stderr)
    sys.stdout.flush()
    os._exit(code)


def train(work):
    ranks = join("cpu")
    with watch.watch(ranks, lambda: ADVICE) as guard:
        work(ranks, guard)
        ranks.leave()


def collective():
    """Waits for the others for hours."""
    import torch
    import torch.distributed as dist

    dist.all_reduce(torch.ones(1))


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def exchange(ranks, guard):
    flags = [ranks.any(ranks.rank == 1), ranks.any(False)]
    ranks.barrier()
    share, chief = ranks.share(range(6)), ranks.from_chief({"of": ranks.rank})
    print(
        json.dumps(
            [ranks.chief, ranks.gather(f"g{ranks.rank}"), flags, list(share), chief, os.environ["DS_ACCELERATOR"]]
        )
    )


def one_after_the_other(ranks, guard):
    """Not by way of ``leave``, which waits for all."""
    guard.done()
    time.sleep(0.3 * ranks.rank)
    print("done", flush=True)
    os._exit(0)


def second_fails(ranks, guard):
    print("kept in a buffer")
    if ranks.rank == 1:
        raise NonFiniteError("the reward is nan")
    collective()


def first_fails(ranks, guard):
    if ranks.chief:
        raise BadInputError("the prompts have changed")
    collective()


def all_fail(ranks, guard):
    raise BadInputError("the prompts have changed")


def second_fails_within(ranks, guard):
    """Where an exception would enter a collective on its way out."""
    if ranks.rank != 1:
        collective()
    try:
        raise KeyError("lost")
    except KeyError as error:
        guard.fail_now(error)
    finally:
        collective()


def first_fails_within(ranks, guard):
    if ranks.chief:
        guard.fail_now(MemoryError("2 GiB"))
    collective()


def second_is_killed(ranks, guard):
    if ranks.rank == 1:
        die()
    collective()


def first_is_killed(ranks, guard):
    if ranks.chief:
        die()
    collective()


def second_is_killed_and_first_does_not_wait_for_it(ranks, guard):
    if ranks.rank == 1:
        die()
    time.sleep(HANG_S)


def a_collective_fails_of_itself(ranks, guard):
    watch.SETTLE_S = 0.3
    if ranks.rank == 1:
        raise RuntimeError("Gloo: odd")
    collective()


def interrupted_while_first_saves(ranks, guard):
    """Ctrl-C once, as ``train`` takes it: rank 0 saves, the others are done."""
    if ranks.chief:
        time.sleep(1.0)
        print("saved")
    raise KeyboardInterrupt("Interrupted after update 3; it is saved.")


def second_is_interrupted(ranks, guard):
    watch.INTERRUPT_S = 0.3
    if ranks.rank == 1:
        raise KeyboardInterrupt
    collective()


def stops_at_the_second_signal(ranks, guard):
    """Rank 1 as ``train`` does it. Rank 0 is in a collective, and runs no handler."""
    got = []

    def handler(number, frame):
        got.append(number)
        if len(got) == 2:
            os._exit(130)
        print("asked", flush=True)

    signal.signal(signal.SIGINT, handler)
    waits(ranks, guard)


def waits(ranks, guard):
    """Rank 0 for the others."""
    watch.INTERRUPT_S = 0.3
    print("ready", flush=True)
    while ranks.rank:
        time.sleep(0.1)
    collective()


if __name__ == "__main__":  # under a launcher
    train(globals()[sys.argv[-1]])
