"""The processes of a run: which of them this is, what is its share, and the few words they exchange.

What they exchange are small Python objects, over gloo: it works with and without cards and never waits for a card's
queue. Tensors are DeepSpeed's business.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar

from lowmem_drf.errors import BadInputError

JOIN_TIMEOUT = timedelta(minutes=10)
"""For processes that never come."""
TIMEOUT = timedelta(hours=6)
"""For processes that wait for each other: one that downloads 30 GB is only slow. A dead one is noticed by the launcher,
in seconds."""
NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LOCAL_COUNT = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
"""torchrun's name and that of the deepspeed launcher."""
OURS = {"TORCHELASTIC_RUN_ID": "lowmem-drf"}
"""What ``distributed/launch.py`` sets for the processes that it starts."""

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """One process among ``count``. ``Ranks()`` is a run of one process: ``torch.distributed`` is not touched.

    Every method but ``share``, ``parts`` and ``chief`` is a collective: all processes call it, in the same order.
    """

    rank: int = 0
    count: int = 1
    local: int = 0
    """The number of this process, and of its card, on its machine."""
    local_count: int = 1
    """Processes on its machine."""

    @property
    def chief(self) -> bool:
        """It writes and talks."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's contiguous slice; all are of equal length. Raises ValueError where they cannot be."""
        size, rest = divmod(len(items), self.count)
        if rest:
            raise ValueError(f"{len(items)} items cannot be split evenly over {self.count} processes")
        return items[self.rank * size : (self.rank + 1) * size]

    def parts(self, items: int) -> list[range]:
        """The places among ``items`` that belong to each process: contiguous, their lengths differ by one at most,
        longer ones first."""
        size, rest = divmod(items, self.count)
        starts = [rank * size + min(rank, rest) for rank in range(self.count + 1)]
        return [range(start, stop) for start, stop in zip(starts, starts[1:], strict=False)]

    @contextmanager
    def one_first(self) -> Iterator[None]:
        """The block is run by one process of each machine, then by its others: what the first one leaves on the disk
        they find there."""
        if self.local:
            self.barrier()
        yield
        if not self.local:
            self.barrier()

    def gather(self, value: T) -> list[T]:
        """Everybody's value (anything that pickles), in the order of ranks, to all."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values: list[T | None] = [None] * self.count
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def any(self, flag: bool) -> bool:
        """Whether one of them says so."""
        return any(self.gather(flag))

    def from_chief(self, value: T) -> T:
        """Rank 0's value."""
        if self.count == 1:
            return value
        import torch.distributed as dist

        values = [value if self.chief else None]
        dist.broadcast_object_list(values, src=0)
        return values[0]  # type: ignore[return-value]

    def barrier(self) -> None:
        """Returns when all have come here. (``torch.distributed.barrier`` would wait for the card's queue too.)"""
        self.gather(None)

    def leave(self) -> None:
        """The last thing of a run that ended well: nobody leaves while others still need the connections."""
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            self.barrier()
            dist.destroy_process_group()


def end_process() -> NoReturn:
    """Ends a process that a launcher started, with 0, after ``Ranks.leave``. The interpreter is not taken down: threads
    of the communication libraries, which DeepSpeed's groups keep alive, have aborted it there now and then (seen with
    gloo)."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


ALONE = Ranks()
"""A run of one process."""


def started_processes() -> int | None:
    """How many a launcher has started, this one among them. ``None``: there is no launcher."""
    return int(os.environ["WORLD_SIZE"]) if launched() and os.environ["WORLD_SIZE"].isdigit() else None


def launched() -> bool:
    """Whether a launcher (torchrun, deepspeed, ``distributed/launch.py``) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launched_by_us() -> bool:
    """Whether the launcher is ``distributed/launch.py``, which prints the message of a process that failed."""
    return os.environ.items() >= OURS.items()


def join(device_wish: str) -> Ranks:
    """Joins the others that the launcher started; without a launcher, makes the group of one process that DeepSpeed
    wants.

    Call it before anything imports deepspeed, which chooses its accelerator then (``DS_ACCELERATOR``).

    Args:
        device_wish: ``config.device``.

    Raises:
        BadInputError: the launcher's environment is incomplete, or this process has no card of its own.
    """
    place = _place() if launched() else Ranks()

    import torch
    import torch.distributed as dist

    if launched_by_us():
        torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)  # type: ignore[attr-defined]  # Linux
    device = rank_device(device_wish, place, torch.cuda.device_count())
    os.environ.setdefault("DS_ACCELERATOR", device)
    if device == "cuda":
        torch.cuda.set_device(place.local)
    if launched():
        store, _, _ = next(dist.rendezvous("env://", place.rank, place.count, timeout=JOIN_TIMEOUT))
    else:
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
        store = dist.HashStore()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.count,
        timeout=TIMEOUT,
    )
    store.set_timeout(TIMEOUT)  # NCCL meets here only when it is first used
    return place


def rank_device(wish: str, place: Ranks, cards: int) -> str:
    """``cuda`` or ``cpu`` for the process at ``place``, on a machine that shows ``cards`` CUDA cards.

    Raises BadInputError in every process of the machine where there are fewer cards than processes: shared, a card
    holds the weights twice.
    """
    if wish == "cpu" or (wish == "auto" and cards == 0):
        return "cpu"
    if place.local_count > cards:
        have = f"{place.local_count} process{'es' if place.local_count > 1 else ''} on this machine, {cards or 'no'} CUDA card{'' if cards == 1 else 's'} visible"
        start = (
            f"Start as many processes as there are cards (--num-processes {cards}), show more cards (CUDA_VISIBLE_DEVICES)"
            if cards
            else "Show its cards (CUDA_VISIBLE_DEVICES)"
        )
        which = (
            f"rank {place.rank} has no card of its own"
            if place.local >= cards
            else f"rank {place.rank} has a card, but not every process has one"
        )
        raise BadInputError(f"{which}: {have}. {start}, or compute on the CPU: -s device=cpu")
    return "cuda"


def _place() -> Ranks:
    missing = [name for name in NEEDED if name not in os.environ]
    if not any(name in os.environ for name in LOCAL_COUNT):
        missing.append(LOCAL_COUNT[0])
    if missing:
        raise BadInputError(
            f"RANK and WORLD_SIZE are set, {', '.join(missing)} not. Launch with torchrun, deepspeed or --num-processes; else set them too."
        )
    local_count = next(name for name in LOCAL_COUNT if name in os.environ)
    try:
        rank, count, local, here = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", local_count))
    except ValueError as error:
        raise BadInputError(f"RANK, WORLD_SIZE, LOCAL_RANK and {local_count} must be whole numbers: {error}") from error
    if not (0 <= rank < count and 0 <= local < here <= count):
        raise BadInputError(
            f"RANK={rank} of WORLD_SIZE={count} with LOCAL_RANK={local} of {local_count}={here} cannot be. Correct the launcher's environment."
        )
    return Ranks(rank, count, local, here)
