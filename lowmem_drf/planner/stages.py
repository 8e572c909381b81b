"""Figures of a plan: counted in each stage of an update (``Figures``), printed (``StagePlan``), and of the whole update
(``Plan``). Without PyTorch, for plans that are read from the disk."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Self

from lowmem_drf.planner.cards import GIB, SPARE, fits_in, free_of

if TYPE_CHECKING:
    from lowmem_drf.planner.costs import Counters

Key = tuple[str, tuple[int, ...], Any]
"""Operator, shape, dtype."""

WEIGHTS = "weights"

Label = tuple[Hashable, int]
"""The mark where a span begins, and how often it was there before in the stage."""
MIDDLE = "middle"
"""The mark of blocks that are neither among the first nor among the last of their stack (``depths``)."""

STAGES = ("text", "rollout", "decode", "critic", "vae_backward", "denoise_backward", "update")
ONCE = ("text", "update")
"""Stages that do not repeat for every micro-batch."""

SUMS = ("s", "stall_s", "copy_s", "moved_gib", "tflop", "between_gib", "more_s")
"""Fields of ``StagePlan`` that add up."""


@dataclass(frozen=True, slots=True)
class Item:
    """Storages alive at a peak that one operator made, in one shape and dtype."""

    op: str
    """The operator, or the name given to ``adopt``."""
    shape: tuple[int, ...]
    dtype: Any
    count: int
    bytes: int

    @property
    def key(self) -> Key:
        return self.op, self.shape, self.dtype

    def __str__(self) -> str:
        many = f"{self.count} x " if self.count > 1 else ""
        return f"{many}{self.op} {'x'.join(map(str, self.shape))} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True, slots=True)
class Span:
    """The peaks between two marks of a ledger, and the items of the card's, largest first."""

    card: int
    host: int
    items: tuple[Item, ...] = ()

    def extended(self, other: Span, steps: int) -> Span:
        """See ``Figures.extended``."""
        card, host = other.card + steps * (other.card - self.card), other.host + steps * (other.host - self.host)
        return Span(card, host, _extended(other.items, self.items, other.items, steps))


def _extended(items: Sequence[Item], fewer: Sequence[Item], more: Sequence[Item], steps: int) -> tuple[Item, ...]:
    """``items``, each plus ``steps`` times what ``more`` has of its kind beyond ``fewer``."""
    first, second = ({item.key: item for item in counted} for counted in (fewer, more))
    grown = []
    for item in items:
        if item.key in first and item.key in second:
            was, now = first[item.key], second[item.key]
            count, size = item.count + steps * (now.count - was.count), item.bytes + steps * (now.bytes - was.bytes)
            item = replace(item, count=count, bytes=size)
        grown.append(item)
    return tuple(sorted(grown, key=lambda item: -item.bytes))


class UnlikeError(ValueError):
    """Two depths of the same stacks ran differently, so nothing can be said of a third."""


@dataclass(frozen=True)
class Figures:
    """What a ledger counted in one visit of a stage, in bytes. Bytes are the card's, except the host's."""

    spans: Mapping[Label, Span]
    weights: int
    kept: int
    """Everything else that was there when the stage began."""
    spent: Counters
    came: tuple[int, int] = (0, 0)
    """Bytes of card and host when the stage began."""
    left: tuple[int, int] = (0, 0)
    """The same at its end."""
    there: tuple[Item, ...] = ()
    """The items on the card when the stage began."""
    copies: int = 0
    """What cuDNN copies of its largest convolution (``Ledger.copies``)."""
    what: str = ""
    """In place of the largest items."""

    def extended(self, other: Figures, steps: int) -> Figures:
        """The figures of deeper stacks, from those of two depths: ``other`` plus ``steps`` times the difference. Raises
        UnlikeError if the two have different spans."""
        spans, others = ({k: v for k, v in one.spans.items() if k[0] != MIDDLE} for one in (self, other))
        if spans.keys() != others.keys():
            raise UnlikeError("two depths of the same stacks ran differently")
        return replace(
            self.begun(other, steps),
            spans={label: span.extended(others[label], steps) for label, span in spans.items()},
            spent=other.spent + (other.spent - self.spent) * steps,
        )

    def begun(self, other: Figures, steps: int) -> Figures:
        """What is there at the stage's beginning and end, extended; the rest is unchanged."""

        def grown(now: int, before: int) -> int:
            return now + steps * (now - before)

        return replace(
            self,
            weights=grown(other.weights, self.weights),
            kept=grown(other.kept, self.kept),
            came=(grown(other.came[0], self.came[0]), grown(other.came[1], self.came[1])),
            left=(grown(other.left[0], self.left[0]), grown(other.left[1], self.left[1])),
            there=_extended(other.there, self.there, other.there, steps),
        )

    def moved(self, to: Figures) -> Figures:
        """The same stage where it begins with what is there in ``to``."""
        card, host = (now - before for now, before in zip(to.came, self.came, strict=True))
        spans = {
            label: Span(one.card + card, one.host + host, _extended(one.items, self.there, to.there, 1))
            for label, one in self.spans.items()
        }
        left = (self.left[0] + card, self.left[1] + host)
        return replace(to, spans=spans, spent=self.spent, left=left, copies=self.copies)

    def plan(self) -> StagePlan:
        peak, spent = max(self.spans.values(), key=lambda span: span.card), self.spent
        largest = [item for item in peak.items if item.op != WEIGHTS][:3]
        return StagePlan(
            peak_gib=peak.card / GIB,
            weights_gib=self.weights / GIB,
            kept_gib=self.kept / GIB,
            host_gib=max(span.host for span in self.spans.values()) / GIB,
            s=spent.seconds,
            stall_s=spent.stalled,
            copy_s=spent.copying,
            moved_gib=(spent.to_host + spent.to_card) / GIB,
            between_gib=spent.between / GIB,
            tflop=spent.flops / 1e12,
            copies_gib=self.copies / GIB,
            more_s=spent.more,
            what=self.what or "; ".join(f"{item} ({item.bytes / GIB:.2f} GiB)" for item in largest),
        )


@dataclass(frozen=True)
class StagePlan:
    """One stage of the update. GiB are the card's, except ``host_gib``."""

    peak_gib: float
    weights_gib: float
    """Models on the card."""
    kept_gib: float
    """Everything else that was there when the stage began."""
    host_gib: float
    s: float
    """Estimated."""
    stall_s: float
    """Part of ``s`` in which the computation waits for copies between card and host."""
    copy_s: float
    """Summed duration of these copies; all but ``stall_s`` of it overlaps with computation."""
    moved_gib: float
    """Moved by these copies, both directions."""
    tflop: float
    what: str
    """The largest allocations alive at the peak, except weights."""
    between_gib: float = 0.0
    """Part of ``moved_gib`` that this process's card exchanges with those of other processes."""
    copies_gib: float = 0.0
    """Beyond ``peak_gib``: what cuDNN copies of its largest convolution."""
    more_s: float = 0.0
    """Seconds that computation would take beyond ``s`` if the card decided against 8 bit wherever that is ``auto``."""

    @property
    def needs_gib(self) -> float:
        """What must be free for PyTorch: more than the bytes that it is asked for."""
        return self.peak_gib * (1 + SPARE) + self.copies_gib

    def and_again(self, now: StagePlan) -> StagePlan:
        """Both visits of a stage: the larger peaks are kept, the seconds add up."""
        return self._summed([self, now], [1, 1])

    def averaged(self, others: Sequence[Self], shares: Sequence[float]) -> Self:
        """The stage in updates of several kinds: the larger peaks, and the mean of what adds up. ``shares``: of the
        updates, by kind."""
        return self._summed([self, *others], shares)

    def _summed(self, rows: Sequence[Self], factors: Sequence[float]) -> Self:
        sums = {key: sum(times * getattr(row, key) for row, times in zip(rows, factors, strict=True)) for key in SUMS}
        most = {key: max(getattr(row, key) for row in rows) for key in ("host_gib", "copies_gib")}
        return replace(max(reversed(rows), key=lambda row: row.peak_gib), **sums, **most)


@dataclass(frozen=True)
class Outcome:
    """What settings that were changed lead to."""

    peak_gib: float
    host_gib: float
    update_s: float


@dataclass(frozen=True)
class Plan:
    """Memory and time of a configuration, for each process."""

    card: str
    vram_gib: float
    """The whole card."""
    stages: dict[str, StagePlan]
    update_s: float
    free_gib: float | None = None
    """What PyTorch can take of the card. ``None``: what ``cards.free_of`` says."""
    measured: bool = False
    """Whether that was measured on the card."""
    applied: tuple[str, ...] = ()
    """Settings (``key=value``) that make it fit and keep the gradient; the figures are with them."""
    changes: tuple[str, ...] = ()
    """If it does not fit: settings that make it fit."""
    changed: Outcome | None = None
    """With ``changes``."""
    processes: int = 1
    rollout: Literal["gathered", "partitioned"] | None = None
    """With ZeRO-3: where the transformer's weights are during the rollout."""

    @property
    def peak_gib(self) -> float:
        return self.stages[self.largest].peak_gib

    @property
    def largest(self) -> str:
        """The stage with the highest peak."""
        return max(self.stages, key=lambda name: self.stages[name].peak_gib)

    @property
    def host_gib(self) -> float:
        return max(stage.host_gib for stage in self.stages.values())

    @property
    def all_host_gib(self) -> float:
        """All processes together, as if they ran on one machine."""
        return self.host_gib * self.processes

    @property
    def exact_s(self) -> float | None:
        """``update_s`` if nothing were in 8 bit, where the card decides on it; longer computation hides copies that
        are waited for now. ``None``: it decides on nothing."""
        rows = [stage for name, stage in self.stages.items() if name != "text"]
        if not any(row.more_s for row in rows):
            return None
        return self.update_s + sum(max(row.more_s - row.stall_s, min(row.more_s, 0.0)) for row in rows)

    @property
    def moved_gib(self) -> float:
        """Over the card's link in the first update, including the encoding of the texts before it."""
        return sum(stage.moved_gib for stage in self.stages.values())

    @property
    def between_gib(self) -> float:
        """Part of ``moved_gib`` that processes exchange."""
        return sum(stage.between_gib for stage in self.stages.values())

    @property
    def stall_share(self) -> float:
        """Share of an update's time spent waiting for copies between card and host."""
        return sum(stage.stall_s for name, stage in self.stages.items() if name != "text") / self.update_s

    @property
    def hidden_share(self) -> float:
        """Share of the copies' time that overlaps with computation; 1 if there are no copies."""
        copying = sum(stage.copy_s for name, stage in self.stages.items() if name != "text")
        return max(0.0, 1 - self.stall_share * self.update_s / copying) if copying else 1.0

    @property
    def room_gib(self) -> float:
        """What PyTorch can take of the card."""
        return free_of(self.vram_gib) if self.free_gib is None else self.free_gib

    @property
    def tightest(self) -> str:
        """The stage that needs most."""
        return max(self.stages, key=lambda name: self.stages[name].needs_gib)

    @property
    def usable_gib(self) -> float:
        """The highest peak that the tightest stage may have."""
        return fits_in(self.room_gib, self.stages[self.tightest].copies_gib)

    @property
    def fits(self) -> bool:
        return self.stages[self.tightest].needs_gib <= self.room_gib

    def averaged(self, others: Sequence[Self], shares: Sequence[float]) -> Self:
        """As ``StagePlan.averaged``."""
        stages = {
            name: stage.averaged([other.stages[name] for other in others], shares)
            for name, stage in self.stages.items()
        }
        update_s = sum(stage.s for name, stage in stages.items() if name != "text")
        return replace(self, stages=stages, update_s=update_s)

    def as_json(self, preset: str) -> dict[str, Any]:
        figures = (
            *("card", "vram_gib", "room_gib", "usable_gib", "fits", "peak_gib", "host_gib", "processes"),
            *("all_host_gib", "rollout", "moved_gib", "between_gib", "update_s", "stall_share", "hidden_share"),
        )
        return {
            "preset": preset,
            **{name: getattr(self, name) for name in figures},
            "stages": {name: asdict(stage) for name, stage in self.stages.items()},
            "applied": list(self.applied),
            "changes": list(self.changes),
            "changed": asdict(self.changed) if self.changed else None,
        }

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Self:
        """The inverse of ``dataclasses.asdict``, also by way of JSON. Raises TypeError or KeyError for other things."""
        stages = {name: StagePlan(**stage) for name, stage in row["stages"].items()}
        settings = {key: tuple(row[key]) for key in ("applied", "changes")}
        return cls(**{**row, "stages": stages, **settings, "changed": row["changed"] and Outcome(**row["changed"])})
