"""Tiny generators with random weights, one for each family: those of its tests.

A family ``x`` has a function ``save_tiny_x`` in ``tests/models/x/_x.py``, which writes a diffusers folder.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from lowmem_drf.models.family import Family

TESTS = Path(__file__).resolve().parents[2] / "tests"
sys.path[:0] = [str(TESTS / "support")]
ELSEWHERE = {"wan": ("_tiny", "save_tiny_generator")}
CLIPS, TOKENS = {"sd3": (32, 32, 1)}, {"sd3": 20}
"""Width, height and frames of a clip, where they are not ToyWorld's; tokens of a prompt, where they are not twelve."""


def name_of(family: Family) -> str:
    """The name of its folder."""
    return str(family.__name__).split(".")[-2]  # type: ignore[attr-defined]  # a module


def clip_of(name: str) -> tuple[int, int, int]:
    return CLIPS.get(name, (32, 32, 9))


def tokens_of(name: str) -> int:
    return TOKENS.get(name, 12)


def writer_of(name: str) -> Callable[[Path], Path] | None:
    """What writes a tiny generator into a folder; ``None`` if the family has no such function."""
    module, function = ELSEWHERE.get(name, (f"_{name}", f"save_tiny_{name}"))
    folder = str(TESTS / "models" / name)
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        found: Callable[[Path], Path] | None = getattr(importlib.import_module(module), function, None)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        return None
    return found
