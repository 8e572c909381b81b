"""The host store of a plan: copies between card and host are only counted, on the ledger."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowmem_drf.memory.host import Fetch, HostStore
from lowmem_drf.planner.ledger import Ledger


def planned_store() -> HostStore:
    """A store for use under a ``Ledger``: its tensors count as host memory until they are fetched, then as the
    card's."""
    return HostStore(torch.device("cpu"), _PlannedCopier())


class _PlannedCopier:
    """A ``host.Copier``."""

    def put(self, tensor: Tensor) -> Fetch:
        return _Booked(tensor, _ledger()).fetch

    def settle(self) -> None:
        ledger = _ledger()
        ledger.wait(ledger.link.sent(ledger.seconds))

    def keep(self, table: Tensor) -> Tensor:
        ledger = _ledger()
        with ledger.off_the_clock():
            copy = table.clone()
        ledger.on_host(copy)
        return copy

    def send(self, rows: Tensor) -> Tensor:
        ledger = _ledger()
        ledger.wait(ledger.link.fetch(ledger.seconds, rows.nbytes, written=0.0))
        return rows


class _Booked:
    """A tensor that the ledger counts as the host's."""

    def __init__(self, tensor: Tensor, ledger: Ledger) -> None:
        with ledger.off_the_clock():
            self._copy = tensor.clone(memory_format=torch.contiguous_format)
        ledger.on_host(self._copy)
        self._written, until = ledger.link.send(ledger.seconds, tensor.nbytes)
        ledger.wait(until)

    def fetch(self) -> Callable[[], Tensor]:
        ledger = Ledger.active()
        if ledger is None:  # a test reads values after counting
            return self._copy.clone
        arrival = ledger.link.fetch(ledger.seconds, self._copy.nbytes, self._written)
        with ledger.off_the_clock("from the host"):
            tensor = self._copy.clone()

        def wait() -> Tensor:
            ledger.wait(arrival)
            return tensor

        return wait


def _ledger() -> Ledger:
    ledger = Ledger.active()
    if ledger is None:
        raise ValueError("a planned store only counts, and there is no ledger")
    return ledger
