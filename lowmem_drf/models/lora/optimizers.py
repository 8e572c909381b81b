"""Optimizers for the LoRA: AdamW (arXiv 1711.05101) with moments in fp32, or in 8 bit with bitsandbytes 0.50 (arXiv
2110.02861).

In 8 bit a moment takes one byte per number and one fp32 scale per block of 256; tensors below 4096 numbers keep fp32
moments. The paged variant puts moments of tensors with at least ``PAGED_FROM`` numbers into CUDA managed memory, which
the driver moves to the host when the card is full. On the CPU nothing is paged.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lowmem_drf.errors import BadInputError
from lowmem_drf.schema import Optim

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

PAGED_FROM = 100_000
"""Numbers in a tensor (``Optimizer8bit.get_state_buffer``)."""

SHARED = ("qmap1", "qmap2")
"""bitsandbytes' code tables, shared by the states of all parameters."""


def make_optimizer(optim: Optim, lora: Sequence[Tensor]) -> Optimizer:
    """The AdamW variant ``optim.name`` for the LoRA's fp32 tensors. Raises BadInputError if it needs bitsandbytes and
    that is missing."""
    arguments: dict[str, Any] = optim.model_dump(include={"lr", "eps", "weight_decay"}) | {"betas": tuple(optim.betas)}
    if optim.name == "adamw":
        # on a card foreach is the default: it copies tensors the size of the LoRA, for milliseconds of an update
        return torch.optim.AdamW(lora, foreach=False, **arguments)
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise BadInputError(
            f"optim.name = {optim.name} needs bitsandbytes, which cannot be imported ({error}). "
            "pip install bitsandbytes, or -s optim.name=adamw"
        ) from error
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    kinds = {"adamw8bit": bnb.optim.AdamW8bit, "paged_adamw8bit": bnb.optim.PagedAdamW8bit}
    made: Optimizer = kinds[optim.name](lora, **arguments)
    return made


def fill_states(optimizer: Optimizer) -> None:
    """Allocates the moments that the first ``step`` would allocate. Changes no weight."""
    if isinstance(optimizer, torch.optim.AdamW):
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
    return {name: torch.as_tensor(value).detach().cpu().contiguous() for name, _, _, value in entries}


def unpack_optimizer(optimizer: Optimizer, names: Sequence[str], packed: Mapping[str, Tensor]) -> None:
    """Copies the tensors of ``pack_optimizer`` into the optimizer's own memory, so paged moments stay paged; with
    bitsandbytes' ``load_state_dict`` they do not. Raises BadInputError for the state of another optimizer."""
    fill_states(optimizer)
    entries = list(_entries(optimizer, names))
    expected = {name: torch.as_tensor(value).shape for name, _, _, value in entries}
    if expected != {name: tensor.shape for name, tensor in packed.items()}:
        raise BadInputError(
            "the checkpoint has the state of another optimizer than optim.name says, or of another LoRA. Set "
            "optim.name in the run's config.toml to what it was when the run began, or start a new run."
        )
    with torch.no_grad():
        for name, state, key, value in entries:
            if isinstance(value, torch.Tensor):
                value.copy_(packed[name])
            else:
                state[key] = packed[name].item()


def _entries(optimizer: Optimizer, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any], str, Any]]:
    """(name, the parameter's state, key, value) of every entry; shared entries come once."""
    seen = set()
    for parameter, tensor in zip(names, _parameters(optimizer), strict=True):
        state = optimizer.state.get(tensor, {})
        for key, value in state.items():
            name = key if key in SHARED else f"{parameter}.{key}"
            if name not in seen:
                seen.add(name)
                yield name, state, key, value


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]
