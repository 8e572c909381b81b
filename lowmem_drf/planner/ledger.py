"""Counts live bytes, operations and traffic of the code that runs under it, for the plan and for tests.

A dispatch mode sees every storage that PyTorch allocates and learns when it is freed, so it counts what a caching
allocator would be asked for, on real and on fake tensors (``fakes``). Without CUDA fake tensors are fake CPU tensors;
``planned_store`` marks those that would wait in host memory (``on_host``).

Not counted: the CUDA context, the allocator's fragments, and what cuDNN and cuBLAS take inside a kernel. The largest of
that, cuDNN's copies of a convolution's tensors, is noted apart (``copies``).
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem_drf.assembly.eight_bit import PRODUCTS
from lowmem_drf.memory.host import IN_FLIGHT
from lowmem_drf.planner.cards import HALF_BACKWARD
from lowmem_drf.planner.costs import EITHER, INT8, Counters, Pcie, Rates, facts, half_fits, in_16_bit, kind_of
from lowmem_drf.planner.fakes import DEVICE_OF, Fakes, key_of, tensors_of
from lowmem_drf.planner.stages import MIDDLE, Item, Key, Label, Span

NOTED_GROWTH = 0.005
"""The items of a peak are listed each time it has grown by this share, so the list may miss that share."""

T = TypeVar("T")

_Price = tuple[int, float, int, float]
"""FLOPs, seconds, bytes that cuDNN copies, and the seconds that 16 bit would take more."""
_Peak = tuple[list[tuple[Key, int, int]], tuple["Item", ...]]
"""What was alive at a peak, and what more was for a moment. Made into items where they are asked for: a peak that is
found on the way up is soon another's."""


@dataclass(slots=True)
class _Kind:
    """Storages on the card that are alive now and share a ``Key``."""

    count: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Cost:
    """Cost of a computation that ``shortcut`` skips: peak bytes above those alive before, and totals."""

    card: int
    host: int
    spent: Counters
    items: tuple[Item, ...]
    """What the peak holds more, or less, than was alive before."""
    copies: int
    """As ``Ledger.copies``, of this computation."""


class Ledger(TorchDispatchMode):
    """Live and peak bytes on card and host; with ``rates`` also the seconds that the operations would take.

    Args:
        block: bytes; the size of each storage is rounded up to a multiple (512 in the CUDA allocator).
        rates: the card's. Each operation takes as long as its arithmetic or its memory traffic, whichever is longer.
        fakes: the mode around this one, if there is one: known results come straight from it.
        auto: settings of 8 bit that are left to the card (``eight_bit.LEVERS``). What runs in 8 bit then counts the
            bytes of the larger of both ways, and in ``more`` the seconds that 16 bit would take more.
    """

    _stack: ClassVar[list[Ledger]] = []

    def __init__(
        self, block: int = 1, rates: Rates | None = None, fakes: Fakes | None = None, auto: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self._fakes = fakes
        self.card_bytes = self.host_bytes = self.peak_card_bytes = self.peak_host_bytes = 0
        self.flops = 0
        self.seconds = self.stalled = self.more = 0.0
        self._undecided = {INT8 if key == PRODUCTS else "int8 attention" for key in auto}
        self._either = EITHER if PRODUCTS in auto else {}
        self._peak: _Peak = ([], ())
        self.copies = 0
        """Since ``reset_peak``: bytes of the largest convolution's input and output. cuDNN copies both into the layout
        that its kernels have, and PyTorch before that an input with gaps."""
        self._block, self._rates = block, rates
        self.link = Pcie(rates.link if rates else math.inf, IN_FLIGHT)
        self._earlier = Counters()
        self._paused = False
        self._named: str | None = None
        self._live: dict[int, tuple[int, bool, _Kind, weakref.ref[Any]]] = {}
        self._kinds: defaultdict[Key, _Kind] = defaultdict(_Kind)
        self._facts: dict[int, Any] = {}
        self._prices: dict[Hashable, _Price] = {}
        self._costs: dict[Hashable, _Cost] = {}
        self._noted_bytes = 0
        self._rising = False
        self._spans: dict[Label, Span] = {}
        self._label: Label = ("", 0)
        self._times: defaultdict[Hashable, int] = defaultdict(int)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in ``Fakes``

    @classmethod
    def active(cls) -> Ledger | None:
        """The innermost ledger that is counting."""
        return cls._stack[-1] if cls._stack else None

    def __enter__(self) -> Ledger:
        self._stack.append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.remove(self)

    def reset_peak(self) -> None:
        """Sets the peaks to the bytes alive now, and forgets all marks."""
        self._spans, self._label, self._times = {}, ("", 0), defaultdict(int)
        self.copies = 0
        self._restart()

    def mark(self, label: Hashable) -> None:
        """Ends a span, and begins one that is named by this label and how often it was there before (``MIDDLE``: by
        the label alone). Peaks are those of the present span."""
        self._end_span()
        self._label = (label, self._times[label])
        self._times[label] += label != MIDDLE
        self._restart()

    def spans(self) -> dict[Label, Span]:
        """All spans since ``reset_peak``."""
        self._end_span()
        return self._spans

    def _end_span(self) -> None:
        now, before = Span(self.peak_card_bytes, self.peak_host_bytes, self.close_peak()), self._spans.get(self._label)
        if before is not None:
            items = now.items if now.card > before.card else before.items
            now = Span(max(now.card, before.card), max(now.host, before.host), items)
        self._spans[self._label] = now

    def _restart(self) -> None:
        self.peak_card_bytes, self.peak_host_bytes = self.card_bytes, self.host_bytes
        self._noted_bytes, self._rising = 0, True

    def adopt(self, tensors: Iterable[Tensor], name: str = "weights") -> None:
        """Counts tensors that already exist, such as weights."""
        for tensor in tensors:
            self._see(tensor, name)

    def on_host(self, tensor: Tensor) -> None:
        """Counts the tensor's storage, which views share, as host memory."""
        self._see(tensor, "host")
        key = tensor.untyped_storage()._cdata
        size, host, kind, ref = self._live[key]
        if not host:
            self._live[key] = (size, True, kind, ref)
            self._count(size, kind, -1)
            self.host_bytes += size
            self.peak_host_bytes = max(self.peak_host_bytes, self.host_bytes)

    def leave_out(self, tensor: Tensor) -> None:
        """Stops counting the tensor's storage: the planned run does not hold it as a whole."""
        self._see(tensor, "left out")
        key = tensor.untyped_storage()._cdata
        size, host, kind, ref = self._live[key]
        self._uncount(size, host, kind)
        self._live[key] = (0, False, _Kind(count=1), ref)

    def on_card(self, tensors: Iterable[Tensor]) -> int:
        """Bytes of the tensors' storages that are on the card, each counted once."""
        keys = {tensor.untyped_storage()._cdata for tensor in tensors}
        return sum(size for size, host, *_ in (self._live[key] for key in keys if key in self._live) if not host)

    def shortcut(self, key: Hashable, run: Callable[[], T], stand_in: Callable[[], T]) -> T:
        """Returns ``run()`` and stores its cost under ``key``; from the second call on returns ``stand_in()``, a result
        of the same size, and adds the stored cost.

        Only valid if ``run`` keeps nothing: no graph, and no more memory of card and host than ``stand_in`` does.
        """
        if (cost := self._costs.get(key)) is not None:
            self._touch(cost.card, *cost.items)
            self.peak_host_bytes = max(self.peak_host_bytes, self.host_bytes + cost.host)
            self.copies = max(self.copies, cost.copies)
            self._add(cost.spent)
            with self.off_the_clock():
                return stand_in()
        before, copies_before = (self.card_bytes, self.host_bytes, self.spent), self.copies
        self.copies = 0
        outside = (self.peak_card_bytes, self.peak_host_bytes, self._peak, self._noted_bytes, self._rising)
        alive = self.items()
        self._restart()
        result = run()
        peak, host_peak = self.peak_card_bytes, self.peak_host_bytes
        less = (replace(item, count=-item.count, bytes=-item.bytes) for item in alive)
        items = _summed(self.close_peak(), less)
        spent = self.spent - before[2]
        self._costs[key] = _Cost(peak - before[0], host_peak - before[1], spent, items, self.copies)
        self.copies = max(self.copies, copies_before)
        if outside[0] >= peak:
            self.peak_card_bytes, _, self._peak, self._noted_bytes, self._rising = outside
        self.peak_host_bytes = max(outside[1], host_peak)
        return result

    @property
    def spent(self) -> Counters:
        """Totals so far."""
        link = self.link
        moved = (link.down_bytes, link.up_bytes, link.between_bytes)
        return self._earlier + Counters(self.flops, self.seconds, self.stalled, link.busy_s, *moved, self.more)

    def wait(self, until: float) -> None:
        """The computation waits until this time."""
        if until > self.seconds:
            self.stalled += until - self.seconds
            self.seconds = until

    @contextmanager
    def off_the_clock(self, name: str | None = None) -> Iterator[None]:
        """Operations in the block take none of the card's time; for copies over the link. ``name`` replaces the
        operator's name in the items."""
        before, (self._paused, self._named) = (self._paused, self._named), (True, name)
        try:
            yield
        finally:
            self._paused, self._named = before

    def _add(self, spent: Counters) -> None:
        self.flops += spent.flops
        self.seconds += spent.seconds
        self.stalled += spent.stalled
        self.more += spent.more
        self._earlier += replace(spent, flops=0, seconds=0.0, stalled=0.0, more=0.0)

    def close_peak(self) -> tuple[Item, ...]:
        """``at_peak``, updated if nothing was freed since the peak."""
        if self._rising:
            self._note()
        return self.at_peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE_OF:
            return args[0].device
        kwargs = kwargs or {}
        fact = self._facts.get(id(func))
        if fact is None:
            name, formula, workspace = facts(func)
            fact = self._facts[id(func)] = (name, formula, workspace or self._either.get(name), func.is_view)
        name, formula, workspace, is_view = fact
        known = None
        if self._fakes is not None:
            key, tensors = key_of(func, args, kwargs)
            known = self._fakes.known(key)
        if known is None:
            out = func(*args, **kwargs)
            outputs = [out] if isinstance(out, Tensor) else tensors_of((out,))
        else:
            out, outputs = known.rebuild(tensors)
        for tensor in outputs:  # also of views: what they look at may have been made before
            self._see(tensor, self._named or name)
        if workspace:
            size = workspace(*args)
            self._touch(size, Item(f"{name}, its workspace", (size // 4,), torch.float32, 1, size))
        if formula or not is_view:
            price = None if known is None else self._prices.get(key)
            if price is None:
                price = self._price(func, args, kwargs, out, outputs, formula)
                if known is not None:
                    self._prices[key] = price
            flops, seconds, copied, more = price
            self.flops += flops
            self.copies = max(self.copies, copied)
            if not self._paused:
                self.seconds += seconds
                self.more += more
        return out

    def _see(self, tensor: Tensor, op: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        size = -(-storage.nbytes() // self._block) * self._block
        kind = self._kinds[op, tensor.shape, tensor.dtype]
        self._live[key] = (size, False, kind, weakref.ref(storage, partial(self._gone, key)))
        self._count(size, kind)
        if self.card_bytes > self.peak_card_bytes:
            self.peak_card_bytes, self._rising = self.card_bytes, True

    def _touch(self, size: int, *items: Item) -> None:
        """Counts ``size`` bytes, ``items``, that were alive for a moment."""
        if self.card_bytes + size > self.peak_card_bytes:
            self.peak_card_bytes, self._rising = self.card_bytes + size, True
            self._note(*items)

    def _gone(self, key: int, _: Any) -> None:
        if self._rising:
            self._note()
        size, host, kind, _ = self._live.pop(key)
        self._uncount(size, host, kind)

    def _note(self, *more: Item) -> None:
        self._rising = False
        if self.peak_card_bytes <= self._noted_bytes * (1 + NOTED_GROWTH):
            return
        self._noted_bytes = self.peak_card_bytes
        self._peak = (self._alive(), more)

    @property
    def at_peak(self) -> tuple[Item, ...]:
        """The items of ``peak_card_bytes``, largest first."""
        alive, more = self._peak
        return tuple(sorted(_summed(map(_item, alive), more), key=lambda item: -item.bytes))

    def items(self) -> tuple[Item, ...]:
        """Everything alive on the card."""
        return tuple(map(_item, self._alive()))

    def _alive(self) -> list[tuple[Key, int, int]]:
        return [(key, kind.count, kind.bytes) for key, kind in self._kinds.items() if kind.count]

    def _count(self, size: int, kind: _Kind, sign: int = 1) -> None:
        kind.count += sign
        kind.bytes += sign * size
        self.card_bytes += sign * size

    def _uncount(self, size: int, host: bool, kind: _Kind) -> None:
        if host:
            self.host_bytes -= size
        else:
            self._count(size, kind, -1)

    def _price(
        self, func: Any, args: Any, kwargs: Any, out: Any, outputs: list[Tensor], formula: Callable[..., int] | None
    ) -> _Price:
        flops, copied = 0, 0
        if formula:
            flops = int(formula(*args, **kwargs, out_val=out))
            if kind_of(func) == "conv3d":
                copied = args[0].nbytes * (1 if args[0].is_contiguous() else 2) + outputs[0].nbytes
        if self._rates is None or func.is_view:
            return flops, 0.0, copied, 0.0
        moved = sum([tensor.numel() * tensor.element_size() for tensor in (*tensors_of(args, kwargs), *outputs)])
        seconds = max(flops / self._rate(func, args, kwargs, outputs) if flops else 0.0, moved / self._rates.bytes)
        other = None
        if self._undecided:
            other = in_16_bit(func, args, outputs, flops, moved, self._rates, self._undecided)
        return flops, seconds, copied, 0.0 if other is None else other - seconds

    def _rate(self, func: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> float:
        assert self._rates is not None
        dtype, rates, kind = outputs[0].dtype, self._rates, kind_of(func)
        peak = rates.flops.get(dtype, rates.flops[torch.float32])
        if dtype is torch.float32 and kind == "conv3d":
            peak = rates.convolution
        elif kind == INT8:
            peak = rates.int8 or peak
        elif HALF_BACKWARD in rates.shares and kind == "attention backward" and half_fits(args, kwargs):
            kind = HALF_BACKWARD
        return peak * rates.shares.get(kind, 1.0)


def _item(alive: tuple[Key, int, int]) -> Item:
    return Item(*alive[0], *alive[1:])


def _summed(*groups: Iterable[Item]) -> tuple[Item, ...]:
    """One item for each ``Key``, of the sum of counts and bytes, if that is not nothing."""
    kinds: defaultdict[Key, _Kind] = defaultdict(_Kind)
    for item in chain(*groups):
        kinds[item.key].count += item.count
        kinds[item.key].bytes += item.bytes
    return tuple(Item(*key, kind.count, kind.bytes) for key, kind in kinds.items() if kind.count)
