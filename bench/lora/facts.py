"""A LoRA file in the making, and the change of every parameter that it stands for, computed in fp64 from the tensors as
the file holds them, by the published rule of the tool that writes such files.

An error is measured against a bound: the rounding of computing the change once in fp32, and for files in 16 or 8 bit
one rounding of their dtype.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bench.lora.names import Names

ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float8_e4m3fn: 2**-4, torch.float8_e5m2: 2**-3}
"""Largest relative error of one rounding to a dtype. Files in fp32 and fp64 are to be exact."""
FP32, FP64 = 2**-24, 2**-53
TINY = dict(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
    freq_dim=16, ffn_dim=32, cross_attn_norm=True, rope_max_seq_len=32,
)  # fmt: skip


@dataclass(frozen=True)
class Change:
    """What a file adds to one parameter, fp64, and the error that a right reader may make."""

    delta: Tensor
    bound: Tensor


@cache
def base_weights(layers: int) -> dict[str, Tensor]:
    """Random parameters of a tiny Wan transformer, fp64, by diffusers' names."""
    generator = torch.Generator().manual_seed(layers)
    shapes = {name: parameter.shape for name, parameter in _empty(layers).named_parameters()}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(shape[-1])
        for name, shape in shapes.items()
    }


def base_model(layers: int, dtype: torch.dtype = torch.float64) -> Any:
    """The transformer with these parameters, frozen."""
    model = torch.nn.Module.to(_empty(layers), dtype).requires_grad_(False).eval()  # diffusers' own warns
    model.load_state_dict(base_weights(layers), strict=False)
    return model


def _empty(layers: int) -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(num_layers=layers, **TINY)


class LoraFile:
    """Methods named after parts of a file add its tensors, and what they change to ``changes``."""

    def __init__(self, names: Names, layers: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0):
        self.names, self.layers, self.dtype = names, layers, dtype
        self.base = base_weights(layers)
        self.tensors: dict[str, Tensor] = {}
        self.header: dict[str, str] = {}
        self.beside: dict[str, str | bytes] = {}
        """Files in the same folder: their text by name."""
        self.file, self.give_folder = "lora.safetensors", False
        self.expert: Literal["low", "high"] | None = None
        self.has_more = False
        """Tensors are left out rightly: of a text encoder, or of another transformer."""
        self.relative: set[str] = set()
        """Parameters whose change depends on their value."""
        self.trainable = True
        """A LoRA on Linears can make these changes, so that training can go on from it."""
        self.changes: dict[str, Change] = {}
        self._generator = torch.Generator().manual_seed(seed)

    def random(self, *shape: int, size: float = 0.3) -> Tensor:
        """Values that the file's dtype holds."""
        return (size * torch.randn(shape, generator=self._generator)).to(self.dtype)

    def put(self, module: str, end: str, tensor: Tensor) -> Tensor:
        """Adds a tensor under the tool's name; returns it in fp64."""
        self.tensors[self.names.key(module, end)] = tensor
        return tensor.double()

    def alpha(self, module: str, value: float | Tensor | None) -> None:
        if value is not None:
            number = value.clone() if isinstance(value, Tensor) else torch.tensor(value, dtype=self.dtype)
            self.put(module, ".alpha", number)

    def pair(
        self,
        module: str,
        rank: int = 4,
        alpha: float | Tensor | None = None,
        scale: float | None = None,
        shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
    ) -> None:
        """B and A, with an ``.alpha`` if one is given. The change is scale * B A, by default alpha / rank, else 1.

        ``shapes``: of A and B, where they are not (rank, in) and (out, rank).
        """
        out, *rest = self.base[f"{module}.weight"].shape
        shape_a, shape_b = shapes or ((rank, math.prod(rest)), (out, rank))
        self.alpha(module, alpha)
        a = self.put(module, self.names.a, self.random(*shape_a)).flatten(1)
        b = self.put(module, self.names.b, self.random(*shape_b)).flatten(1)
        if scale is None:
            scale = 1.0 if alpha is None else float(alpha) / rank
        self.changed(f"{module}.weight", scale * (b @ a), abs(scale) * (b.abs() @ a.abs()), rank + 4)

    def changed(self, parameter: str, delta: Tensor, size: Tensor | None = None, roundings: int = 1) -> None:
        """Adds to a parameter's change. ``size``: the same formula on absolute values; default: of ``delta``."""
        before, shape = self.changes.get(parameter), self.base[parameter].shape
        self.trainable = self.trainable and len(shape) == 2
        delta = delta.double().reshape(shape)
        size = delta.abs() if size is None else size.double().reshape(shape)
        bound = size * (roundings * FP32 + ROUNDING.get(self.dtype, 0.0))
        bound = bound + 32 * FP64 * (self.base[parameter].abs().max() + size)
        if before is not None:
            delta, bound = before.delta + delta, before.bound + bound
        self.changes[parameter] = Change(delta, bound)

    def whole(self, module: str, end: str, parameter: str, size: float = 0.1) -> None:
        """A full-size difference of the module's ``parameter`` ("weight", "bias", or "" for the name itself)."""
        name = f"{module}.{parameter}" if parameter else module
        self.changed(name, self.put(module, end, self.random(*self.base[name].shape, size=size)))

    def peft_config(self, **config: Any) -> None:
        """An adapter_config.json in the file's folder."""
        self.beside["adapter_config.json"] = json.dumps({"peft_type": "LORA", **config})

    def adapter_header(self, **config: Any) -> None:
        """diffusers' entry in the header."""
        plain = {f"transformer.{key}": value for key, value in config.items()}
        self.header["lora_adapter_metadata"] = json.dumps(plain)

    def write(self, folder: Path) -> Path:
        """Writes the files; returns what the user would name."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self.beside.items():
            (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
        if self.tensors:
            contiguous = {key: value.contiguous() for key, value in self.tensors.items()}
            save_file(contiguous, folder / self.file, self.header or None)
        return folder if self.give_folder else folder / self.file


def worst(found: Mapping[str, Tensor], file: LoraFile, roundings: int = 0) -> float:
    """The largest error over its bound among all parameters. Infinity: an unknown parameter, or NaN.

    ``roundings`` in fp32 of the whole matrix are allowed besides, as a decomposition makes.
    """
    largest = 0.0
    for name, base in file.base.items():
        expected = file.changes.get(name)
        bound = 64 * FP64 * base.abs().max() if expected is None else expected.bound
        if expected is not None and roundings:
            bound = bound + roundings * FP32 * expected.delta.norm()
        delta = found.get(name, torch.zeros(()))
        error = (delta.double() - (0.0 if expected is None else expected.delta)).abs() / bound
        largest = max(largest, math.inf if not bool(error.isfinite().all()) else float(error.max()))
    return math.inf if found.keys() - file.base.keys() else largest


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Warnings and log lines of libraries are no part of the table."""
    from diffusers.utils import logging as diffusers_logging

    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        diffusers_logging.set_verbosity(before)
