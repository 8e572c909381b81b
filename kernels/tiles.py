"""Launch configurations (tiles): which block sizes, warps and stages a kernel is tried with, on which card, and why.

A table is a tuple of ``Tile`` at the head of a kernel file. On a card, Triton's autotuner times the tiles that name the
card and keeps the fastest for each key (``tuned``). The interpreter (``TRITON_INTERPRET=1``, on the CPU, for tests and
ToyWorld) takes the first tile, because the autotuner needs a driver. ``variants`` of each kernel file lists what may be
launched; ``bench/kernels/resources.py`` and ``tests/kernels/test_compile.py`` compile it ahead of time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Triton reads the setting when a kernel is defined, so this module does too."""

CARDS = (80, 86, 89, 90, 120)
"""Compute capabilities: A100; RTX 3090; RTX 4090; H100 and H200; RTX 5090."""

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}
"""Shared memory per block (CUDA C++ Programming Guide, technical specifications per compute capability)."""


@dataclass(frozen=True)
class Tile:
    """One launch configuration."""

    sizes: Mapping[str, int]
    """Constants of the kernel, for example ``{"BLOCK_M": 128, "BLOCK_N": 64}``."""
    warps: int
    stages: int
    cards: tuple[int, ...]
    """The compute capabilities that try it, from ``CARDS``."""
    why: str


@dataclass(frozen=True)
class Variant:
    """One kernel as it may be launched: the input of ahead-of-time compilation."""

    kernel: Any
    """The ``triton.jit`` function, without the autotuner."""
    tile: Tile
    types: Mapping[str, str]
    """Arguments that are not constants, in order: ``"*bf16"``, ``"fp32"``, ``"i32"``; ``"i32:16"``: divisible by 16."""
    constants: Mapping[str, Any]
    """Constants that the tile does not hold: head dimensions, switches."""

    @property
    def name(self) -> str:
        details = "-".join(f"{key.lower()}{value}" for key, value in {**self.constants, **self.tile.sizes}.items())
        element = next((kind.lstrip("*") for kind in self.types.values() if kind.startswith("*")), "")
        return f"{self.kernel.__name__}-{element}-{details}-w{self.tile.warps}-s{self.tile.stages}"


def variant(kernel: Any, tile: Tile, element: str, constants: Mapping[str, Any], **kinds: str) -> Variant:
    """A variant on tensors of ``element``. Arguments named ``p_…`` are pointers to it and all others int32, except
    where ``kinds`` gives the type (of a pointer, the type it points to). Needs Triton's compiler: an interpreted kernel
    does not say which of its parameters are constants."""
    types = {}
    for parameter in kernel.params:
        name = parameter.name
        if not parameter.is_constexpr and name not in constants:
            pointer = name.startswith("p_")
            types[name] = "*" * pointer + kinds.get(name, element if pointer else "i32")
    return Variant(kernel, tile, types, constants)


def tiles_for(tiles: Sequence[Tile], card: int) -> list[Tile]:
    """The tiles of a card; for one that ``CARDS`` does not have, the tiles of the next older one."""
    known = max((one for one in CARDS if one <= card), default=CARDS[0])
    return [tile for tile in tiles if known in tile.cards]


def this_card() -> int:
    """Compute capability of the current CUDA device as one number: 89 for 8.9."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def tuned(tiles: Sequence[Tile], key: Sequence[str]) -> Callable[[Any], Any]:
    """Decorator for a ``triton.jit`` function: ``kernel[grid](…)`` is called without the tile's constants and takes the
    fastest tile of this card.

    Args:
        key: arguments of the kernel; the tiles are timed again when one of them changes.
    """
    configs = [triton.Config(dict(tile.sizes), num_warps=tile.warps, num_stages=tile.stages) for tile in tiles]

    def mine(_: Any, named: Mapping[str, Any], **__: Any) -> list[triton.Config]:
        chosen = tiles_for(tiles, this_card())
        return [config for config, tile in zip(configs, tiles, strict=True) if tile in chosen]

    if INTERPRETED:
        return triton.autotune(configs[:1], key=list(key))
    return triton.autotune(configs, key=list(key), prune_configs_by={"early_config_prune": mine})
