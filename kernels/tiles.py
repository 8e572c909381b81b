"""Launch configurations (tiles): which block sizes, warps and stages a kernel is tried with, on which card, and why.

A table is a tuple of ``Tile`` at the head of a kernel file. A launch (``Tuned``) takes the tile that was chosen for its
sizes, and without a choice the first one that names the card. Nothing is timed outside of ``timing``, which a run
enters at its start with inputs of its own sizes. Triton's autotuner would time at the first launch, at the memory's
peak, with a buffer of 256 MiB. ``choices`` are what was chosen, for a file; ``take_choices`` takes them again. The
interpreter (``TRITON_INTERPRET=1``, on the CPU, for tests and ToyWorld) takes the first tile.

``variants`` of each kernel file lists what may be launched; ``bench/kernels/resources.py`` and
``tests/kernels/test_compile.py`` compile it ahead of time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
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


@dataclass(frozen=True)
class Choice:
    """The tile that was chosen for a kernel."""

    kernel: str
    case: str
    """What must agree exactly, for example ``"D=128 GROUP=1 bfloat16"``."""
    sizes: tuple[int, ...]
    """Lengths, each rounded up to a power of two."""
    tile: str
    """As ``tile_words`` says it."""


Timer = Callable[[Callable[[], Any]], float]
"""Seconds that a function takes on the card."""

_choices: dict[tuple[str, str, tuple[int, ...]], Choice] = {}
_timer: Timer | None = None
_tuned: list[Tuned] = []


class Tuned:
    """A kernel that is launched as ``kernel[grid](…)`` without the tile's constants, with the tile of its sizes.

    Args:
        fn: the ``triton.jit`` function.
        key: its arguments that the choice depends on. Of lengths, which are passed by position, the next power of two
            counts; of constants, which are passed by name, the value; of tensors that may be left out, whether they are
            there. The first tensor's dtype counts too.
    """

    def __init__(self, fn: Any, tiles: Sequence[Tile], key: Sequence[str]) -> None:
        self.fn, self._tiles = fn, tiles
        self.configs = [triton.Config(dict(t.sizes), num_warps=t.warps, num_stages=t.stages) for t in tiles]
        """One alone is taken whatever was chosen, on any card."""
        self.launched: Any = None
        """The configuration of the last launch."""
        self._places = {name: fn.arg_names.index(name) for name in key}
        self._found: dict[Any, Any] = {}
        _tuned.append(self)

    def of_this_card(self) -> list[Any]:
        """The configurations that may be launched here, the first one by default."""
        if len(self.configs) == 1 or INTERPRETED:
            return self.configs[:1]
        mine = tiles_for(self._tiles, this_card())
        return [config for config, tile in zip(self.configs, self._tiles, strict=True) if tile in mine]

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return lambda *arguments, **constants: self._launch(grid, arguments, constants)

    def _launch(self, grid: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> Any:
        def run(config: Any) -> Any:
            return self.fn[grid](*arguments, **constants, **config.all_kwargs())

        if len(self.configs) == 1 or INTERPRETED:
            self.launched = self.configs[0]
            return run(self.launched)
        sizes, named = [], []
        for name, place in self._places.items():
            value = constants[name] if name in constants else arguments[place]
            if type(value) is int and name not in constants:
                sizes.append(1 << (value - 1).bit_length())
            else:
                named.append(value if type(value) in (int, bool) else value is not None)
        key = arguments[0].dtype, *named, *sizes
        if key not in self._found or _timer is not None:
            self._found[key] = self._choose(self._case(named, constants, arguments[0].dtype), tuple(sizes), run)
        self.launched = self._found[key]
        return run(self.launched)

    def _case(self, named: Iterable[Any], constants: Mapping[str, Any], dtype: torch.dtype) -> str:
        names = [name for name in self._places if name in constants or name.startswith("p_")]
        words = [f"{name}={int(value)}" for name, value in zip(names, named, strict=True)]
        return " ".join([*words, str(dtype).removeprefix("torch.")])

    def _choose(self, case: str, sizes: tuple[int, ...], run: Callable[[Any], Any]) -> Any:
        mine, kernel = self.of_this_card(), self.fn.__name__
        place = kernel, case, sizes
        if _timer is not None and place not in _choices and len(mine) > 1:
            seconds = [_seconds(_timer, run, config) for config in mine]
            best = mine[seconds.index(min(seconds))]
            _choices[place] = Choice(kernel, case, sizes, tile_words(best))
        near = [one for one in _choices.values() if (one.kernel, one.case) == (kernel, case)]
        near = [one for one in near if len(one.sizes) == len(sizes)]  # else a record was edited
        if not near:
            return mine[0]
        wanted = min(near, key=lambda one: sum(abs(math.log2(a / b)) for a, b in zip(one.sizes, sizes, strict=True)))
        return next((config for config in mine if tile_words(config) == wanted.tile), mine[0])


def _seconds(timer: Timer, run: Callable[[Any], Any], config: Any) -> float:
    """A tile that cannot be built, or for which there is no memory, is infinitely slow."""
    try:
        return timer(lambda: run(config))
    except Exception:  # what Triton and CUDA raise has many types
        return math.inf


def tile_words(config: Any) -> str:
    """For example ``"BLOCK_M=128 BLOCK_N=64 8 warps 3 stages"``."""
    sizes = " ".join(f"{name}={value}" for name, value in config.kwargs.items())
    return f"{sizes} {config.num_warps} warps {config.num_stages} stages".lstrip()


@contextmanager
def timing(timer: Timer) -> Iterator[None]:
    """Inside the block, a launch at sizes that have no choice yet times the tiles of this card on its arguments, which
    it may write several times, and keeps the fastest."""
    global _timer
    _timer = timer
    try:
        yield
    finally:
        _timer = None


def choices() -> list[dict[str, Any]]:
    """What was chosen so far, as rows for JSON."""
    return [{**asdict(one), "sizes": list(one.sizes)} for one in _choices.values()]


def take_choices(rows: Iterable[Mapping[str, Any]]) -> None:
    """Forgets all choices and takes these, the rows of ``choices``. Raises KeyError or TypeError for rows that are
    none."""
    taken = [Choice(row["kernel"], row["case"], tuple(row["sizes"]), row["tile"]) for row in rows]
    _choices.clear()
    _choices.update({(one.kernel, one.case, one.sizes): one for one in taken})
    for kernel in _tuned:
        kernel._found.clear()


def tuned(tiles: Sequence[Tile], key: Sequence[str]) -> Callable[[Any], Tuned]:
    """Decorator for a ``triton.jit`` function (``Tuned``)."""
    return lambda fn: Tuned(fn, tiles, key)
