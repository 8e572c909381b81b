"""``lora.init``: begins training with the LoRA of a file in place of one that changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowmem_drf.errors import BadInputError
from lowmem_drf.models.lora.adapter import ADAPTER, linear_weights, lora_layers
from lowmem_drf.models.lora.base import left_out, lora_changes
from lowmem_drf.models.lora.changes import LoraChanges, Pair
from lowmem_drf.models.lora.keys import family_with
from lowmem_drf.texts import some

if TYPE_CHECKING:
    from torch import nn

_ALPHA = "lowmem_drf.alpha"
_PATCHES = "patch_embedding.weight"
"""Of a convolution, although its change may be given as that of a matrix."""
_MORE = 32
"""Singular vectors sought beyond those that are wanted, which makes these exact."""


def as_trained(lora: LoraChanges) -> LoraChanges:
    """A LoRA as it was trained: in our files of format ``comfyui`` alpha is folded into A, and here it is not. Then the
    optimizer sees the same numbers as in the run. Any other LoRA is returned as it is."""
    try:
        alpha = float(lora.metadata.get(_ALPHA, "nan"))
    except ValueError:
        return lora
    if not alpha > 0 or any(pair.alpha != pair.rank for pair in lora.pairs.values()):
        return lora
    unfolded = {
        module: replace(pair, a=pair.a.float() / (alpha / pair.rank), alpha=alpha)
        for module, pair in lora.pairs.items()
    }
    return replace(lora, pairs=unfolded)


def init_targets(lora: LoraChanges, blocks: int | None) -> list[str]:
    """``lora.targets`` for a model of so many blocks (``None``: unknown) that name the modules of a LoRA, and no
    others."""
    require_linears(lora)
    modules = _modules(lora)
    endings = {module.split(".", 2)[-1] for module in modules}
    stack = family_with(modules).BLOCKS
    if set(modules) != {f"{stack}.{number}.{ending}" for number in range(blocks or 0) for ending in endings}:
        return modules
    both = {end.removeprefix("attn1.") for end in endings if end.replace("attn1.", "attn2.") in endings - {end}}
    return sorted(both | {ending for ending in endings if ending[len("attn1.") :] not in both})


def init_lora(transformer: nn.Module, lora: LoraChanges) -> str:
    """Fills the trainable LoRA of ``add_lora`` from a file. A module keeps the file's A and B if the rank suffices
    (more rows of A keep their first values, with zeros in B); otherwise the nearest LoRA of its rank is taken, by
    singular values. Modules that the file does not change begin untrained.

    Returns:
        What was done, as a line for the user.

    Raises:
        BadInputError: the file changes what ``lora.targets`` does not train, or belongs to another model.
    """
    layers, modules = lora_layers(transformer), _modules(lora)
    require_trained(lora, list(layers))
    lora.require_fit(linear_weights(transformer))
    changes, cut, lost, whole = lora_changes(lora), 0, 0.0, 0.0
    for module in modules:
        layer, pair = layers[module], lora.pairs.get(module)
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        scale, is_pair = layer.scaling[ADAPTER], f"{module}.weight" not in lora.others
        with torch.no_grad():
            if pair and is_pair and pair.rank <= len(a):
                rows, columns = pair.b.to(b) * (pair.scale / scale), pair.a
                whole += _square(pair)
            else:
                if pair and is_pair:
                    made = _nearest_to_pair(pair, len(a), a.device)
                else:
                    exact = torch.empty(b.shape[0], a.shape[1], device=a.device)
                    made = _nearest(changes[f"{module}.weight"](exact), len(a))
                rows, columns = made.b / scale, made.a
                cut, lost, whole = cut + 1, lost + made.lost, whole + made.whole
            b.zero_()
            a[: len(columns)], b[:, : len(columns)] = columns, rows
    ranks = sorted({pair.rank for pair in lora.pairs.values()})
    said = f"{len(modules)} modules" + (f", rank {' to '.join(map(str, {ranks[0]: 0, ranks[-1]: 0}))}" if ranks else "")
    if not cut:
        said += ": its values are kept"
    else:
        share = 100 * (lost / whole) ** 0.5 if whole else 0.0
        said += f": {cut} are cut to the run's rank by singular values, and {share:.2g}% of the change is lost"
    if untrained := len(layers) - len(modules):
        said += f"; {untrained} modules begin untrained"
    return "; ".join((said, *left_out(lora)))


@dataclass(frozen=True)
class _Nearest:
    """The nearest product B A of a rank. Each takes the root of the singular values; values of 0 are left out."""

    b: Tensor
    a: Tensor
    lost: float
    """Square of the Frobenius norm of what is lost."""
    whole: float
    """Of the change."""


def _square(pair: Pair) -> float:
    """Of the Frobenius norm of the change, without the product."""
    a, b = pair.a.double(), pair.b.double()
    return pair.scale**2 * float(((b.t() @ b) * (a @ a.t())).sum())


def _nearest(delta: Tensor, rank: int) -> _Nearest:
    """Of any matrix. If it is large, its first singular vectors are found with random numbers (arXiv 0909.4061)."""
    sketched = rank + _MORE
    if min(delta.shape) <= 2 * sketched:
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(delta, sketched, niter=4)
            v = v.t()
    b, a = _product(u, s, v, rank)
    return _Nearest(b, a, float((delta - b @ a).square().sum()), float(delta.square().sum()))


def _nearest_to_pair(pair: Pair, rank: int, device: torch.device) -> _Nearest:
    """Of a product of a low rank, without the product."""
    left, right = torch.linalg.qr(pair.b.to(device).double()), torch.linalg.qr(pair.a.to(device).double().t())
    u, s, v = torch.linalg.svd(pair.scale * left.R @ right.R.t(), full_matrices=False)
    b, a = _product(left.Q @ u, s, v @ right.Q.t(), rank)
    return _Nearest(b, a, float(s[rank:].square().sum()), float(s.square().sum()))


def _product(u: Tensor, s: Tensor, v: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    count = min(rank, int((s > torch.finfo(s.dtype).eps * s[0]).sum()))
    roots = s[:count].sqrt()
    return u[:, :count] * roots, roots[:, None] * v[:count]


def _modules(lora: LoraChanges) -> list[str]:
    return sorted({*lora.pairs, *(name.removesuffix(".weight") for name in lora.others)})


def require_trained(lora: LoraChanges, targets: Sequence[str]) -> None:
    """Raises BadInputError if the LoRA changes what a run with these ``lora.targets`` does not train."""
    require_linears(lora)
    if outside := [name for name in _modules(lora) if not f".{name}".endswith(tuple(f".{end}" for end in targets))]:
        raise BadInputError(
            f"it changes {len(outside)} modules that lora.targets does not train ({some(outside)}). "
            "Leave lora.targets out, or merge the file with model.base_lora."
        )


def require_linears(lora: LoraChanges) -> None:
    """Raises BadInputError if a LoRA of Linears cannot do what the file does."""
    odd = [
        name
        for name in lora.merged()
        if not name.endswith(".weight") or "norm" in name or name == _PATCHES or "DoRA" in _kinds(lora.others[name])
    ]
    if odd:
        kinds = sorted({kind for name in odd for kind in _kinds(lora.others.get(name, ()))}) or ["convolution"]
        raise BadInputError(
            f"it changes {len(odd)} parameters in a way that no LoRA can go on from ({', '.join(kinds)}: {some(odd)}). "
            "Merge it into the base instead: -s model.base_lora=FILE"
        )


def _kinds(others: Sequence[object]) -> set[str]:
    return {str(getattr(other, "kind", "")) for other in others}
