"""What stands in for a run's host store and meter in a plan: copies between card and host are only counted, on the
ledger, and so are bytes and seconds of the stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor

from lowmem_drf.memory.host import Fetch, Held, HostStore
from lowmem_drf.planner.ledger import Ledger
from lowmem_drf.planner.stages import WEIGHTS, Figures, StagePlan

if TYPE_CHECKING:
    from lowmem_drf.planner.zero import PlannedZero3


def planned_store() -> HostStore:
    """A store for use under a ``Ledger``: its tensors count as host memory until they are fetched, then as the
    card's."""
    return HostStore(torch.device("cpu"), _PlannedCopier())


class _PlannedCopier:
    """A ``host.Copier``."""

    def put(self, tensor: Tensor) -> Fetch:
        ledger = _ledger()
        written, until = ledger.link.send(ledger.seconds, tensor.nbytes)
        ledger.wait(until)
        return _Booked(tensor, ledger, written)

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
    """A tensor that the ledger counts as the host's, ``written`` at this second of its clock. Called to fetch it."""

    def __init__(self, tensor: Tensor, ledger: Ledger, written: float) -> None:
        with ledger.off_the_clock():
            self._copy = tensor.clone(memory_format=torch.contiguous_format)
        ledger.on_host(self._copy)
        self._written = written

    def again(self) -> Callable[[], _Booked]:
        """Makes one that takes as much of the host, without a copy."""
        shape, dtype, written = self._copy.shape, self._copy.dtype, self._written
        return lambda: _Booked(torch.empty(shape, dtype=dtype), _ledger(), written)

    def __call__(self) -> Callable[[], Tensor]:
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


def again(value: Any) -> Callable[[], Any]:
    """Makes what takes as much of card and host, and has no values. It does not hold ``value``."""
    if isinstance(value, Held) and isinstance(value.fetch, _Booked):
        nbytes, booked = value.nbytes, value.fetch.again()
        return lambda: Held(nbytes, booked())
    if not isinstance(value, Tensor):
        return lambda: value
    shape, dtype, expanded = value.shape, value.dtype, not any(value.stride())
    return lambda: torch.zeros((), dtype=dtype).expand(shape) if expanded else torch.empty(shape, dtype=dtype)


def passed_on(caches: Sequence[Any]) -> tuple[Any, ...]:
    """Caches as large as the entering ones, which are emptied if they are a list. On the card these are handed on; what
    waits on the host is made anew, as others may keep what entered."""
    left = caches if isinstance(caches, list) else [*caches]
    return tuple(_anew(left.pop(0))() for _ in range(len(left)))


def _anew(cache: Any) -> Callable[[], Any]:
    return again(cache) if isinstance(cache, Held) else lambda: cache


def waiting_in(caches: Sequence[Any]) -> dict[int, ref[Held]]:
    """Caches that wait on the host, by place. A chunk may free them."""
    return {place: ref(cache) for place, cache in enumerate(caches) if isinstance(cache, Held)}


def trace_again(trace: Any, waiting: Mapping[int, ref[Held]]) -> Callable[[Sequence[Any]], Any]:
    """As ``again``, for a trace; called with the entering caches. Those that it shares with the trace, being on the
    host already, are in its place, and take nothing."""
    places = {id(cache): place for place, one in waiting.items() if (cache := one()) is not None}

    def makes(value: Any) -> Callable[[Sequence[Any]], Any]:
        if (place := places.get(id(value))) is not None:
            return lambda caches: caches[place]
        make = again(value)
        return lambda caches: make()

    if trace is None:
        return lambda caches: None
    if isinstance(trace, tuple):
        parts = [makes(part) for part in trace]
        return lambda caches: tuple(make(caches) for make in parts)
    kind, first = type(trace), trace.first
    inputs, kept = [makes(value) for value in trace.inputs], [makes(value) for value in trace.caches]
    return lambda caches: kind(first, [make(caches) for make in inputs], [make(caches) for make in kept])


def _ledger() -> Ledger:
    ledger = Ledger.active()
    if ledger is None:
        raise ValueError("a planned store only counts, and there is no ledger")
    return ledger


class PlanMeter:
    """Takes the place of the run's ``Meter``: records each stage's bytes and estimated seconds.

    ``absent``: figures of stages that are not computed this time. Their stand-ins are taken to keep as many bytes.
    """

    def __init__(self, ledger: Ledger, absent: Mapping[str, Sequence[Figures]] | None = None) -> None:
        self.stages: dict[str, StagePlan] = {}
        self.visits: list[tuple[str, Figures]] = []
        self.partitioned: list[PlannedZero3] = []
        self._models: list[Any] = []
        self._ledger = ledger
        self._forced: tuple[int, int] | None = None
        """Bytes of card and host when the next stage begins, after one that was not computed."""
        self._absent = {name: iter(visits) for name, visits in (absent or {}).items()}

    def load(self, models: Sequence[torch.nn.Module]) -> None:
        """Counts these models as on the card."""
        self._models = list(models)
        self._ledger.adopt(self._tensors(), WEIGHTS)

    def unload(self) -> None:
        self._models = []

    def _tensors(self) -> Iterator[torch.Tensor]:
        modules = list(self._models)
        while modules:  # without the names that ``parameters()`` makes
            module = modules.pop()
            modules += [child for child in module._modules.values() if child is not None]
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    yield tensor

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures the block. If a stage is entered again, the larger peak is kept and the seconds add up."""
        ledger = self._ledger
        if self.visits:  # what is freed between two stages was not left: the last streamed layer
            if self._forced:
                (ledger.card_bytes, ledger.host_bytes), self._forced = self._forced, None
            last, figures = self.visits[-1]
            self.visits[-1] = last, replace(figures, left=(ledger.card_bytes, ledger.host_bytes))
        ledger.reset_peak()
        came, there, before_it = (ledger.card_bytes, ledger.host_bytes), ledger.items(), ledger.spent
        asleep = ledger.on_card(self._tensors())
        with ExitStack() as gathered:
            for model in self.partitioned:
                gathered.enter_context(model.stage(name))
            yield
        weights = ledger.on_card(self._tensors())
        ledger.wait(ledger.link.quiet(ledger.seconds))  # as the run's meter waits for the device
        spans, left = ledger.spans(), (ledger.card_bytes, ledger.host_bytes)
        figures = Figures(spans, weights, came[0] - asleep, ledger.spent - before_it, came, left, there, ledger.copies)
        if (counted := next(self._absent.get(name, iter(())), None)) is not None:
            kept = [end - start for start, end in zip(counted.came, counted.left, strict=True)]
            self._forced = came[0] + kept[0], came[1] + kept[1]
        self.add(name, figures)

    def add(self, name: str, figures: Figures) -> None:
        """A visit of a stage."""
        self.visits.append((name, figures))
        now = figures.plan()
        for model in self.partitioned:
            now = model.with_gathers(name, now)
        before = self.stages.get(name)
        self.stages[name] = now if before is None else before.and_again(now)

    def take(self) -> tuple[dict[str, float], dict[str, float]]:
        """As ``Meter.take``, but without a reset."""
        rows = self.stages.items()
        return {name: stage.s for name, stage in rows}, {name: stage.peak_gib for name, stage in rows}
