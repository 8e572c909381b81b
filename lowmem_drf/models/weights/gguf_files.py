"""GGUF files, as ComfyUI-GGUF and stable-diffusion.cpp write them: tensors quantised in blocks, read in fp32.

The arithmetic of the formats is that of the package ``gguf``. Its reader is not used: it maps the file, and a damaged
length makes it loop without end.
"""

from __future__ import annotations

import math
import struct
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lowmem_drf.errors import BadInputError
from lowmem_drf.libraries import cure
from lowmem_drf.models.weights.reader import Entry
from lowmem_drf.texts import one_line

MAGIC = b"GGUF"
_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
"""Kind of a metadata value -> its form in ``struct``."""
_TEXT, _ARRAY = 8, 9
_MOST_HEADER = 100_000_000
_MOST_DIMS = 8
_SHAPE = "comfy.gguf.orig_shape."
"""Metadata: the shape of a tensor that ComfyUI-GGUF has stored in another one."""
_AT_ONCE = 2**20
"""Numbers dequantised at once; the arithmetic takes several times their memory."""


def is_gguf(file: Path) -> bool:
    """By its content, or by its ending if it is damaged at the beginning."""
    with file.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC or file.suffix.lower() == ".gguf"


class GgufFiles:
    """The tensors of a GGUF file.

    Raises:
        ValueError: a damaged file, described.
        BadInputError: the package ``gguf`` is missing.
    """

    def __init__(self, file: Path) -> None:
        try:
            import gguf
        except ModuleNotFoundError as error:
            if error.name != "gguf":
                raise
            raise BadInputError(
                f"{file} is a GGUF file, which is read with the package gguf. Install it: {cure('gguf')}"
            ) from error
        self._kinds, self._sizes = gguf.GGMLQuantizationType, gguf.GGML_QUANT_SIZES
        self.entries: dict[str, Entry] = {}
        size = file.stat().st_size
        with file.open("rb") as stream:
            try:
                found, facts, end = _Header(stream, size).read()
            except UnicodeDecodeError as error:
                raise ValueError("is damaged: a name in its header is no text") from error
        alignment = facts.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 2**20:
            raise ValueError("is damaged: its header has no valid alignment")
        start = -(-end // alignment) * alignment
        for name, (shape, kind, offset) in found.items():
            try:
                known = self._kinds(kind)
            except ValueError as error:
                raise ValueError(f"is damaged, or too new: {one_line(name, 80)} is of type {kind}") from error
            block, length = self._sizes[known]
            count = math.prod(shape)
            if not shape or shape[-1] % block:
                raise ValueError(f"is damaged: {one_line(name, 80)} is {known.name} of shape {list(shape)}")
            if (last := start + offset + count // block * length) > size:
                raise ValueError(f"is cut off: {size:,} bytes, and {one_line(name, 80)} ends at {last:,}")
            original = facts.get(_SHAPE + name, shape)
            if not isinstance(original, tuple) or any(type(x) is not int for x in original):
                raise ValueError(f"is damaged: the original shape of {one_line(name, 80)} is no list of numbers")
            if math.prod(original) != count or min(original, default=0) < 0:
                raise ValueError(f"is damaged: {one_line(name, 80)} has {count:,} numbers, in {list(original)}")
            self.entries[name] = Entry(file, start + offset, known.name, original)

    def check(self, names: Collection[str]) -> None:
        """Raises ValueError that names the first of these tensors whose format the package cannot read."""
        for kind, name in {self.entries[name].dtype: name for name in names}.items():
            try:
                self._dequantised(bytearray(self._sizes[self._kinds[kind]][1]), kind)
            except NotImplementedError as error:
                raise ValueError(f"is quantised: {one_line(name, 80)} is {kind}") from error

    def reshape(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Gives tensors these shapes where they are stored as the same numbers in the same order: GGUF has at most four
        dimensions, so its writers merge neighbours, and leave out those of size 1."""
        for name, shape in shapes.items():
            entry = self.entries[name]
            stored, wanted = (list(accumulate(sizes, mul, initial=1)) for sizes in (entry.shape, shape))
            if stored[-1] == wanted[-1] and set(stored) <= set(wanted):
                self.entries[name] = replace(entry, shape=shape)

    def read(self, name: str) -> Tensor:
        """In fp32 on the CPU. Raises ValueError if the file was cut off meanwhile."""
        entry = self.entries[name]
        block, length = self._sizes[self._kinds[entry.dtype]]
        made = torch.empty(entry.shape)
        with entry.file.open("rb") as stream:
            stream.seek(entry.start)
            for part in made.view(-1).split(max(1, _AT_ONCE // block) * block):
                raw = bytearray(part.numel() // block * length)
                if stream.readinto(raw) != len(raw):
                    raise ValueError(f"{entry.file} is cut off")
                if raw:
                    part.copy_(self._dequantised(raw, entry.dtype))
        return made

    def said(self, names: Collection[str]) -> tuple[str, list[str]]:
        """In words: how these weights are stored, and what beside them is not used."""
        kinds = Counter(self.entries[name].dtype for name in names)
        return f"{len(names)} tensors are GGUF ({', '.join(f'{n} {kind}' for kind, n in kinds.most_common())})", []

    def _dequantised(self, raw: bytearray, kind: str) -> Tensor:
        from gguf.quants import dequantize

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NaN in a damaged file, which is refused later
            packed: Any = torch.frombuffer(raw, dtype=torch.uint8).view(1, -1).numpy()
            return torch.from_numpy(dequantize(packed, self._kinds[kind])).view(-1)


class _Header:
    """Reads the header of a GGUF file. Raises ValueError that describes the damage."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream, self._size, self._at = stream, size, 0

    def read(self) -> tuple[dict[str, tuple[tuple[int, ...], int, int]], dict[str, Any], int]:
        """(name -> (shape, type, offset in the data), metadata, bytes of the header)."""
        if self._take(4) != MAGIC:
            raise ValueError("is damaged: it does not begin with the header of a GGUF file")
        if (version := self._number("I")) not in (2, 3):
            raise ValueError(f"is damaged, or no file of this kind of machine: GGUF of version {version}")
        tensors, facts = self._number("Q"), dict[str, Any]()
        for _ in range(self._number("Q")):
            key = self._text()
            facts[key] = self._value(self._number("I"))
        found: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(tensors):
            name, dims = self._text(), self._number("I")
            if name in found or dims > _MOST_DIMS:
                raise ValueError(f"is damaged: {one_line(name, 80)} is there twice, or has too many dimensions")
            shape = tuple(self._number("Q") for _ in range(dims))[::-1]
            found[name] = shape, self._number("I"), self._number("Q")
        return found, facts, self._at

    def _take(self, count: int) -> bytes:
        self._at += count
        if self._at > min(self._size, _MOST_HEADER):
            raise ValueError(f"is cut off or damaged: its {self._size:,} bytes end before its header does")
        return self._stream.read(count)

    def _number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self._take(struct.calcsize(f"<{form}")))[0]

    def _text(self) -> str:
        return self._take(self._number("Q")).decode("utf-8")

    def _value(self, kind: int) -> Any:
        """A number, a text, or a tuple of up to eight of them; longer arrays (tokens of text encoders) are skipped."""
        if kind == _TEXT:
            return self._text()
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind != _ARRAY:
            raise ValueError(f"is damaged: its header has a value of kind {kind}")
        inner, count = self._number("I"), self._number("Q")
        if inner == _TEXT:
            for _ in range(count):
                self._take(self._number("Q"))
            return None
        if inner not in _NUMBERS:
            raise ValueError(f"is damaged: its header has an array of kind {inner}")
        form = _NUMBERS[inner]
        raw = self._take(count * struct.calcsize(f"<{form}"))
        return struct.unpack(f"<{count}{form}", raw) if count <= _MOST_DIMS else None
