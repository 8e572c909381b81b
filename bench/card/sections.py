"""The sections in order of value. Each is a function that yields rows, in a process of its own."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bench.card.rows import Row


@dataclass(frozen=True)
class Section:
    """``limit_s``: the most it may take, a slow card and a first compilation included."""

    name: str
    limit_s: float
    code: str = ""
    """``module:function`` in ``bench.card``."""
    argument: str | None = None

    def rows(self) -> Iterator[Row]:
        module, name = self.code.split(":")
        function: Callable[..., Iterator[Row]] = getattr(importlib.import_module(f"bench.card.{module}"), name)
        return function(*([self.argument] if self.argument else []))


SECTIONS = (
    Section("versions", 120, "checks:versions"),
    Section("conv3d", 90, "conv3d:conv3d"),
    Section("attention", 180, "attention:attention"),
    Section("int8-attention", 90, "attention:int8"),
    Section("tiles", 180, "tiles:tiles"),
    Section("host-store", 60, "host:host_store"),
    Section("row-ops", 150, "attention:row_ops"),
    Section("rtx4090-24gb", 420, "presets:preset", "rtx4090"),
    Section("rtx3060-12gb", 420, "presets:preset", "rtx3060"),
    Section("rtx4060-8gb", 420, "presets:preset", "rtx4060"),
    Section("wan14b-24gb", 600, "presets:preset", "rtx4090-wan14b"),
    Section("toyworld", 300, "toyworld:toyworld"),
)
BY_NAME = {section.name: section for section in SECTIONS}
