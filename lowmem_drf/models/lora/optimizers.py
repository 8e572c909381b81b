"""Optimizers for the LoRA: AdamW (arXiv 1711.05101) with moments in fp32, or in 8 bit with bitsandbytes 0.50 (arXiv
2110.02861); Lion (arXiv 2302.06675) from lion-pytorch, and Prodigy (arXiv 2306.06101) from prodigyopt.

In 8 bit a moment takes one byte per number and one fp32 scale per block of 256; tensors below 4096 numbers keep fp32
moments. The paged variant puts moments of tensors with at least ``PAGED_FROM`` numbers into CUDA managed memory, which
the driver moves to the host when the card is full. On the CPU nothing is paged.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

import torch

from lowmem_drf.errors import BadInputError
from lowmem_drf.libraries import cure
from lowmem_drf.schema.learning import Optim

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

PAGED_FROM = 100_000
"""Numbers in a tensor (``Optimizer8bit.get_state_buffer``)."""

SHARED = ("qmap1", "qmap2")
"""bitsandbytes' code tables, shared by the states of all parameters."""

LIBRARIES = {
    **{"adamw8bit": "bitsandbytes", "paged_adamw8bit": "bitsandbytes"},
    **{"lion": "lion_pytorch", "prodigy": "prodigyopt"},
}
"""Optimizer -> the module that has it."""

GROUP = ("d", "d_max", "d_numerator", "k")
"""What Prodigy has of all parameters together, and reads in a step."""
START = "p0"
"""Prodigy's first values of a parameter, flat; a single 0 if they were all 0."""


def make_optimizer(optim: Optim, lora: Sequence[Tensor]) -> Optimizer:
    """The optimizer ``optim.name`` for the LoRA's fp32 tensors. Raises BadInputError as ``require_optimizer``."""
    arguments: dict[str, Any] = optim.model_dump(include={"lr", "eps", "weight_decay"}) | {"betas": tuple(optim.betas)}
    if optim.name == "adamw":
        # on a card foreach is the default: it copies tensors the size of the LoRA, for milliseconds of an update
        return torch.optim.AdamW(lora, foreach=False, **arguments)
    library = require_optimizer(optim)
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    made: Optimizer
    if optim.name == "lion":
        del arguments["eps"]
        made = library.Lion(lora, **arguments)
    elif optim.name == "prodigy":
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            # as its authors advise for diffusion models
            made = library.Prodigy(lora, use_bias_correction=True, safeguard_warmup=True, **arguments)
    else:
        kinds = {"adamw8bit": library.optim.AdamW8bit, "paged_adamw8bit": library.optim.PagedAdamW8bit}
        made = kinds[optim.name](lora, **arguments)
    return made


def require_optimizer(optim: Optim) -> Any:
    """The library of ``optim.name``, imported; ``None`` if it needs none. Raises BadInputError if it is missing."""
    if (name := LIBRARIES.get(optim.name)) is None:
        return None
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BadInputError(
            f"optim.name = {optim.name} needs {name}, which cannot be imported ({error}). "
            f"{cure(name)}, or -s optim.name=adamw"
        ) from error


def fill_states(optimizer: Optimizer) -> None:
    """Allocates the moments that the first ``step`` would allocate. Changes no weight."""
    if not hasattr(optimizer, "init_state"):
        _fill_by_a_step(optimizer)
        return
    bnb: Any = optimizer
    for group_index, group in enumerate(bnb.param_groups):
        for index, tensor in enumerate(group["params"]):
            if not bnb.state[tensor]:
                bnb.init_state(group, tensor, group_index, index)
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # the card zeroes paged moments; from here on the CPU may write into them


def paged_moments(optimizer: Optimizer) -> list[Tensor]:
    """The moments in pageable memory: on the host if the card is full."""
    if not getattr(optimizer, "is_paged", False):
        return []
    large = [tensor for tensor in _parameters(optimizer) if tensor.numel() >= PAGED_FROM]
    return [optimizer.state[tensor][key] for tensor in large for key in ("state1", "state2")]


def _fill_by_a_step(optimizer: Optimizer) -> None:
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for tensor in group["params"]:
            tensor.grad = torch.zeros_like(tensor)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def pack_optimizer(optimizer: Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """The optimizer's state as contiguous tensors ``<parameter>.<key>``, shared ones as ``<key>``. Learning rates are
    not included: the schedule sets them. ``names``: of the parameters, in the optimizer's order."""
    entries = _entries(optimizer, names)
    return {name: _as_tensor(value).detach().cpu().contiguous() for name, _, _, value in entries}


def unpack_optimizer(optimizer: Optimizer, names: Sequence[str], packed: Mapping[str, Tensor]) -> None:
    """Copies the tensors of ``pack_optimizer`` into the optimizer's own memory, so paged moments stay paged; with
    bitsandbytes' ``load_state_dict`` they do not. Raises BadInputError for the state of another optimizer."""
    fill_states(optimizer)
    entries = list(_entries(optimizer, names))
    expected = {name: _as_tensor(value).shape for name, _, _, value in entries}
    shapes = {name: tensor.shape for name, tensor in packed.items()}
    for name, _, key, _ in entries:
        if key == START and shapes.get(name) == ():
            expected[name] = torch.Size()
    if expected != shapes:
        raise BadInputError(
            "the checkpoint has the state of another optimizer than optim.name says, or of another LoRA. Set "
            "optim.name in the run's config.toml to what it was when the run began, or start a new run."
        )
    with torch.no_grad():
        for name, state, key, value in entries:
            if key == START:
                state[key] = packed[name].to(value)
            elif isinstance(value, torch.Tensor):
                value.copy_(packed[name])
            else:
                state[key] = packed[name].item()


def _entries(optimizer: Optimizer, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any], str, Any]]:
    """(name, the parameter's state, key, value) of every entry; shared entries come once."""
    for key in GROUP:
        if key in (group := optimizer.param_groups[0]):
            yield f"group.{key}", group, key, group[key]
    seen = set()
    for parameter, tensor in zip(names, _parameters(optimizer), strict=True):
        state = optimizer.state.get(tensor, {})
        for key, value in state.items():
            name = key if key in SHARED else f"{parameter}.{key}"
            if name not in seen:
                seen.add(name)
                yield name, state, key, value


def _as_tensor(value: Any) -> Tensor:
    """Python's numbers in fp64, in which they are."""
    return torch.as_tensor(value, dtype=torch.float64 if isinstance(value, float) else None)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]
