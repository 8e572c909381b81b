"""What ``lowmem-drf eval --json`` prints. ``python -m bench.eval_schema`` writes its JSON schema to docs/."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveInt


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Interval(_Part):
    """A mean over prompts, and its 95% interval."""

    mean: float
    low: float | None
    """``null`` for a difference over fewer than five prompts."""
    high: float | None
    prompts: int
    """Prompts that have the measure."""


class Side(_Part):
    """The base or the tuned model: means over prompts. ``null``: no meaning for these clips, or not asked."""

    reward: float
    """The critic's, on the questions of training, and ``weight`` times the value of every scalar reward."""
    reward_by_aspect: dict[str, float | None]
    """``TA``: the prompt, ``Phy``: physics, ``VQ``: quality; scalar rewards by their names, held-out ones too."""
    heldout_reward: float | None
    """The critic's, on questions that training does not ask, and held-out scalar rewards."""
    diversity: float
    """RMS distance between two clips of one prompt, mean over pairs; 0 with one clip a prompt."""
    velocity_norm: float
    """RMS of the velocity, mean over steps."""
    motion: float | None
    """Mean absolute difference of successive frames, 0 to 1."""
    freeze: float | None
    """Share of frames that are as the one before."""
    flicker: float | None
    """Mean step of the whole picture's brightness against its course, 0 to 1."""
    ti: float | None
    """Temporal information (ITU-T P.910), 0 to 255, mean over frames."""
    si: float | None
    """Spatial information (ITU-T P.910), in levels of 0 to 255, mean over frames."""
    blur: float | None
    """Mean width of edges in pixels."""
    blocking: float | None
    """Strength of the strongest regular grid: about 1 without one."""
    noise: float | None
    """Standard deviation of the luma's noise, 0 to 1, with fine texture."""
    saturation: float | None
    """Mean distance of chroma from gray."""
    second_reward: float | None = None
    """The second critic's (``--critic``)."""
    oracle: dict[str, float] | None = None
    """ToyWorld only: share of clips that are right, by property."""
    drift: dict[str, float] | None = None
    """ToyWorld only: distances from its own scenes, and plain figures of the shapes."""
    vbench: dict[str, float] | None = None
    """VBench's scores by dimension (``--vbench-scores``)."""


class PromptRow(_Part):
    """One prompt: means over its clips, by measure. Members of a group are named as ``oracle.all``."""

    id: str
    prompt: str
    base: dict[str, float]
    tuned: dict[str, float]


class Second(_Part):
    """The second critic."""

    critic: str
    questions: Literal["held out", "of training"]


class Result(_Part):
    """The comparison of a base model with the tuned one."""

    prompts: PositiveInt
    seeds: PositiveInt
    """Clips of each prompt and model."""
    base: Side
    tuned: Side
    change: dict[str, Interval]
    """By measure, named as in ``by_prompt``: tuned - base."""
    wins: dict[Literal["reward", "heldout_reward", "second_reward"], Interval]
    """By reward: the share of prompts on which tuned has the larger one; a tie counts half."""
    by_prompt: list[PromptRow]
    second: Second | None = None
