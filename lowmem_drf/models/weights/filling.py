"""Fills models that were built on ``meta``, tensor by tensor, with values that the caller reads or draws.

No value exists twice: parameters are made on their final device, and a weight to be packed is freed before the next one
is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_drf.models.weights.packed_linear import PackedLinear

STD = 0.02
"""``initializer_range`` of Qwen's models."""

Value = Callable[[str, Sequence[int]], Tensor]
"""(parameter name, unpacked shape) -> value."""


def random_value(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Value:
    """Normal noise for matrices and convolutions, 1 for the scales of norms, 0 for biases."""

    def value(name: str, shape: Sequence[int]) -> Tensor:
        made = torch.empty(shape, dtype=dtype, device=device)
        if made.numel() > max(shape, default=1):
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
    """Gives the parameters of a module new values, frozen. Shared parameters stay shared; weights of a
    ``PackedLinear`` are packed on the device of their values.

    Args:
        recurse: fills the children too.
        home: final device. Default: the device of the values.
        taken: called with every filled parameter before the next one is made. It may empty the parameter.
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
            tensor = tensor if home is None else tensor.to(home)
            if not isinstance(tensor, nn.Parameter):  # a plan's are
                tensor = nn.Parameter(tensor, requires_grad=False)
            made[id(parameter)] = tensor
            del tensor
            if taken is not None:
                taken(made[id(parameter)])
        setattr(owner, key, made[id(parameter)])


def fill_as_loaded(
    model: Any,
    dtype: torch.dtype,
    value_of: Callable[[torch.dtype], Value],
    home: str | torch.device | None = None,
    taken: Callable[[torch.nn.Parameter], None] | None = None,
) -> Any:
    """Fills a model on ``meta``; each parameter in the dtype that ``from_pretrained`` would leave it in. Frozen, eval.

    diffusers keeps ``_keep_in_fp32_modules`` in fp32 for any dtype. In transformers' classes the same name only matters
    for fp16, in which UMT5 is not run.

    Args:
        home: where the model stays, its buffers too. Default: where ``value_of`` makes its values.
        taken: as in ``fill``.
    """
    from diffusers import ModelMixin

    kept = set(model._keep_in_fp32_modules or ()) if isinstance(model, ModelMixin) else set()
    plain, exact = value_of(dtype), value_of(torch.float32)

    def value(name: str, shape: Sequence[int]) -> Any:
        return (exact if kept.intersection(name.split(".")) else plain)(name, shape)

    fill(model, value, home=home, taken=taken)
    return (model if home is None else model.to(home)).eval().requires_grad_(False)


def random_values(device: str | torch.device, seed: int = 0) -> Callable[[torch.dtype], Value]:
    """``value_of`` of ``fill_as_loaded``: what ``random_value`` draws from this seed."""
    generator = torch.Generator(device).manual_seed(seed)
    return lambda dtype: random_value(dtype, torch.device(device), generator)
