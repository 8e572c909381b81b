"""Values for models that were laid out on ``meta``: random ones on the device, or whatever a caller makes, tensor by tensor.

Nothing is ever there twice: a parameter is made in its final dtype where it is to stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

STD = 0.02
"""Of matrices and embeddings: the ``initializer_range`` of Qwen's models."""

Value = Callable[[str, Sequence[int]], Tensor]
"""(name of a parameter, shape) -> its value."""


def random_value(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Value:
    """Matrices and kernels get normal noise, the scales of norms 1, biases 0."""

    def value(name: str, shape: Sequence[int]) -> Tensor:
        made = torch.empty(shape, dtype=dtype, device=device)
        if made.numel() > max(shape):
            return made.normal_(0, STD, generator=generator)
        return made.fill_(0 if name.endswith("bias") else 1)

    return value


def fill(module: nn.Module, value: Value, recurse: bool = True) -> None:
    """Gives the parameters of a module new values, frozen; one that several submodules share stays one. ``recurse``: those of its children
    too."""
    made: dict[int, nn.Parameter] = {}
    for name, parameter in list(module.named_parameters(recurse=recurse, remove_duplicate=False)):
        if id(parameter) not in made:
            made[id(parameter)] = nn.Parameter(value(name, parameter.shape), requires_grad=False)
        owner, _, key = name.rpartition(".")
        setattr(module.get_submodule(owner), key, made[id(parameter)])
