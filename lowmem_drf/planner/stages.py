"""The result of a plan: figures for each stage of an update, and for the whole update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from lowmem_drf.planner.cards import USABLE

STAGES = ("text", "rollout", "decode", "critic", "vae_backward", "denoise_backward", "update")
ONCE = ("text", "update")
"""Stages that do not repeat for every micro-batch."""

SUMS = ("s", "stall_s", "copy_s", "moved_gib", "tflop", "between_gib")
"""Fields of ``StagePlan`` that add up."""


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


@dataclass(frozen=True)
class Plan:
    """Memory and time of a configuration, for each process."""

    card: str
    vram_gib: float
    """The whole card."""
    stages: dict[str, StagePlan]
    update_s: float
    changes: tuple[str, ...] = ()
    """If it does not fit: settings (``key=value``) that make it fit."""
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
    def usable_gib(self) -> float:
        return self.vram_gib * USABLE

    @property
    def fits(self) -> bool:
        return self.peak_gib <= self.usable_gib

    def as_json(self, preset: str) -> dict[str, Any]:
        figures = (
            *("card", "vram_gib", "usable_gib", "fits", "peak_gib", "host_gib", "processes", "all_host_gib"),
            *("rollout", "moved_gib", "between_gib", "update_s", "stall_share", "hidden_share"),
        )
        return {
            "preset": preset,
            **{name: getattr(self, name) for name in figures},
            "stages": {name: asdict(stage) for name, stage in self.stages.items()},
            "changes": list(self.changes),
        }

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Self:
        """The inverse of ``dataclasses.asdict``, also by way of JSON. Raises TypeError or KeyError for other things."""
        stages = {name: StagePlan(**stage) for name, stage in row["stages"].items()}
        return cls(**{**row, "stages": stages, "changes": tuple(row["changes"])})
