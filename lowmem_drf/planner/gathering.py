"""Which partitioned weights ZeRO-3 has on a card, and when: the rules of DeepSpeed's coordinator, counted without any
tensor.

After deepspeed 0.19.8, ``runtime/zero/partitioned_param_coordinator.py``. Entering a module gathers what it lacks, then
what comes next in the pass that was recorded: ``prefetch_bucket_size`` numbers more for every module that is entered.
The modules with few weights or none, which a pass begins with, so let it run far ahead, up to ``max_live_parameters``:
it is that key which bounds the card's memory, not the bucket. Only whole tensors are gathered: either bound may be
passed by part of one, and that of ``max_live_parameters`` by a block that a backward begins with.

A recorded pass is a forward and its backward. Forwards alone follow its first half, so from the second update on
nothing is gathered late; in the first one DeepSpeed records, and gathers nothing ahead: it takes less memory and more
time than is counted here. After a forward alone the weights that its backward would begin with stay gathered until the
next pass begins, or until somebody lets go of them (``drop``).

``max_reuse_distance`` keeps nothing: what is given up at a step is found out once, in the first pass that follows a
recorded one, and that is a forward alone, where no module comes twice (``__params_to_release`` is cached, whatever is
recorded later).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Rules:
    """Numbers of weights."""

    ahead: int
    """``stage3_prefetch_bucket_size``."""
    live: int
    """``stage3_max_live_parameters``."""
    stays: int
    """``stage3_param_persistence_threshold``."""


class Flight:
    """Tensors that are gathered together."""

    def __init__(self, weights: Sequence[Weight]) -> None:
        self.weights = tuple(weights)
        self.awaited = set(map(id, weights))
        self.here = False


class Weight:
    """A tensor of a partitioned model."""

    __slots__ = ("flight", "held", "here", "marked", "numel")

    def __init__(self, numel: int) -> None:
        self.numel = numel
        self.here = False
        """All of it is on the card."""
        self.flight: Flight | None = None
        """What it was gathered with, until it is waited for."""
        self.marked = -1
        """The last step of the pass for which it was looked at."""
        self.held = False
        """It is not given up."""


class Carrier(Protocol):
    """Moves the bytes."""

    def start(self, flight: Flight) -> None:
        """The gather of these tensors begins."""
        ...

    def arrive(self, flight: Flight) -> None:
        """It is waited for: each of its tensors gets memory of its own."""
        ...

    def land(self, flight: Flight) -> None:
        """All of them were waited for: what they were gathered into is free."""
        ...

    def free(self, weight: Weight) -> None:
        """The tensor is given up."""
        ...


class Gathering:
    """The gathered weights of one model.

    Args: modules: the weights of each module that has some, in any order. Those that stay on the card are left out by
        the caller. course: a forward and its backward: places in ``modules``, in the order in which they are entered. A
        block that is computed again in its backward is entered twice there.
    """

    def __init__(
        self, modules: Sequence[Sequence[Weight]], course: Sequence[int], rules: Rules, carrier: Carrier
    ) -> None:
        self._modules, self._course, self._rules, self._carrier = (
            [tuple(weights) for weights in modules],
            tuple(course),
            rules,
            carrier,
        )
        self._flights: list[Flight] = []
        self.begin()

    def begin(self) -> None:
        """A forward begins."""
        self._give_up_flights()
        self._queue = deque(
            (weight, step) for step, place in enumerate(self._course) for weight in self._modules[place]
        )
        for weights in self._modules:
            for weight in weights:
                weight.marked = -1
        self._step = -1
        self._live = 0  # what the pass before has left here is not counted

    def enter(self, place: int | None) -> None:
        """A module is entered (``None``: one without weights): its weights are here from now on, until ``leave``."""
        weights = () if place is None else self._modules[place]
        if place is not None:
            self._step = next(
                (step for step in range(self._step + 1, len(self._course)) if self._course[step] == place), self._step
            )
        if missing := [weight for weight in weights if not weight.here and weight.flight is None]:
            self._gather(missing)
        for weight in weights:
            self._wait(weight)
        self._take_off_the_queue([weight for weight in weights if weight.marked < self._step])
        self._look_ahead()

    def leave(self, place: int) -> None:
        """The module is left."""
        for weight in self._modules[place]:
            self._free(weight)

    def hold(self) -> None:
        """From here on nothing is given up, until ``drop``."""
        for weights in self._modules:
            for weight in weights:
                weight.held = True

    def drop(self) -> None:
        """Nothing is on the card any more."""
        self._give_up_flights()
        for weights in self._modules:
            for weight in weights:
                weight.held = False
                self._free(weight)

    @property
    def numel(self) -> int:
        """Numbers that are here or on their way."""
        return sum(
            weight.numel for weights in self._modules for weight in weights if weight.here or weight.flight is not None
        )

    def _gather(self, weights: Sequence[Weight]) -> None:
        flight = Flight(weights)
        for weight in weights:
            weight.flight = flight
            self._live += weight.numel
        self._flights.append(flight)
        self._carrier.start(flight)

    def _wait(self, weight: Weight) -> None:
        flight = weight.flight
        if flight is None:
            return
        if not flight.here:
            flight.here = True
            self._carrier.arrive(flight)
            for one in flight.weights:
                one.here = True
        weight.flight = None
        flight.awaited.discard(id(weight))
        if not flight.awaited:
            self._flights.remove(flight)
            self._carrier.land(flight)

    def _take_off_the_queue(self, weights: Sequence[Weight]) -> None:
        missing = set(map(id, weights))
        while self._queue and missing:
            weight, weight.marked = self._queue[0][0], self._queue[0][1]
            self._queue.popleft()
            missing.discard(id(weight))

    def _look_ahead(self) -> None:
        room = min(self._rules.live - self._live, self._rules.ahead)
        chosen: dict[int, Weight] = {}
        numel = 0
        while self._queue and numel < room:
            weight, step = self._queue.popleft()
            weight.marked = max(weight.marked, step)
            if not weight.here and weight.flight is None and id(weight) not in chosen:
                chosen[id(weight)] = weight
                numel += weight.numel
        if chosen:
            self._gather(list(chosen.values()))

    def _give_up_flights(self) -> None:
        for flight in list(self._flights):
            for weight in flight.weights:
                if weight.flight is flight:
                    self._wait(weight)
                    self._free(weight)

    def _free(self, weight: Weight) -> None:
        if weight.here and weight.flight is None and not weight.held:
            weight.here = False
            self._live -= weight.numel
            self._carrier.free(weight)
