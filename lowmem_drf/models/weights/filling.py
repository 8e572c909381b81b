"""Values for models that were laid out on ``meta``: read, drawn, or whatever a caller makes, tensor by tensor.

Nothing is ever there twice: a parameter is made where it is to stay, and a weight that is to be packed is gone before
the next one is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lowmem_drf.models.weights.packed_linear import PackedLinear

STD = 0.02
"""Of matrices and embeddings: the ``initializer_range`` of Qwen's models."""

Value = Callable[[str, Sequence[int]], Tensor]
"""(name of a parameter, shape) -> its value. Of a weight that is to be packed, the shape is that of the unpacked
one."""


def random_value(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Value:
    """Matrices and kernels get normal noise, the scales of norms 1, biases 0."""

    def value(name: str, shape: Sequence[int]) -> Tensor:
        made = torch.empty(shape, dtype=dtype, device=device)
        if made.numel() > max(shape):
            return made.normal_(0, STD, generator=generator)
        return made.fill_(0 if name.endswith("bias") else 1)

    return value


def fill(
    module: nn.Module,
    value: Value,
    recurse: bool = True,
    home: str | torch.device | None = None,
    taken: Callable[[nn.Parameter], None] | None = None,
) -> None:
    """Gives the parameters of a module new values, frozen; one that several submodules share stays one. Weights of a
    ``PackedLinear`` are packed where their values were made.

    Args:
        recurse: those of its children too.
        home: where they are to stay. Default: where they were made.
        taken: called with every parameter that has its value, before the next one is made. It may leave it empty.
    """
    made: dict[int, nn.Parameter] = {}
    for name, parameter in list(module.named_parameters(recurse=recurse, remove_duplicate=False)):
        path, _, key = name.rpartition(".")
        owner = module.get_submodule(path)
        if isinstance(owner, PackedLinear) and key == "weight":
            owner.pack(value(name, owner.shape), home)
            continue
        if id(parameter) not in made:
            tensor = value(name, parameter.shape)
            made[id(parameter)] = nn.Parameter(tensor if home is None else tensor.to(home), requires_grad=False)
            del tensor
            if taken is not None:
                taken(made[id(parameter)])
        setattr(owner, key, made[id(parameter)])
