"""The processes of a run: this process's rank, its share of the work, and collectives on small Python objects.

The objects travel over gloo, which works with and without cards and never waits for a card's queue. DeepSpeed exchanges
the tensors.
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
"""Wait for processes to join."""
TIMEOUT = timedelta(hours=6)
"""Wait in a collective. Long, since another process may be downloading 30 GB; the launcher notices a dead one in
seconds."""
NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LOCAL_COUNT = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
"""The names that torchrun and the deepspeed launcher use."""
OURS = {"TORCHELASTIC_RUN_ID": "lowmem-drf"}
"""Environment that marks processes started by ``distributed/launch.py``."""

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """One process among ``count``. ``Ranks()`` is a run of one process and never touches ``torch.distributed``.

    All methods except ``share``, ``parts`` and ``chief`` are collectives: all processes call them in the same order.
    """

    rank: int = 0
    count: int = 1
    local: int = 0
    """Index of this process, and of its card, on its machine."""
    local_count: int = 1
    """Number of processes on its machine."""

    @property
    def chief(self) -> bool:
        """True for rank 0, which writes the files and prints."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's contiguous slice. Raises ValueError if the items do not divide evenly."""
        size, rest = divmod(len(items), self.count)
        if rest:
            raise ValueError(f"{len(items)} items cannot be split evenly over {self.count} processes")
        return items[self.rank * size : (self.rank + 1) * size]

    def parts(self, items: int) -> list[range]:
        """Each process's contiguous range of ``items`` places. Lengths differ by at most one, longer ranges first."""
        size, rest = divmod(items, self.count)
        starts = [rank * size + min(rank, rest) for rank in range(self.count + 1)]
        return [range(start, stop) for start, stop in zip(starts, starts[1:], strict=False)]

    @contextmanager
    def one_first(self) -> Iterator[None]:
        """Runs the block in one process of each machine, then in the others, which can read the files it wrote."""
        if self.local:
            self.barrier()
        yield
        if not self.local:
            self.barrier()

    def gather(self, value: T) -> list[T]:
        """The values of all processes (picklable), by rank."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values: list[T | None] = [None] * self.count
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def any(self, flag: bool) -> bool:
        """True if any rank passed True."""
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
        """Waits for all processes. (``torch.distributed.barrier`` would also wait for the card's queue.)"""
        self.gather(None)

    def leave(self) -> None:
        """Last call of a successful run: waits until no process needs the connections, then closes them."""
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            self.barrier()
            dist.destroy_process_group()


def end_process() -> NoReturn:
    """Exits with 0 after ``Ranks.leave``, without the interpreter's shutdown: there, threads of the communication
    libraries, which DeepSpeed's groups keep alive, have sometimes aborted the process (seen with gloo)."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


ALONE = Ranks()
"""A run of one process."""


def started_processes() -> int | None:
    """Number of processes that a launcher started, including this one. ``None``: there is no launcher."""
    return int(os.environ["WORLD_SIZE"]) if launched() and os.environ["WORLD_SIZE"].isdigit() else None


def launched() -> bool:
    """Whether a launcher (torchrun, deepspeed, ``distributed/launch.py``) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launched_by_us() -> bool:
    """Whether the launcher is ``distributed/launch.py``, which prints the message of a process that failed."""
    return os.environ.items() >= OURS.items()


def require_platform() -> None:
    """Raises BadInputError on Windows, where PyTorch has no NCCL and processes cannot be started as ours are."""
    if sys.platform == "win32":
        raise BadInputError(
            "DeepSpeed's engines (zero1 to zero3) do not run on Windows here. Train on one card: -s engine=single "
            "-s processes=1; or under WSL2 (docs/windows.md)."
        )


def join(device_wish: str) -> Ranks:
    """Joins the launcher's process group; without a launcher, makes the group of one process that DeepSpeed needs.

    Call it before anything imports deepspeed, which chooses its accelerator at import (``DS_ACCELERATOR``).

    Args:
        device_wish: ``config.device``.

    Raises:
        BadInputError: the launcher's environment is incomplete, or a process has no card to itself.
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
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it
        store = dist.HashStore()
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.count, timeout=TIMEOUT)
    store.set_timeout(TIMEOUT)  # NCCL connects through the store only at its first use
    return place


def rank_device(wish: str, place: Ranks, cards: int) -> str:
    """``cuda`` or ``cpu`` for the process at ``place``, on a machine that shows ``cards`` CUDA cards.

    Raises BadInputError in every process of the machine if it has fewer cards than processes: a shared card would hold
    the weights twice.
    """
    if wish == "cpu" or (wish == "auto" and cards == 0):
        return "cpu"
    if place.local_count > cards:
        lacks = "has no card of its own" if place.local >= cards else "has a card, but not every process has one"
        processes = f"{place.local_count} process{'es' if place.local_count > 1 else ''} on this machine"
        visible = f"{cards or 'no'} CUDA card{'' if cards == 1 else 's'} visible"
        cure = "Show its cards (CUDA_VISIBLE_DEVICES)"
        if cards:
            start = f"Start as many processes as there are cards (--num-processes {cards})"
            cure = f"{start}, show more cards (CUDA_VISIBLE_DEVICES)"
        raise BadInputError(
            f"rank {place.rank} {lacks}: {processes}, {visible}. {cure}, or compute on the CPU: -s device=cpu"
        )
    return "cuda"


def _place() -> Ranks:
    missing = [name for name in NEEDED if name not in os.environ]
    if not any(name in os.environ for name in LOCAL_COUNT):
        missing.append(LOCAL_COUNT[0])
    if missing:
        raise BadInputError(
            f"RANK and WORLD_SIZE are set, {', '.join(missing)} not. "
            "Launch with torchrun, deepspeed or --num-processes; else set them too."
        )
    local_count = next(name for name in LOCAL_COUNT if name in os.environ)
    try:
        rank, count, local, here = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", local_count))
    except ValueError as error:
        raise BadInputError(f"RANK, WORLD_SIZE, LOCAL_RANK and {local_count} must be whole numbers: {error}") from error
    if not (0 <= rank < count and 0 <= local < here <= count):
        raise BadInputError(
            f"RANK={rank} of WORLD_SIZE={count} with LOCAL_RANK={local} of {local_count}={here} cannot be. "
            "Correct the launcher's environment."
        )
    return Ranks(rank, count, local, here)
