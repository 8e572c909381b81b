"""safetensors files with weights in fp8, plain or with scales as ComfyUI writes them, read in full precision.

    X.weight            fp8
    X.scale_weight      what to multiply it by: one number, or one a row; X.weight_scale in newer files
    X.scale_input       the scale of activations in fp8, which no run here has; X.input_scale in newer files
    scaled_fp8          a marker; in newer files X.comfy_quant, which names the format

Weights that are quantised in any other way are refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from lowmem_drf.models.weights.reader import DTYPES, FLOAT8, INTEGERS, Entry, TensorFiles
from lowmem_drf.texts import one_line, parse_json

_FLOATS = {**DTYPES, **FLOAT8}
_SCALES = ("scale_weight", "weight_scale")
_INPUTS = ("scale_input", "input_scale")
_BY_ENDING = {
    "weight_scale_2": "nvfp4",
    "weight_scale_inv": "fp8 with scales of blocks",
    "wscales": "4 bit of Nunchaku (SVDQuant)",
    "qweight": "4 bit of Nunchaku (SVDQuant), AWQ or GPTQ",
    "absmax": "4 bit of bitsandbytes",
    "SCB": "int8 of bitsandbytes",
}
_BY_DTYPE = {"I8": "int8", "U8": "4 or 8 bit in bytes", "F4": "fp4", "F8_E8M0": "mxfp8"}
_MOST_FORMAT = 4096
"""Bytes of a marker that names a format."""


class Fp8Files:
    """The weights of safetensors files. Scales and markers are not among ``entries``. Raises ValueError if a weight has
    two scales."""

    def __init__(self, files: TensorFiles) -> None:
        self._files, self._scales, self._inputs, self.entries = files, dict[str, str](), set[str](), dict[str, Entry]()
        for name, entry in files.entries.items():
            module, _, ending = name.rpartition(".")
            weight = f"{module}.weight"
            if ending in _SCALES and weight in files.entries:
                if self._scales.setdefault(weight, name) != name:
                    raise ValueError(f"has two scales of {one_line(weight, 80)}")
            elif ending in _INPUTS and weight in files.entries:
                self._inputs.add(weight)
            elif ending not in ("scaled_fp8", "comfy_quant"):
                self.entries[name] = entry

    def check(self, names: Collection[str]) -> None:
        """Raises ValueError that names the first of these tensors that is quantised in another way."""
        for name in names:
            entry, (module, _, ending) = self.entries[name], name.rpartition(".")
            by_name = _BY_ENDING.get(ending, "4 bit of bitsandbytes" if "bitsandbytes__" in ending else "")
            scheme = (ending == "weight" and self._other_format(module)) or by_name or _BY_DTYPE.get(entry.dtype)
            if scheme or entry.dtype not in _FLOATS:
                raise ValueError(f"is quantised: {one_line(name, 80)} is {scheme or entry.dtype}")
            if name in self._scales:
                scale, rows = self._files.entries[self._scales[name]], entry.shape[:1]
                if scale.dtype not in DTYPES:
                    scheme = "mxfp8" if scale.dtype in ("U8", "F8_E8M0") else f"scaled in {scale.dtype}"
                    raise ValueError(f"is quantised: {one_line(name, 80)} is {scheme}")
                one_a_row = scale.shape[:1] == rows and math.prod(scale.shape) == math.prod(rows)
                if math.prod(scale.shape) != 1 and not one_a_row:
                    held = f"{list(entry.shape)} weights have scales of shape {list(scale.shape)}"
                    raise ValueError(f"is quantised in blocks: the {held} ({one_line(name, 80)})")

    def read(self, name: str) -> Tensor:
        """On the CPU: fp32 if it was fp8 or had a scale, else in the file's dtype."""
        value = self._files.read(name, _FLOATS)
        if name in self._scales:
            scale = self._files.read(self._scales[name])
            exact = value.to(torch.float64 if value.dtype == torch.float64 else torch.float32)
            del value
            return exact.mul_(scale.to(exact.dtype).view(-1, *[1] * (exact.dim() - 1)))
        return value.float() if value.dtype in FLOAT8.values() else value

    def said(self, names: Collection[str]) -> tuple[str, list[str]]:
        """In words: how these weights are stored, if not in full precision, and what beside them is not used."""
        low = sum(self.entries[name].dtype in FLOAT8 for name in names)
        scaled, inputs = (len(set(names) & found) for found in (self._scales.keys(), self._inputs))
        stored = f"{low} of {len(names)} tensors are fp8" + (f", {scaled} have a scale" if scaled else "")
        return stored if low or scaled else "", [f"{inputs} scales of activations"] if inputs else []

    def _other_format(self, module: str) -> str:
        """The format that a layer's marker names, unless it is fp8 with a scale; "" without a marker."""
        marker = f"{module}.comfy_quant"
        if marker not in self._files.entries:
            return ""
        try:
            if math.prod(self._files.entries[marker].shape) > _MOST_FORMAT:
                raise ValueError("too long")
            made = parse_json(self._files.read(marker, INTEGERS).to(torch.uint8).numpy().tobytes())
            form, turned = made["format"], made.get("convrot")
        except (ValueError, TypeError, KeyError, AttributeError):
            return "in an unknown format"
        plain = isinstance(form, str) and form.startswith(("float8_e4m3fn", "float8_e5m2")) and not turned
        return "" if plain else one_line(f"{form}{' with convrot' * bool(turned)}", 80)
