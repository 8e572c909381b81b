"""Verifies that an exported LoRA or merged model is the tuned model: loads it as its users will, compares, runs it.

The tolerance follows from the file's dtype alone. Rounding changes a value x by at most u |x| + eta (u the unit
roundoff, eta half the spacing of subnormals), at most twice (here, and in a reader that folds alpha into 16-bit
weights); this bounds every entry of every B A. The bound on outputs follows to first order: the LoRA's effect times the
largest relative error of a module, plus the rounding of the fp32 computation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowmem_drf.errors import LowmemError
from lowmem_drf.models.family import ImageCondition
from lowmem_drf.models.generators import blocks_of, family_of
from lowmem_drf.models.lora.adapter import attach_lora, lora_layers, lora_scale, remove_lora
from lowmem_drf.models.lora.changes import LoraChanges
from lowmem_drf.models.lora.formats import diffusers_reads_kohya
from lowmem_drf.models.lora.readers import attach_as_diffusers, load_as_diffusers
from lowmem_drf.models.lora.reading import read_lora
from lowmem_drf.models.weights.reader import TensorFiles, files_in
from lowmem_drf.shortage import shortage_of

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

Factors = tuple[float, Tensor, Tensor]
"""scaling, A, B: the LoRA adds scaling B A to a module's weight."""

_SIGMAS = (0.95, 0.5, 0.1)
_ROWS = 256
"""Rows of B A compared at once: 57 MB in fp64 for the widest layer of Wan2.1-14B."""
_SMALL = 4  # patches per side of the probe: uses all weights, with small activations


@dataclass(frozen=True)
class Verified:
    """Difference between the outputs of the written file and of the tuned model."""

    difference: float
    """Largest absolute difference of the velocity over the probes."""
    effect: float
    """Largest change of the velocity by the LoRA, on the same probes."""
    by: str
    """The library that read it back."""
    of: str = "the tuned model's output"
    """The output that was compared, in addition to the weights of every module."""

    def __str__(self) -> str:
        return (
            f"Verified: read back by {self.by}; maximum difference from {self.of} {self.difference:.1e} "
            f"(the LoRA itself changes the output by {self.effect:.1e})."
        )


@dataclass(frozen=True)
class Probe:
    """Outputs of the tuned model and of its base on fixed random inputs."""

    tuned: Tensor
    base: Tensor

    @property
    def effect(self) -> float:
        return _largest(self.tuned - self.base)


def probe_lora(transformer: Any, lora: LoraChanges) -> Probe:
    """Runs the base with and without the LoRA, and removes it. Raises BadInputError for a LoRA of another model."""
    attach_lora(transformer, lora)
    try:
        tuned = _run(transformer)
        with lora_scale(transformer, 0):
            base = _run(transformer)
    finally:
        remove_lora(transformer)
    if not bool(torch.isfinite(tuned).all()):
        raise LowmemError(
            "The tuned model's output is not finite, so there is nothing worth exporting. Choose an earlier checkpoint "
            "with --step."
        )
    return Probe(tuned, base)


def verify_export(path: Path, lora: LoraChanges, form: str, dtype: torch.dtype, transformer: Any) -> Verified:
    """Loads ``path`` with ``load_lora_weights`` of diffusers' pipeline and compares weights and outputs with the tuned
    model. A kohya file without all modules, which diffusers cannot convert, is loaded with ``read_lora``.

    ``transformer``: the base, fp32; restored afterwards. If only its first blocks have values, outputs are those of
    these blocks; the weights of all modules are compared in any case.

    Raises:
        LowmemError: a module is missing or unexpected, or differs by more than rounding.
    """
    tuned = probe_lora(transformer, lora)
    by_diffusers = form != "kohya" or diffusers_reads_kohya(lora, family_of(transformer))
    try:
        if by_diffusers:
            attach_as_diffusers(transformer, path)
        else:
            attach_lora(transformer, read_lora(path))
        read = {name: _factors(layer) for name, layer in lora_layers(transformer).items()}
        output = _run(transformer)
    except Exception as error:
        if shortage_of(error):  # the file is not to blame
            raise
        problem = f"The exported file cannot be loaded ({type(error).__name__}: {error})"
        raise LowmemError(f"{problem}. It was deleted; export in another --format.") from error
    finally:
        if lora_layers(transformer):
            remove_lora(transformer)
    error_share = _require_same_weights(read, lora, dtype)
    difference = _largest(output - tuned.tuned)
    bound = error_share * tuned.effect + _rounding(transformer, tuned.tuned)
    if not difference <= bound:
        raise LowmemError(
            f"The exported file does not reproduce the tuned model: outputs differ by {difference:.1e}, rounding "
            f"explains {bound:.1e}. It was deleted."
        )
    count, total, of = len(_with_values(transformer)), len(blocks_of(transformer)), Verified.of
    if count < total:
        of = f"the output of the tuned model's first {count} blocks (of {total}; the weights of all were compared)"
    return Verified(difference, tuned.effect, "diffusers" if by_diffusers else "lowmem-drf", of)


def require_same_model(transformer: Any, tuned: Probe) -> None:
    """Raises LowmemError unless a model merged in fp32 equals the tuned model up to fp32 rounding."""
    difference, bound = _largest(_run(transformer) - tuned.tuned), _rounding(transformer, tuned.tuned)
    if not difference <= bound:
        raise LowmemError(
            f"The merged model is not the tuned one: outputs differ by {difference:.1e}, rounding explains "
            f"{bound:.1e}. Nothing was written."
        )


def require_stored(folder: Path, transformer: Any) -> None:
    """Raises LowmemError unless the folder's safetensors files contain every weight, bitwise equal."""
    files = TensorFiles(files_in(folder))
    for name, value in transformer.state_dict().items():
        stored = files.read(name) if name in files.entries else None
        if stored is None or stored.dtype != value.dtype or not torch.equal(stored, value):
            problem = f"The merged model was not written correctly: {name} differs"
            raise LowmemError(f"{problem}. It was deleted; check the disk.")


def verify_merge(
    folder: Path, dtype: torch.dtype, kind: type[Any], tuned: Probe, subfolder: str = "transformer"
) -> Verified:
    """Loads a merged transformer of class ``kind`` with diffusers, in the dtype of its files, and runs it in fp32.

    Raises:
        LowmemError: diffusers' weights differ from the files.
    """
    read_back = load_as_diffusers(kind, folder, subfolder, dtype)
    require_stored(folder / subfolder, read_back)
    with computing_in_fp32(read_back):
        output = _run(read_back)
    return Verified(_largest(output - tuned.tuned), tuned.effect, "diffusers")


@contextmanager
def computing_in_fp32(transformer: Any) -> Iterator[None]:
    """Casts each block to fp32 only while it computes: the whole model in fp32 takes as much memory as the merge."""
    for name, parameter in transformer.named_parameters():
        if not name.startswith(f"{family_of(transformer).BLOCKS}."):
            parameter.data = parameter.data.float()
    kept: list[tuple[torch.nn.Parameter, Tensor]] = []

    def cast(block: torch.nn.Module, _inputs: object) -> None:
        for parameter in block.parameters():
            kept.append((parameter, parameter.data))
            parameter.data = parameter.data.float()

    def restore(_block: torch.nn.Module, _inputs: object, _output: object) -> None:
        while kept:
            parameter, value = kept.pop()
            parameter.data = value

    hooks = [block.register_forward_pre_hook(cast) for block in blocks_of(transformer)]
    hooks += [block.register_forward_hook(restore) for block in blocks_of(transformer)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _factors(layer: LoraLayer) -> Factors:
    """Factors of a loaded layer's only adapter; readers name it differently."""
    (name,) = layer.lora_A
    return layer.scaling[name], layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()


def _require_same_weights(read: Mapping[str, Factors], lora: LoraChanges, dtype: torch.dtype) -> float:
    """Requires every module's B A to be within the bound of two roundings per factor. Returns the largest bound as a
    share of its B A. Compares a few rows at a time: all products in fp64 take more memory than the model."""
    wanted = lora.pairs
    # for the layers of an image, if the file has none, diffusers adds pairs of zeros
    read = {module: own for module, own in read.items() if module in wanted or bool(own[2].any())}
    if odd := sorted(read.keys() ^ wanted.keys()):
        raise LowmemError(f"The exported file holds other modules than the LoRA: {', '.join(odd[:3])}. It was deleted.")
    share = 0.0
    for module, pair in wanted.items():
        a, b, scale = pair.a, pair.b, pair.scale
        scaling, read_a, read_b = read[module]
        size_a, error_a = _rounded_twice(a.double(), dtype)
        bound_squares = squares = 0.0
        for rows, read_rows in zip(b.double().split(_ROWS), read_b.double().split(_ROWS), strict=True):
            size_b, error_b = _rounded_twice(rows, dtype)
            sizes = size_b @ size_a
            bound = scale * ((size_b + error_b) @ (size_a + error_a) - sizes)
            # rounding of this comparison, computed in fp64
            slack = torch.finfo(torch.float64).eps * 4 * pair.rank * scale * sizes
            delta = scale * (rows @ a.double())
            if not bool(((scaling * (read_rows @ read_a.double()) - delta).abs() <= bound + slack).all()):
                problem = f"The exported file's {module} differs from the LoRA by more than {dtype} rounds"
                raise LowmemError(f"{problem}. It was deleted.")
            bound_squares += float(bound.square().sum())
            squares += float(delta.square().sum())
        if squares:
            share = max(share, math.sqrt(bound_squares / squares))
    return share


def _rounded_twice(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """|x|, and its largest change by two roundings to ``dtype`` and the fp32 product that folds alpha. 0 stays 0."""
    info, size = torch.finfo(dtype), x.abs()
    error = 2 * (info.eps / 2 * size + info.tiny * info.eps / 2) + torch.finfo(torch.float32).eps * size
    return size, torch.where(size == 0, 0.0, error)


def _rounding(transformer: Any, output: Tensor) -> float:
    """Largest difference between two fp32 computations of the same function: every sub-layer rounds its residual
    stream a few times."""
    sublayers = 3 * len(_with_values(transformer)) + 1
    return 4 * sublayers * torch.finfo(torch.float32).eps * _largest(output)


@torch.no_grad()
def _run(transformer: Any) -> Tensor:
    """Velocities on fixed random inputs, two latent frames of 4x4 patches, at three noise levels. Runs only the blocks
    that have values."""
    family, generator = family_of(transformer), torch.Generator().manual_seed(0)
    shapes = family.probe(transformer.config, _SMALL)
    x, text, *image = (torch.randn(shape, generator=generator) for shape in shapes)
    condition = ImageCondition(text, *image) if image else text
    velocity, blocks = family.as_velocity(transformer), getattr(transformer, family.BLOCKS)
    setattr(transformer, family.BLOCKS, torch.nn.ModuleList(_with_values(transformer)))
    try:
        return torch.cat([velocity(x, sigma, condition) for sigma in _SIGMAS])
    finally:
        setattr(transformer, family.BLOCKS, blocks)


def _with_values(transformer: Any) -> list[torch.nn.Module]:
    """The blocks that were loaded (``reader.fill_from_files``): the other blocks' tensors are one number each."""
    return [block for block in blocks_of(transformer) if any(map(_has_values, block.named_parameters()))]


def _has_values(named: tuple[str, torch.nn.Parameter]) -> bool:
    name, parameter = named
    return ".lora_" not in name and any(parameter.stride())


def _largest(x: Tensor) -> float:
    return float(x.abs().max())
