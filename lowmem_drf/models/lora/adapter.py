"""LoRA (arXiv 2106.09685) on the transformer through peft: y = W x + (alpha / rank) B A x, with W frozen.

Names follow diffusers, without the ``transformer.`` prefix and peft's adapter name:
``blocks.0.attn1.to_q.lora_A.weight`` (rank, in) and ``….lora_B.weight`` (out, rank). A is initialised Kaiming-uniform
from a separate generator, B to zero, so an untrained adapter changes nothing. ``formats`` reads and writes files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowmem_drf.errors import BadInputError, LowmemError
from lowmem_drf.texts import some

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer
    from torch import Tensor

    from lowmem_drf.models.lora.changes import LoraChanges

ADAPTER = "default"
DEFAULT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
"""Name endings of every Linear of self-attention, cross-attention and feed-forward in each block."""


def add_lora(
    transformer: Any,
    rank: int,
    alpha: float,
    targets: Sequence[str] = DEFAULT_TARGETS,
    seed: int | None = 0,
    ranks: Mapping[str, int] | None = None,
) -> None:
    """Freezes the transformer and adds a LoRA to every Linear with a name that equals or ends in one of ``targets``.

    ``ranks``, peft's ``rank_pattern``: regular expression for the end of a name -> rank of these layers. ``alpha`` is
    that of all.

    The adapter's weights are fp32 for every dtype of the transformer (but fp64 on fp64) and depend only on ``seed`` and
    the architecture (``None``: A is zero too, for who gives it other values). It computes in the transformer's dtype.

    Raises:
        BadInputError: a rank below 1, an alpha that is not positive, a target that matches no Linear, a pattern of
            ``ranks`` that matches none of those.
        LowmemError: the transformer already has a LoRA.
    """
    from peft import LoraConfig

    if rank < 1 or not alpha > 0:
        raise BadInputError(
            f"lora.rank is {rank} and lora.alpha is {alpha}: the rank must be at least 1 and alpha above 0"
        )
    if lora_layers(transformer):
        raise LowmemError("the transformer has a LoRA already: use remove_lora first, or load_lora_state")
    linears = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    unmatched = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in linears)]
    if unmatched or not targets:
        endings = sorted({re.sub(r"^\w*blocks\.\d+\.", "", name) for name in linears})
        raise BadInputError(
            f"lora.targets {unmatched or list(targets)} match no Linear of this model. It has: {', '.join(endings)}"
        )
    trained = [name for name in linears if any(f".{name}".endswith(f".{target}") for target in targets)]
    for pattern in ranks or ():
        if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in trained):
            raise BadInputError(
                f"lora.rank_pattern: {pattern!r} matches no layer that is trained. They are named like "
                f"{some(trained)}; the pattern must match the end of a name."
            )
    own = seed is not None  # peft's first values are replaced by ours
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights=own)
    config.rank_pattern = dict(ranks or {})
    _add_adapter(transformer, config)
    if seed is None:
        return
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(transformer).values():
        weight = layer.lora_A[ADAPTER].weight
        bound = 1 / math.sqrt(weight.shape[1])  # kaiming_uniform_(a=sqrt(5)), as in peft and the LoRA paper
        with torch.no_grad():
            weight.copy_((2 * torch.rand(weight.shape, generator=generator) - 1) * bound)


def _add_adapter(transformer: Any, config: LoraConfig) -> None:
    """Freezes the transformer and adds an adapter of zeros."""
    transformer.requires_grad_(False)
    transformer.add_adapter(config, adapter_name=ADAPTER)
    for layer in lora_layers(transformer).values():
        layer.cast_input_dtype_enabled = False
        for matrix in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]):
            dtype = torch.promote_types(matrix.weight.dtype, torch.float32)
            matrix.weight = nn.Parameter(torch.zeros_like(matrix.weight, dtype=dtype))
            matrix.forward = MethodType(_in_dtype_of_input, matrix)


def _in_dtype_of_input(matrix: nn.Linear, x: Tensor) -> Tensor:
    """Multiplies in the transformer's dtype, as under autocast; the weight's gradient is fp32. peft instead makes fp32
    copies of every input and output: a GiB for one feed-forward of Wan2.1-1.3B at 832x480x81."""
    return nn.functional.linear(x, matrix.weight.to(x.dtype))


def remove_lora(transformer: Any) -> None:
    """Removes the LoRA. The transformer is then bitwise equal to the base."""
    transformer.unload_lora()


def lora_layers(transformer: nn.Module) -> dict[str, LoraLayer]:
    """The layers with a LoRA, by module name, in model order."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in transformer.named_modules() if isinstance(module, LoraLayer)}


def lora_parameters(transformer: nn.Module) -> list[nn.Parameter]:
    """The trainable tensors for the optimizer, in the order of ``lora_state``."""
    return list(named_lora(transformer).values())


def lora_state(transformer: nn.Module) -> dict[str, Tensor]:
    """Copies of the LoRA's tensors on the CPU, dtype unchanged (fp32)."""
    return {name: parameter.detach().cpu().clone().contiguous() for name, parameter in named_lora(transformer).items()}


def load_lora_state(transformer: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies ``state`` into the transformer's LoRA. All or nothing.

    Raises:
        BadInputError: modules missing or unknown, another rank or shape, values that are not finite. Nothing was
            changed.
    """
    lora = named_lora(transformer)
    _refuse_other_model({name: tuple(parameter.shape) for name, parameter in lora.items()}, state)
    with torch.no_grad():
        for name, parameter in lora.items():
            parameter.copy_(state[name])


def attach_lora(transformer: Any, lora: LoraChanges) -> None:
    """Adds the pairs of a LoRA, each with its own rank and scale, as fp32. Not its other changes (``split_lora``).

    Raises:
        BadInputError: a LoRA of another model: a module is missing or its shape differs. Nothing was changed.
    """
    from peft import LoraConfig

    if not lora.pairs:
        return
    lora.require_fit(linear_weights(transformer))
    rank, alpha = lora.rank, lora.alpha
    ranks = {re.escape(module): pair.rank for module, pair in lora.pairs.items() if pair.rank != rank}
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(lora.pairs), rank_pattern=ranks)
    _add_adapter(transformer, config)
    layers = lora_layers(transformer)
    for module, pair in lora.pairs.items():
        layer = layers[module]
        layer.scaling[ADAPTER] = pair.scale
        with torch.no_grad():
            layer.lora_A[ADAPTER].weight.copy_(pair.a)
            layer.lora_B[ADAPTER].weight.copy_(pair.b)


def linear_weights(transformer: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of all Linears, by parameter name as in a model without a LoRA."""
    return {
        f"{name.removesuffix('.base_layer')}.weight": (module.out_features, module.in_features)
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
    }


@contextmanager
def lora_scale(transformer: nn.Module, scale: float) -> Iterator[None]:
    """Multiplies the LoRA's effect by ``scale`` within the block; with 0 the model is bitwise the base, at its speed.

    A backward with checkpointing recomputes, so it must run inside the block too.
    """
    layers = list(lora_layers(transformer).values())
    before = [(layer.scaling[ADAPTER], layer._disable_adapters) for layer in layers]
    try:
        for layer in layers:
            layer.scaling[ADAPTER] *= scale
            layer._disable_adapters = layer._disable_adapters or scale == 0
        yield
    finally:
        for layer, (scaling, disabled) in zip(layers, before, strict=True):
            layer.scaling[ADAPTER], layer._disable_adapters = scaling, disabled


def named_lora(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable tensors by name, in model order."""
    return {
        f"{name}.lora_{side}.weight": matrices[ADAPTER].weight
        for name, layer in lora_layers(transformer).items()
        for side, matrices in (("A", layer.lora_A), ("B", layer.lora_B))
    }


@torch.no_grad()
def lora_norm(transformer: nn.Module) -> float:
    """Frobenius norm of the LoRA's change to all weights, s B A, at its present scale. B A is not formed."""
    total = 0.0
    for layer in lora_layers(transformer).values():
        a, b = layer.lora_A[ADAPTER].weight.double(), layer.lora_B[ADAPTER].weight.double()
        total += layer.scaling[ADAPTER] ** 2 * ((b.T @ b) * (a @ a.T)).sum().item()
    return math.sqrt(max(total, 0.0))


def _refuse_other_model(expected: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> None:
    """Raises BadInputError with all differences in names and shapes."""
    problems = []
    if missing := sorted(expected.keys() - state.keys()):
        problems.append(f"{len(missing)} tensors are missing from it ({some(missing)})")
    if unknown := sorted(state.keys() - expected.keys()):
        problems.append(f"{len(unknown)} of its tensors belong to no LoRA module of this model ({some(unknown)})")
    common = expected.keys() & state.keys()
    if differing := sorted(name for name in common if tuple(state[name].shape) != expected[name]):
        name = differing[0]
        what = f"{name} is {list(state[name].shape)}, this model has {list(expected[name])}"
        problems.append(f"{len(differing)} tensors have another shape, so another rank or width ({what})")
    if not_finite := sorted(name for name in common if not bool(torch.isfinite(state[name]).all())):
        problems.append(f"{len(not_finite)} tensors hold NaN or infinity ({some(not_finite)})")
    if problems:
        raise BadInputError(
            "The LoRA does not fit this model: "
            + "; ".join(problems)
            + ". Use the model, rank and targets it was trained with (see the run's config.toml)."
        )
