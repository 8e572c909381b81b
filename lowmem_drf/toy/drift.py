"""How far generated clips have drifted from ToyWorld's own: what is neither right nor wrong, as distances between
distributions.

The oracle's rates say whether a clip shows what was asked. A reward says nothing of what it does not ask, and there a
tuned model drifts: shapes grow, sizes become one size, edges soften. Each of the oracle's ``Looks`` is compared with
scenes drawn for the same prompts, after the VAE, by the Wasserstein-1 distance of the two distributions: 0 means as in
this world.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lowmem_drf.toy.oracle import Looks
from lowmem_drf.toy.scenes import Combo, all_combos

SCALES: dict[str, float] = {
    "size": 0.7,  # half of what RADIUS spans
    "edge": 0.6,  # pixels; half of the way from the VAE's edges to those that count as blurred
    "outline": 0.1,  # half of the way from the VAE's outlines to a blob without a form
    "saturation": 0.2,
    "texture": 0.05,  # as NOISE_STD
    "speed": 0.2,  # half of what SPEED spans
    "x": 4.0,  # an eighth of the picture
    "y": 4.0,
}
"""Distances that a person sees at a glance: the unit of ``drift``."""
DRAWN = 16
"""Scenes drawn of each combination."""
FILE = Path(__file__).parent / "weights" / "looks.safetensors"
QUANTILES = 256


def reference(combos: Sequence[Combo]) -> Looks:
    """The looks of scenes of these combinations, ``DRAWN`` of each, as ToyWorld's VAE shows them: a generator of
    latents cannot do better (``toy/build/looks.py``)."""
    from safetensors.torch import load_file

    order = {combo: number for number, combo in enumerate(all_combos())}
    looks = load_file(FILE)["looks"][[order[combo] for combo in combos]]
    return Looks(*looks.flatten(0, 1).unbind(-1))


def join(parts: Sequence[Looks]) -> Looks:
    """The looks of several batches as one."""
    return Looks(*(torch.cat(values) for values in zip(*parts, strict=True)))


def wasserstein(a: Tensor, b: Tensor) -> float:
    """Wasserstein-1 distance of two samples (A,) and (B,), in their unit, from ``QUANTILES`` quantiles of each."""
    levels = (torch.arange(QUANTILES, device=a.device) + 0.5) / QUANTILES
    return (a.float().quantile(levels) - b.float().quantile(levels)).abs().mean().item()


def drift(looks: Looks, real: Looks) -> dict[str, float]:
    """Distance by look, in units of ``SCALES``, and ``mean``, their mean; clips without a shape are left out, and
    some must show one. A sample of few clips is never at 0."""
    shown = looks.size > 0
    pairs = zip(Looks._fields, looks, real, strict=True)
    distances = {name: wasserstein(a[shown], b) / SCALES[name] for name, a, b in pairs}
    return {**distances, "mean": sum(distances.values()) / len(distances)}
