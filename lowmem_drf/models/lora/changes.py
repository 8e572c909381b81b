"""What a LoRA file changes in a transformer: pairs of matrices, and changes that are no pair.

    W + (alpha / rank) B A       a pair
    p + difference               of a weight, bias, norm or modulation
    W + scale kron(w1, w2)       LoKr (arXiv 2309.14859)
    W + scale (w1 * w2)          LoHa (arXiv 2108.06098)
    m (W + s B A) / |W + s B A|  DoRA (arXiv 2402.09353)

Modules and parameters have diffusers' names without a prefix: ``blocks.0.attn1.to_q``, ``blocks.0.attn1.to_q.bias``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from lowmem_drf.errors import BadInputError
from lowmem_drf.texts import one_line

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """The LoRA of one weight: (alpha / rank) B A."""

    a: Tensor
    """(rank, in), or (rank, in, kernel …) of a convolution; any floating-point dtype."""
    b: Tensor
    """(out, rank)."""
    alpha: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def kind(self) -> str:
        return "LoRA"

    @property
    def size(self) -> str:
        return f"{list(self.b.shape)} x {list(self.a.shape)}"

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes

    def fits(self, shape: Shape) -> bool:
        return _fits(self, shape)

    def __call__(self, weight: Tensor) -> Tensor:
        """The change of ``weight``, in its shape, dtype and on its device."""
        product = self.b.to(weight) @ self.a.to(weight).flatten(1)
        return (self.scale * product).reshape(weight.shape)


class Other(Protocol):
    """A change of one parameter that is no pair."""

    @property
    def kind(self) -> str:
        """In words: ``difference``, ``LoKr``, ``LoHa``, ``DoRA``."""
        ...

    @property
    def size(self) -> str:
        """Its shapes, for a message."""
        ...

    @property
    def nbytes(self) -> int: ...

    def fits(self, shape: Shape) -> bool:
        """Whether it changes a parameter of this shape."""
        ...

    def __call__(self, weight: Tensor) -> Tensor:
        """The change of a parameter, in its shape and dtype and on its device."""
        ...


@dataclass(frozen=True, slots=True)
class Difference:
    """What is added to a parameter."""

    value: Tensor
    scale: float = 1.0
    kind: str = "difference"

    @property
    def size(self) -> str:
        return str(list(self.value.shape))

    @property
    def nbytes(self) -> int:
        return self.value.nbytes

    def fits(self, shape: Shape) -> bool:
        return tuple(self.value.shape) == shape

    def __call__(self, weight: Tensor) -> Tensor:
        return self.scale * self.value.to(weight)


@dataclass(frozen=True, slots=True)
class Factors:
    """LoKr: the Kronecker product of two matrices. LoHa: the product of two, number by number. Each is given whole, or
    as two factors. Sources: ``comfy/weight_adapter/`` of ComfyUI, ``tuners/lokr`` and ``tuners/loha`` of peft 0.21."""

    first: tuple[Tensor, ...]
    second: tuple[Tensor, ...]
    scale: float
    kind: str

    @property
    def size(self) -> str:
        return " and ".join(" x ".join(str(list(part.shape)) for part in parts) for parts in (self.first, self.second))

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (*self.first, *self.second))

    def is_product(self) -> bool:
        """Whether the matrices can be multiplied."""
        both = (self.first, self.second)
        if any(part.ndim != 2 for parts in both for part in parts):
            return False
        if any(len(parts) == 2 and parts[0].shape[1] != parts[1].shape[0] for parts in both):
            return False
        return self.kind == "LoKr" or self._made(self.first) == self._made(self.second)

    def fits(self, shape: Shape) -> bool:
        (rows, columns), (more_rows, more_columns) = self._made(self.first), self._made(self.second)
        made = (rows * more_rows, columns * more_columns) if self.kind == "LoKr" else (rows, columns)
        return made == (shape[0], math.prod(shape[1:]))

    @staticmethod
    def _made(parts: tuple[Tensor, ...]) -> tuple[int, int]:
        return parts[0].shape[0], parts[-1].shape[1]

    def __call__(self, weight: Tensor) -> Tensor:
        first, second = (
            parts[0].to(weight) if len(parts) == 1 else parts[0].to(weight) @ parts[1].to(weight)
            for parts in (self.first, self.second)
        )
        product = torch.kron(first, second) if self.kind == "LoKr" else first * second
        return (self.scale * product).reshape(weight.shape)


@dataclass(frozen=True, slots=True)
class Dora:
    """DoRA: a LoRA, and the lengths of the changed weight's rows, or columns where ``magnitude`` is (1, in)."""

    pair: Pair | Factors
    magnitude: Tensor
    kind: str = "DoRA"

    @property
    def size(self) -> str:
        return f"{self.pair.size} with {list(self.magnitude.shape)}"

    @property
    def nbytes(self) -> int:
        return self.pair.nbytes + self.magnitude.nbytes

    def fits(self, shape: Shape) -> bool:
        of_rows = self.magnitude.numel() == shape[0] and not self._by_columns
        return self.pair.fits(shape) and (of_rows or (self._by_columns and self.magnitude.shape[1] == shape[1]))

    @property
    def _by_columns(self) -> bool:
        shape = self.magnitude.shape
        return len(shape) >= 2 and shape[0] == 1 and self.magnitude.numel() == shape[1]

    def __call__(self, weight: Tensor) -> Tensor:
        changed = weight + self.pair(weight)
        axis = 1 if self._by_columns else 0
        lengths = torch.linalg.vector_norm(changed, dim=[i for i in range(changed.ndim) if i != axis], keepdim=True)
        return changed * (self.magnitude.to(weight).reshape(lengths.shape) / lengths) - weight


@dataclass(frozen=True)
class LoraChanges:
    """The content of a LoRA file."""

    pairs: Mapping[str, Pair]
    """By module."""
    others: Mapping[str, list[Other]] = field(default_factory=dict)
    """By parameter."""
    left_out: Mapping[str, list[str]] = field(default_factory=dict)
    """Why -> keys of the file."""
    layout: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], alpha: float) -> LoraChanges:
        """From tensors with the names of ``adapter`` and one alpha."""
        modules = sorted(name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight"))
        if len(state) != 2 * len(modules):
            raise BadInputError("The LoRA holds half a pair.")
        return cls(
            {name: Pair(state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"], alpha) for name in modules}
        )

    def state(self) -> dict[str, Tensor]:
        """The pairs' tensors with the names of ``adapter``."""
        sides = ((module, pair, side) for module, pair in self.pairs.items() for side in "AB")
        return {f"{module}.lora_{side}.weight": pair.a if side == "A" else pair.b for module, pair, side in sides}

    @property
    def rank(self) -> int:
        """The most common one."""
        return Counter(pair.rank for pair in self.pairs.values()).most_common(1)[0][0]

    @property
    def alpha(self) -> float:
        """The most common one."""
        return Counter(pair.alpha for pair in self.pairs.values()).most_common(1)[0][0]

    def __bool__(self) -> bool:
        return bool(self.pairs or self.others)

    @property
    def nbytes(self) -> int:
        changes = [*self.pairs.values(), *(other for others in self.others.values() for other in others)]
        return sum(change.nbytes for change in changes)

    def split(self, shapes: Mapping[str, Shape]) -> tuple[LoraChanges, LoraChanges]:
        """(pairs on matrices, which can be adapters; everything else), for a model of these shapes by parameter. Raises
        BadInputError as ``require_fit``."""
        self.require_fit(shapes)
        adapters = {module: pair for module, pair in self.pairs.items() if len(shapes[f"{module}.weight"]) == 2}
        rest = {module: pair for module, pair in self.pairs.items() if module not in adapters}
        return replace(self, pairs=adapters, others={}), replace(self, pairs=rest)

    def merged(self) -> list[str]:
        """Parameters, and modules, whose change is no pair on a Linear, so that no adapter can make it."""
        convolutions = [name for name, pair in self.pairs.items() if pair.a.ndim > 2 or name == "patch_embedding"]
        return [*self.others, *convolutions]

    def delta(self, module: str) -> Tensor:
        """The change of one module's weight by its pair, (out, in), fp64. All together take more memory than the
        model."""
        pair = self.pairs[module]
        return (pair.b.double() @ pair.a.double().flatten(1)).mul_(pair.scale)

    def require_fit(self, shapes: Mapping[str, Shape]) -> None:
        """Raises BadInputError unless the model (shapes by parameter name) has every parameter that is changed."""
        changes = [(f"{module}.weight", pair) for module, pair in self.pairs.items()]
        problems = []
        for name, change in (*changes, *((name, other) for name, others in self.others.items() for other in others)):
            if name not in shapes:
                problems.append(f"this model has no {name}")
            elif not change.fits(shapes[name]):
                problems.append(
                    f"its {change.kind} for {name} is {change.size}, and this model's is {list(shapes[name])}"
                )
        if problems:
            raise BadInputError(
                f"The LoRA does not fit this model: {len(problems)} of its changes have no place in it "
                f"({'; '.join(one_line(problem, 160) for problem in problems[:2])}). Use the model it was made for."
            )


def _fits(pair: Pair, shape: Shape) -> bool:
    kernel = tuple(pair.a.shape[1:])
    return pair.b.shape[0] == shape[0] and (
        kernel == shape[1:] or (len(kernel) == 1 and kernel[0] == math.prod(shape[1:]))
    )
