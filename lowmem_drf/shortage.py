"""Out of memory: which memory it was, what held it, and what helps. Told from the exception alone, whoever raised it.

Three memories print the same words and have different cures: the card's, the host's, and the part of the host's that is
pinned (page-locked) for copies to the card.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

GIB = 1024**3

Kind = Literal["card", "host", "pinned"]

CARD = re.compile(
    r"CUDA out of memory|CUDA driver error: out of memory|Triton Error \[CUDA\]: out of memory"
    r"|CU(BLAS|DNN|SPARSE|SOLVER)_STATUS_ALLOC_FAILED|CUDNN_STATUS_\w*DEVICE_ALLOCATION_FAILED"
)
HANDLE = re.compile(r"CU(BLAS|DNN)_STATUS_NOT_INITIALIZED")
"""A library could not make its handle: for want of memory, or because the library is broken."""
PINNED = re.compile(r"CUDA error: out of memory|cudaHost(Alloc|Register)|cudaErrorMemoryAllocation")
"""PyTorch's words for a refused ``cudaHostAlloc``, and for what the driver allocates outside of PyTorch's allocator."""
HOST = re.compile(
    r"can't allocate memory|enforce fail at alloc_cpu|cannot allocate memory|std::bad_alloc|os error 12\b"
    r"|HOST_ALLOCATION_FAILED|could not (create|execute) a primitive",
    re.IGNORECASE,
)
"""The last are oneDNN's words: a layer that PyTorch runs by it has no memory for its workspace."""
SCANT = 256 * 1024**2
"""Bytes. With more than these free on the card, it is not the card that is full."""

ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Variables that PyTorch's allocator reads when torch is imported. The first wins; the second is its new name."""
EXPANDABLE = "expandable_segments:True"
"""Segments that grow. The stages of an update need pieces of other sizes; memory that one has freed in segments of a
fixed size is lost to the next, up to gigabytes."""


@dataclass
class Shortage:
    """An allocation that failed, as it was at the time. Bytes; ``None``: unknown."""

    kind: Kind
    stage: str
    """Where: a stage of the update, or for example ``loading``. Empty: unknown."""
    asked: int | None = None
    allocated: int | None = None
    """By this process in PyTorch's allocator. This and the following: of the card."""
    reserved: int | None = None
    """Taken from the card by PyTorch's allocator, with what it has not given out."""
    free: int | None = None
    """What this process could still take."""
    others: int | None = None
    """Held by other programs, and by the driver."""
    total: int | None = None
    detail: str = ""
    """What the exception says, where that is more than "out of memory"."""
    lost: str = ""
    """What of the training could not be saved, in words."""

    @property
    def room(self) -> int | None:
        """Bytes of the card that PyTorch has or could take."""
        return None if self.free is None or self.reserved is None else self.free + self.reserved

    @property
    def fragmented(self) -> bool:
        """Whether PyTorch's allocator held enough for the request, in pieces that are too small."""
        known = self.asked is not None and self.reserved is not None and self.allocated is not None
        return known and self.reserved - self.allocated > self.asked  # type: ignore[operator]

    def lines(self, planned: str = "") -> list[str]:
        """What happened, for the user. ``planned``: the stage's planned peak, in words."""
        where = f" in {self.stage}" if self.stage else ""
        asked = f": {size(self.asked)} more were asked for" if self.asked is not None else ""
        if self.kind == "pinned":
            return [
                f'out of pinned host memory{where}{asked}. The card is not full, though PyTorch says "CUDA error: out '
                "of memory\": the system lets no more of the host's memory be locked.",
                "Raise the limit of locked memory (ulimit -l unlimited, also in a container). WSL2 lets about half of "
                "its memory be locked: memory= in .wslconfig.",
            ]
        if self.kind == "host":
            what = f" ({self.detail})" if self.detail else ""
            return [f"out of host memory{where}{asked}{what}. Close other programs, or add swap (WSL2: .wslconfig)."]
        said = [f"out of memory on the card{where}{asked}{f' ({planned})' if planned else ''}."]
        if self.others is not None:
            said.append(
                f"{size(self.allocated)} were allocated and {size(self.reserved)} reserved by PyTorch; of the card's "
                f"{size(self.total)}, {size(self.free)} were free, and other programs and the driver held "
                f"{size(self.others)}."
            )
        if self.fragmented and self.allocated is not None and self.reserved is not None:
            pieces = f"Fragmentation: {size(self.reserved - self.allocated)} lie reserved in pieces that are too small."
            set_it = may_expand() and EXPANDABLE not in allocator_settings()
            said.append(pieces + (f" Set {allocator_variable()}={EXPANDABLE}" if set_it else ""))
        return said


@contextmanager
def during(stage: str) -> Iterator[None]:
    """An out-of-memory error that leaves the block belongs to this stage, unless it came from one inside."""
    try:
        yield
    except Exception as error:
        if not hasattr(error, "shortage") and (found := _found(error, stage)):
            error.shortage = found  # type: ignore[attr-defined]
        raise


def shortage_of(error: BaseException) -> Shortage | None:
    """The shortage that an exception reports, or ``None``: it is of another kind, or ours and has its own message."""
    return getattr(error, "shortage", None) or _found(error, "")


def let_go(error: BaseException) -> None:
    """Frees what the functions held that the error ended: nothing else frees it as long as the error is there."""
    seen: set[int] = set()
    while error and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]


def _found(error: BaseException, stage: str) -> Shortage | None:
    text = str(error)
    if (first := _first_guess(error, text)) is None:
        return None
    allocated, reserved, free, others, total = _card()
    scant = free is not None and free < SCANT
    if first == "handle" and not scant:
        return None
    kind: Kind = "card" if first == "handle" or (first == "pinned" and scant) else first
    if kind == "card":
        # what PyTorch said is of the moment itself; by now some of it may have been freed
        allocated = _said(r"Of the allocated memory ([\d.]+) (\w+)", text) or allocated
        unused = _said(r"and ([\d.]+) (\w+) is reserved by PyTorch but unallocated", text)
        reserved = reserved if unused is None or allocated is None else allocated + unused
    asked = _said(r"[Tt]ried to allocate ([\d.]+) (\w+)", text)
    detail = " ".join(text.split())[:200] if isinstance(error, MemoryError) else ""
    return Shortage(kind, stage, asked, allocated, reserved, free, others, total, detail)


def _first_guess(error: BaseException, text: str) -> Kind | Literal["handle"] | None:
    """The memory, as far as the exception alone says it. ``handle``: see ``HANDLE``."""
    if type(error).__name__ == "OutOfMemoryError":
        return "card"
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return "host"
    if not isinstance(error, RuntimeError) and type(error).__name__ != "SafetensorError":
        return None
    kinds: tuple[tuple[Kind | Literal["handle"], re.Pattern[str]], ...]
    kinds = (("card", CARD), ("handle", HANDLE), ("pinned", PINNED), ("host", HOST))
    return next((kind for kind, words in kinds if words.search(text)), None)


def _card() -> tuple[int | None, int | None, int | None, int | None, int | None]:
    """Bytes of the card that this process uses: allocated, reserved, free, others, total (as in ``Shortage``)."""
    torch = sys.modules.get("torch")  # without it nothing of ours is on a card
    try:
        if torch is None or not torch.cuda.is_initialized():
            return None, None, None, None, None
        free, total = torch.cuda.mem_get_info()
        allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        cap = int(torch.cuda.get_per_process_memory_fraction() * total)
        return allocated, reserved, max(0, min(free, cap - reserved)), max(0, total - free - reserved), total
    except Exception:  # a card in trouble must not hide the error
        return None, None, None, None, None


def _said(pattern: str, text: str) -> int | None:
    """The size that a message names, in bytes."""
    units = {"bytes": 1, "KiB": 1024, "MiB": 1024**2, "GiB": GIB, "TiB": 1024 * GIB}
    found = re.search(pattern, text)
    return round(float(found[1]) * units[found[2]]) if found and found[2] in units else None


def size(nbytes: float | None) -> str:
    """In words."""
    if nbytes is None:
        return "?"
    return f"{nbytes / GIB:.1f} GiB" if nbytes >= GIB / 10 else f"{nbytes / 1024**2:.1f} MiB"


def expand_segments() -> None:
    """Sets ``EXPANDABLE`` for this process and those that it starts, unless the user has set anything. For the command
    line, before torch is imported."""
    if may_expand() and not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[1]] = EXPANDABLE


def may_expand() -> bool:
    """Whether segments can grow here. PyTorch for Windows cannot; under WSL2 the driver refuses them on some cards, at
    the first allocation (pytorch#192330)."""
    return sys.platform == "linux" and not wsl2()


def allocator_settings() -> str:
    """What PyTorch's allocator was told; empty: nothing."""
    return os.environ.get(allocator_variable(), "")


def allocator_variable() -> str:
    """The variable that counts."""
    return next((name for name in ALLOCATOR if name in os.environ), ALLOCATOR[1])


def wsl2() -> bool:
    """Whether this is Linux inside Windows. Own kernels are known by the card's device."""
    return "microsoft" in platform.release().lower() or os.path.exists("/dev/dxg")
