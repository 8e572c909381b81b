"""Tables of tile sizes: which tiles a kernel runs with, on which card, and why.

A table is a tuple of ``Tile``. On a card Triton's autotuner times those that name it and keeps the fastest for each key
(``tuned``). Interpreted (``TRITON_INTERPRET=1``: on the CPU, for tests and ToyWorld) the first one is used, since the
autotuner needs a driver. Every kernel file lists all possible launches (``variants``), and
``tests/kernels/test_compile.py`` compiles them ahead of time for every card here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Read once at import, as Triton reads it when a kernel is defined."""

CARDS = (80, 86, 89, 90, 120)
"""Compute capabilities: A100; RTX 3090; RTX 4090; H100 and H200; RTX 5090."""

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}
"""Shared memory per block, in KiB (CUDA C++ Programming Guide, technical specifications by compute capability)."""


@dataclass(frozen=True)
class Tile:
    """One tile."""

    sizes: Mapping[str, int]
    """Constants of the kernel, for example ``{"BLOCK_M": 128, "BLOCK_N": 64}``."""
    warps: int
    stages: int
    cards: tuple[int, ...]
    """Subset of ``CARDS`` that tries it."""
    why: str


@dataclass(frozen=True)
class Variant:
    """One possible launch of a kernel, for ahead-of-time compilation."""

    kernel: Any
    """The ``triton.jit`` function, not the autotuner around it."""
    tile: Tile
    types: Mapping[str, str]
    """Every argument that is not a constant, in order: ``"*bf16"``, ``"i32"``, ``"fp32"``."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """The other constants: head dimensions, switches."""

    @property
    def name(self) -> str:
        details = "-".join(
            f"{key.lower()}{value}" for key, value in (*self.constants.items(), *self.tile.sizes.items())
        )
        element = next((kind.lstrip("*") for kind in self.types.values() if kind.startswith("*")), "")
        return f"{self.kernel.__name__}-{element}-{details}-w{self.tile.warps}-s{self.tile.stages}"


def tiles_for(tiles: Sequence[Tile], card: int) -> list[Tile]:
    """The tiles of a card; if it is not in ``CARDS``, those of the next older one."""
    known = max((one for one in CARDS if one <= card), default=CARDS[0])
    return [tile for tile in tiles if known in tile.cards]


def this_card() -> int:
    """The compute capability of the current CUDA device as a number: 8.9 is 89."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def tuned(tiles: Sequence[Tile], key: Sequence[str]) -> Callable[[Any], Any]:
    """Decorates a ``triton.jit`` function: call ``kernel[grid](…)`` without the tile's constants, and it runs with this
    card's fastest tile.

    Args:
        key: names of kernel arguments; a change in one of them times the tiles again.
    """
    configs = [triton.Config(dict(tile.sizes), num_warps=tile.warps, num_stages=tile.stages) for tile in tiles]

    def mine(_: Any, named: Mapping[str, Any], **__: Any) -> list[triton.Config]:
        chosen = tiles_for(tiles, this_card())
        return [config for config, tile in zip(configs, tiles, strict=True) if tile in chosen]

    if INTERPRETED:
        return triton.autotune(configs[:1], key=list(key))
    return triton.autotune(configs, key=list(key), prune_configs_by={"early_config_prune": mine})
