"""Offloads tensors to packed, pinned host memory, and copies them back, on two CUDA streams.

Pinned memory is allocated in arenas of ``ARENA`` bytes. PyTorch's pinned allocator rounds every request up to a power
of two, so tensors pinned one by one could take twice their size. A tensor may be split over several pieces of arenas,
so every gap is usable.

Assumes one compute stream, like the whole package: tensors are made on the stream that is current in ``put``.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

ARENA = 64 * 1024**2
"""Bytes. Large enough for full speed over PCIe, small enough that a half-empty last arena does not matter."""

ALIGN = 256
"""Bytes. Pieces start at multiples of it."""

IN_FLIGHT = 256 * 1024**2
"""Bytes on the card that may still be on their way to the host before the computation waits. The newest tensor may be
larger: its copy overlaps with computation."""

Piece = tuple[int, int, int]
"""Arena, offset, length."""

Fetch = Callable[[], Callable[[], Tensor]]
"""Starts a copy to the card. The result is called once, waits for the copy and returns the tensor."""


class Held:
    """A tensor on the host, of ``nbytes`` bytes there. Dropping the last reference frees its host memory for reuse."""

    def __init__(self, nbytes: int, fetch: Fetch) -> None:
        self.nbytes = nbytes
        self.fetch = fetch
        self._coming: Callable[[], Tensor] | None = None

    def prefetch(self) -> None:
        """Allocates memory on the card and starts the copy, which overlaps with computation. ``get`` returns it."""
        if self._coming is None:
            self._coming = self.fetch()

    def forget(self) -> None:
        """Drops a prefetched copy that ``get`` has not returned."""
        self._coming = None

    def get(self) -> Tensor:
        """The tensor on the card: shape, dtype and values as in ``put``, contiguous, no gradient. May be called again.
        Do not write into it: on the CPU it is the stored tensor itself."""
        self.prefetch()
        coming, self._coming = self._coming, None
        assert coming is not None
        return coming()


class Copier(Protocol):
    """Copies tensors without gradient to host memory and back; methods as in ``HostStore``. Host memory is freed with
    the last reference to the result of ``put``."""

    def put(self, tensor: Tensor) -> Fetch: ...
    def settle(self) -> None: ...
    def keep(self, table: Tensor) -> Tensor: ...
    def send(self, rows: Tensor) -> Tensor: ...


class HostStore:
    """Stores tensors on the host. One per run.

    Args:
        device: the card. In a CPU run card and host share memory, and nothing is copied.
        copier: default: the one for ``device``.
    """

    def __init__(self, device: torch.device, copier: Copier | None = None) -> None:
        self._copier: Copier = copier or (_Pinned(device) if device.type == "cuda" else _SameMemory())

    def put(self, tensor: Tensor) -> Held:
        """Starts the copy to the host. The caller may drop the tensor at once, and must not write into it. On CUDA its
        memory is freed after the copy, at the latest when a later ``put`` (see ``IN_FLIGHT``) or ``settle`` makes the
        computation wait for it.

        Raises:
            MemoryError: not enough host memory.
        """
        return Held(tensor.nbytes, self._copier.put(tensor.detach()))

    def settle(self) -> None:
        """Frees all tensors on the card with copies under way; the following computation waits for the copies."""
        self._copier.settle()

    def keep(self, table: Tensor) -> Tensor:
        """The tensor in host memory, to be read there."""
        return self._copier.keep(table.detach())

    def send(self, rows: Tensor) -> Tensor:
        """Moves rows of ``keep``'s tensor to the card."""
        return self._copier.send(rows)


class _SameMemory:
    """The ``Copier`` of a CPU run."""

    def put(self, tensor: Tensor) -> Fetch:
        # a view would keep the whole storage alive
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        kept = tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
        return lambda: lambda: kept

    def settle(self) -> None:
        pass

    def keep(self, table: Tensor) -> Tensor:
        return table

    def send(self, rows: Tensor) -> Tensor:
        return rows


class _Pinned:
    """The ``Copier`` of a card: arenas and two copy streams."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._to_host, self._to_card = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._arenas: list[Tensor] = []
        self._free: list[Piece] = []
        self._returned: deque[list[Piece]] = deque()
        self._leaving: deque[tuple[Tensor, Any]] = deque()
        self._pinning = True

    def put(self, tensor: Tensor) -> Fetch:
        pieces = self._take(tensor.nbytes)
        source = tensor.contiguous()
        if source.device.type != self._device.type:  # weights that were loaded in host memory
            self._to_host.synchronize()  # earlier copies from and to these pieces must have ended
            self._to_card.synchronize()
            for given, on_host in self._pairs(source, pieces):
                on_host.copy_(given)
            return _OnHost(self, pieces, self._to_host.record_event(), tensor.shape, tensor.dtype).fetch
        # The compute stream makes the values. It has also waited (in ``_Coming``) for earlier reads of these pieces.
        self._to_host.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._to_host):
            for on_card, on_host in self._pairs(source, pieces):
                on_host.copy_(on_card, non_blocking=True)
        written = self._to_host.record_event()
        # Held here and not by record_stream: the CPU runs far ahead of the card, so the allocator would find no copy
        # finished and keep the tensors of all blocks.
        self._leaving.append((source, written))
        while len(self._leaving) > 1 and sum(waiting.nbytes for waiting, _ in self._leaving) > IN_FLIGHT:
            self._let_go()
        return _OnHost(self, pieces, written, tensor.shape, tensor.dtype).fetch

    def settle(self) -> None:
        while self._leaving:
            self._let_go()

    def keep(self, table: Tensor) -> Tensor:
        return table.cpu()

    def send(self, rows: Tensor) -> Tensor:
        return rows.to(self._device)

    def fetch(self, held: _OnHost) -> _Coming:
        while self._leaving and self._leaving[0][1].query():
            self._let_go()
        current = torch.cuda.current_stream(self._device)
        tensor = torch.empty(held.shape, dtype=held.dtype, device=self._device)
        self._to_card.wait_stream(current)  # which may still use this memory for an earlier tensor
        self._to_card.wait_event(held.written)
        with torch.cuda.stream(self._to_card):
            for on_card, on_host in self._pairs(tensor, held.pieces):
                on_card.copy_(on_host, non_blocking=True)
        return _Coming(tensor, self._to_card.record_event(), current)

    def give_back(self, pieces: list[Piece]) -> None:
        """Only appends: destructors call it, possibly inside any other method."""
        self._returned.append(pieces)

    def _let_go(self) -> None:
        source, written = self._leaving.popleft()
        # otherwise its memory could be overwritten before the copy
        torch.cuda.current_stream(self._device).wait_event(written)
        del source

    def _pairs(self, tensor: Tensor, pieces: list[Piece]) -> list[tuple[Tensor, Tensor]]:
        """(bytes on the card, bytes on the host) for each piece."""
        flat, start, pairs = tensor.view(-1).view(torch.uint8), 0, []
        for arena, offset, length in pieces:
            used = min(length, len(flat) - start)
            pairs.append((flat[start : start + used], self._arenas[arena][offset : offset + used]))
            start += used
        return pairs

    def _take(self, nbytes: int) -> list[Piece]:
        self._collect()
        missing, pieces = -(-nbytes // ALIGN) * ALIGN, []
        while missing > 0:
            arena, offset, length = self._free.pop() if self._free else self._new_arena()
            used = min(length, missing)
            pieces.append((arena, offset, used))
            if used < length:
                self._free.append((arena, offset + used, length - used))
            missing -= used
        return pieces

    def _collect(self) -> None:
        """Frees the returned pieces and joins neighbours."""
        if not self._returned:
            return
        while self._returned:
            self._free += self._returned.popleft()
        joined: list[Piece] = []
        for arena, offset, length in sorted(self._free):
            if joined and joined[-1][0] == arena and joined[-1][1] + joined[-1][2] == offset:
                joined[-1] = (arena, joined[-1][1], joined[-1][2] + length)
            else:
                joined.append((arena, offset, length))
        self._free = joined

    def _new_arena(self) -> Piece:
        try:
            self._arenas.append(self._allocate())
        except RuntimeError as error:
            taken = len(self._arenas) * ARENA / 1024**3
            raise MemoryError(
                f"{taken:.1f} GiB wait in host memory for the card, and {ARENA // 1024**2} MiB more are refused"
            ) from error
        return len(self._arenas) - 1, 0, ARENA

    def _allocate(self) -> Tensor:
        if self._pinning:
            try:
                return torch.empty(ARENA, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                self._pinning = False
                pinned = len(self._arenas) * ARENA / 1024**3
                warnings.warn(
                    f"No more than {pinned:.1f} GiB of host memory can be pinned ({str(error).splitlines()[0]}): "
                    "copies between the card and what waits in the rest stop the computation and run at about half "
                    "the speed. In a container raise its limit of locked memory (ulimit -l unlimited); WSL2 and "
                    "Windows have limits of their own (docs/windows.md); or let less wait: a lower "
                    "memory.record_decode, memory.record_rollout=false, memory.checkpoint=true, a higher "
                    "memory.vae_cache_every, model.quant=int8.",
                    stacklevel=2,
                )
        return torch.empty(ARENA, dtype=torch.uint8)


class _OnHost:
    """A tensor stored in the arenas."""

    def __init__(
        self, pinned: _Pinned, pieces: list[Piece], written: Any, shape: torch.Size, dtype: torch.dtype
    ) -> None:
        self._pinned = pinned
        self.pieces, self.written, self.shape, self.dtype = pieces, written, shape, dtype

    def fetch(self) -> Callable[[], Tensor]:
        return self._pinned.fetch(self)

    def __del__(self) -> None:
        self._pinned.give_back(self.pieces)


class _Coming:
    """A tensor on its way to the card. Called once; waits and returns the tensor."""

    def __init__(self, tensor: Tensor, read: Any, stream: Any) -> None:
        self._tensor: Tensor | None = tensor
        self._read, self._stream = read, stream

    def __call__(self) -> Tensor:
        tensor, self._tensor = self._tensor, None
        assert tensor is not None
        current = torch.cuda.current_stream(tensor.device)
        current.wait_event(self._read)
        if current != self._stream:
            tensor.record_stream(current)
        return tensor

    def __del__(self) -> None:
        if self._tensor is not None:  # never used: both memories may be reused only after the copy
            self._stream.wait_event(self._read)
