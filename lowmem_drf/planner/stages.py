"""What a plan says: of every stage of an update, and of all together."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lowmem_drf.planner.cards import USABLE

STAGES = ("text", "rollout", "decode", "critic", "vae_backward", "denoise_backward", "update")
ONCE = ("text", "update")
"""Not once for every micro-batch."""

SUMS = ("s", "stall_s", "copy_s", "moved_gib", "tflop", "between_gib")
"""Fields of ``StagePlan`` that add up."""


@dataclass(frozen=True)
class StagePlan:
    """One stage of the update. GiB of the card, but for ``host_gib``."""

    peak_gib: float
    weights_gib: float
    """Of the models that are awake."""
    kept_gib: float
    """What else was there when the stage began."""
    host_gib: float
    s: float
    """An estimate."""
    stall_s: float
    """Of that, what the computation waits for copies between card and host."""
    copy_s: float
    """What these copies take, each by itself: all but ``stall_s`` of it is hidden behind computation."""
    moved_gib: float
    """By these copies, both ways together."""
    tflop: float
    what: str
    """The largest things alive at the peak, weights apart."""
    between_gib: float = 0.0
    """Of ``moved_gib``, what this process's card sends to those of other processes and gets from them."""


@dataclass(frozen=True)
class Plan:
    """What a configuration takes; of several processes, each of them."""

    card: str
    vram_gib: float
    """The whole card."""
    stages: dict[str, StagePlan]
    update_s: float
    changes: tuple[str, ...] = field(default=())
    """Settings (``key=value``) that make it fit, where it does not."""
    processes: int = 1
    rollout: Literal["gathered", "partitioned"] | None = None
    """With ZeRO-3: how the transformer's weights are in the rollout."""

    @property
    def peak_gib(self) -> float:
        """Of the whole run."""
        return self.stages[self.largest].peak_gib

    @property
    def largest(self) -> str:
        """The stage whose peak is that of the run."""
        return max(self.stages, key=lambda name: self.stages[name].peak_gib)

    @property
    def host_gib(self) -> float:
        return max(stage.host_gib for stage in self.stages.values())

    @property
    def all_host_gib(self) -> float:
        """Of all processes together, as if they were on one machine."""
        return self.host_gib * self.processes

    @property
    def moved_gib(self) -> float:
        """Over the card's link in an update, the encoding of the texts before the first one with it."""
        return sum(stage.moved_gib for stage in self.stages.values())

    @property
    def between_gib(self) -> float:
        """Of that, between processes."""
        return sum(stage.between_gib for stage in self.stages.values())

    @property
    def stall_share(self) -> float:
        """Of an update's time, what it waits for copies between card and host."""
        return sum(stage.stall_s for name, stage in self.stages.items() if name != "text") / self.update_s

    @property
    def hidden_share(self) -> float:
        """Of the time of these copies, what is hidden behind computation; 1 where there are none."""
        copying = sum(stage.copy_s for name, stage in self.stages.items() if name != "text")
        return max(0.0, 1 - self.stall_share * self.update_s / copying) if copying else 1.0

    @property
    def usable_gib(self) -> float:
        return self.vram_gib * USABLE

    @property
    def fits(self) -> bool:
        return self.peak_gib <= self.usable_gib

    def as_json(self, preset: str) -> dict[str, Any]:
        return {
            "preset": preset,
            "card": self.card,
            "vram_gib": self.vram_gib,
            "usable_gib": self.usable_gib,
            "fits": self.fits,
            "peak_gib": self.peak_gib,
            "host_gib": self.host_gib,
            "processes": self.processes,
            "all_host_gib": self.all_host_gib,
            "rollout": self.rollout,
            "moved_gib": self.moved_gib,
            "between_gib": self.between_gib,
            "update_s": self.update_s,
            "stall_share": self.stall_share,
            "hidden_share": self.hidden_share,
            "stages": {name: asdict(stage) for name, stage in self.stages.items()},
            "changes": list(self.changes),
        }
