"""One process of a run, for test_launch.py: ``python _ranks.py FUNCTION FOLDER``."""

import os
import signal
import sys
import time
from pathlib import Path

from lowmem_drf.distributed import launch
from lowmem_drf.distributed.ranks import join
from lowmem_drf.errors import BadInputError, NonFiniteError

ADVICE = "Go on with: again"
RANK = int(os.environ.get("RANK", "0"))


def collective():
    """Waits hours for the others."""
    import torch
    import torch.distributed as dist

    dist.all_reduce(torch.ones(1))


def second_fails(folder):
    if RANK:
        raise NonFiniteError("the reward is nan")
    time.sleep(60)


def all_fail(folder):
    raise BadInputError("the prompts have changed")


def second_is_killed(folder):
    if RANK:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def second_is_killed_and_the_first_is_in_a_collective(folder):
    join("cpu")
    if RANK:
        os.kill(os.getpid(), signal.SIGKILL)
    collective()


def updates(folder):
    """Ends in order, one second after the first Ctrl-C, when all have got there: the first to end ends the others."""
    got = []
    signal.signal(signal.SIGINT, lambda *_: got.append(1))
    (folder / f"ready{RANK}").touch()
    while not got:
        time.sleep(0.01)
    time.sleep(1.0)
    (folder / f"got{RANK}").write_text(str(len(got)))
    while sum(file.stat().st_size for file in folder.glob("got*")) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.01)
    raise KeyboardInterrupt("Interrupted after update 3; it is saved.")


def deaf(folder):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    (folder / f"ready{RANK}").touch()
    time.sleep(60)


def stays(folder):
    join("cpu")
    (folder / f"pid{RANK}").write_text(str(os.getpid()))
    time.sleep(60)


if __name__ == "__main__":
    with launch.failing_together(lambda: ADVICE):
        globals()[sys.argv[-2]](Path(sys.argv[-1]))  # deepspeed puts an option before them
