"""Rows of the table: decorators that make one from a function that fills a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from bench.lora.facts import LoraFile
from bench.lora.names import COMFY, Names, blocks

Filler = Callable[[LoraFile], None]
FULL = blocks(2)
"""Every Linear of both blocks."""


@dataclass(frozen=True)
class Row:
    """One kind of file. ``kind``: for those to be refused, words that the message has to contain, any one of them."""

    name: str
    make: Callable[[], LoraFile]
    kind: tuple[str, ...] = ()
    module: str = ""
    """A module that the refusal has to name, in either naming."""
    of_model: bool = False
    """It is the model that the file does not fit: ``inspect-lora``, which has none, reads it."""
    hangs: bool = False
    """diffusers' loader never ends."""

    def made(self) -> LoraFile:
        return _made(self)


@cache
def _made(row: Row) -> LoraFile:
    return row.make()


class Rows(list[Row]):
    """Rows of one module. Its methods are decorators."""

    def layout(
        self, name: str, names: Names, dtype: torch.dtype = torch.float32, layers: int = 2
    ) -> Callable[[Filler], Filler]:
        """The function fills a file that is to be read."""

        def add(fill: Filler) -> Filler:
            self.append(Row(name, _maker(fill, name, names, dtype, layers)))
            return fill

        return add

    def refused(
        self, name: str, names: Names = COMFY, *kind: str, module: str = "", of_model: bool = False
    ) -> Callable[[Filler], Filler]:
        """The function fills a file that is to be refused with one of the words ``kind`` in the message."""

        def add(fill: Filler) -> Filler:
            def changes_nothing(file: LoraFile) -> None:
                fill(file)
                file.changes.clear()

            # diffusers doubles alpha / rank until it is near 1
            hangs = name == "alpha negative"
            self.append(
                Row(name, _maker(changes_nothing, name, names, torch.float32, 2), kind, module, of_model, hangs)
            )
            return fill

        return add


def _maker(fill: Filler, name: str, names: Names, dtype: torch.dtype, layers: int) -> Callable[[], LoraFile]:
    def make() -> LoraFile:
        file = LoraFile(names, layers, dtype, seed=len(name))
        fill(file)
        return file

    return make


def pairs(
    modules: Sequence[str] = FULL, rank: int = 4, alpha: float | None = None, header: dict[str, str] | None = None
) -> Filler:
    """Fills a file with pairs of one rank."""

    def fill(file: LoraFile) -> None:
        file.header.update(header or {})
        for module in modules:
            file.pair(module, rank, alpha)

    return fill


def add_pair(file: LoraFile, stem: str, ends: tuple[str, str] = (".lora_A.weight", ".lora_B.weight")) -> None:
    """Adds tensors that are no part of the file's change, under a name of any tool."""
    file.tensors[stem + ends[0]], file.tensors[stem + ends[1]] = file.random(4, 24), file.random(24, 4)
