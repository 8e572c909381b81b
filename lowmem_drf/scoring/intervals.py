"""Intervals over prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

RESAMPLES = 4000
FEWEST = 5
"""Prompts of an interval of a difference."""
Z = 1.96
"""Standard deviations on each side of a normal distribution's middle that hold 95%."""

Row = Mapping[str, float]
"""Measures of one prompt by name. A name that is not there was not measured, or has no meaning for these clips."""
Interval = dict[str, float | int | None]


def changes(base: Sequence[Row], tuned: Sequence[Row]) -> dict[str, Interval]:
    """By measure: the mean difference tuned - base over prompts, between its ``low`` and ``high`` end.

    An interval is the bootstrap's over prompts, since clips of one prompt are no independent evidence, drawn from a
    fixed seed. Its percentiles are expanded: as they are, they would be too narrow for few prompts (Hesterberg, "What
    Teachers Should Know About the Bootstrap", 2015). Below ``FEWEST`` there is none: ``low`` and ``high`` are ``None``.
    """
    names = list(dict.fromkeys(name for row in base for name in row))
    values_PK = _table(tuned, names) - _table(base, names)
    ends_2K = _bootstrap(values_PK)
    found: dict[str, Interval] = {}
    for k, name in enumerate(names):
        values = values_PK[:, k][~values_PK[:, k].isnan()]
        if len(values):
            low, high = ends_2K[:, k].tolist() if len(values) >= FEWEST else (None, None)
            found[name] = {"mean": values.mean().item(), "low": low, "high": high, "prompts": len(values)}
    return found


def win_rates(base: Sequence[Row], tuned: Sequence[Row], names: Sequence[str]) -> dict[str, Interval]:
    """By measure: the share of prompts for which tuned is the larger one, a tie counting half. The interval is
    Wilson's: the bootstrap's has no width where all prompts are won."""
    found: dict[str, Interval] = {}
    for name in names:
        pairs = [(b[name], t[name]) for b, t in zip(base, tuned, strict=True) if name in b and name in t]
        if pairs:
            share, count = sum(1.0 if t > b else 0.5 if t == b else 0.0 for b, t in pairs) / len(pairs), len(pairs)
            middle = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
            half = Z / (1 + Z**2 / count) * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
            ends = {"low": max(0.0, middle - half), "high": min(1.0, middle + half)}
            found[name] = {"mean": share, **ends, "prompts": count}
    return found


def _table(rows: Sequence[Row], names: Sequence[str]) -> Tensor:
    """(prompts, names), NaN where a prompt has no value."""
    return torch.tensor([[row.get(name, torch.nan) for name in names] for row in rows], dtype=torch.float64)


def _bootstrap(values_PK: Tensor) -> Tensor:
    """(2, K): the ends of the interval of each column's mean; NaN is left out."""
    prompts, here_PK = len(values_PK), (~values_PK.isnan()).double()
    drawn_RP = torch.randint(prompts, (RESAMPLES, prompts), generator=torch.Generator().manual_seed(0))
    once_RP = torch.ones(1, 1, dtype=torch.float64).expand_as(drawn_RP)
    times_RP = torch.zeros(RESAMPLES, prompts, dtype=torch.float64).scatter_add_(1, drawn_RP, once_RP)
    means_RK = times_RP @ values_PK.nan_to_num() / (times_RP @ here_PK)
    ends = [
        means_RK[:, k].nanquantile(torch.tensor([tail, 1 - tail], dtype=torch.float64))
        for k, tail in enumerate(map(_tail, here_PK.sum(0).tolist()))
    ]
    return torch.stack(ends, 1)


def _tail(count: float) -> float:
    """The share of resamples beyond each end: what a normal distribution has beyond Student's t of ``count`` values,
    times the root of n / (n - 1), because resamples spread as if divided by n."""
    if count < FEWEST:
        return 0.0
    free = count - 1
    student = Z + (Z**3 + Z) / (4 * free) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * free**2)
    return 0.5 * math.erfc(student * math.sqrt(count / free) / math.sqrt(2))
