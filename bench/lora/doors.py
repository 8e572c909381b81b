"""What a LoRA file changes through each of our doors, and through diffusers: changes by parameter, fp64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.lora.facts import FP32, FP64, Change, LoraFile, base_model, quiet, worst
from bench.lora.names import wan
from bench.lora.rows import Row

Found = dict[str, Tensor]
Door = Callable[[LoraFile, Path], Found]
SVD = 64
"""Roundings of a matrix that its singular value decomposition in fp32 may cost."""


def by_base_lora(file: LoraFile, path: Path) -> Found:
    """``model.base_lora``: merged while the transformer is loaded."""
    from lowmem_drf.models.lora.base import base_changes
    from lowmem_drf.schema.generator import Model

    changes = base_changes(Model(base_lora=str(path)).base_loras(), _shapes(file), _say)
    return {name: change(file.base[name].clone()) for name, change in changes.items()}


def by_sample(file: LoraFile, path: Path) -> Found:
    """``sample --lora``: pairs on Linears are attached, the rest is merged while loading."""
    from lowmem_drf.models.lora.adapter import attach_lora
    from lowmem_drf.models.lora.base import lora_changes
    from lowmem_drf.models.lora.reading import read_lora

    adapters, rest = read_lora(path, file.expert).split(_shapes(file))
    model = base_model(file.layers)
    parameters = dict(model.named_parameters())
    for name, change in lora_changes(rest).items():
        parameters[name].data += change(parameters[name].data.clone())
    attach_lora(model, adapters)
    return effective(model, file.base)


def by_init_lora(file: LoraFile, path: Path) -> Found:
    """``train --init-lora``, at a rank that holds all of the file."""
    from lowmem_drf.models.lora.adapter import add_lora
    from lowmem_drf.models.lora.init import as_trained, init_lora, init_targets
    from lowmem_drf.models.lora.reading import read_lora

    lora = as_trained(read_lora(path, file.expert))
    lora.require_fit(_shapes(file))
    model = base_model(file.layers)
    sizes = [min(file.base[name].shape) for name in lora.others if file.base[name].ndim > 1]
    rank = max([1, *(pair.rank for pair in lora.pairs.values()), *sizes])
    add_lora(model, rank, 1.5 * rank, init_targets(lora, file.layers))
    init_lora(model, lora)
    return effective(model, file.base)


DOORS = {"model.base_lora": by_base_lora, "sample --lora": by_sample, "train --init-lora": by_init_lora}


def _shapes(file: LoraFile) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in file.base.items()}


def _say(text: str) -> None:
    """Downloads are announced; nothing is downloaded here."""


@torch.no_grad()
def effective(model: nn.Module, base: Mapping[str, Tensor]) -> Found:
    """What a model's modules compute, adapters included, minus the base. Linears are asked for their matrix."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {}
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    for name, value in model.named_parameters():
        if not any(name.startswith(f"{module}.") for module in adapted):
            found[name] = value.double() - base[name]
    for name, module in adapted.items():
        weight = base[f"{name}.weight"]
        bias = module(torch.zeros((1, *_one(weight)), dtype=torch.float64)).reshape(-1)
        columns = module(torch.eye(weight[0].numel(), dtype=torch.float64).reshape(-1, *_one(weight)))
        found[f"{name}.weight"] = (columns.flatten(1) - bias).t().reshape(weight.shape) - weight
        found[f"{name}.bias"] = bias - base[f"{name}.bias"]
    return found


def _one(weight: Tensor) -> tuple[int, ...]:
    """The shape of one input: a row, or one patch."""
    return tuple(weight.shape[1:])


def by_diffusers(file: LoraFile, path: Path) -> Found:
    """``WanPipeline.load_lora_weights``; for ``transformer_2`` as the documentation of Wan2.2 says."""
    from diffusers import WanPipeline

    model = base_model(file.layers)
    parts: dict[str, Any] = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler", "transformer"))
    pipe = WanPipeline(**parts | {"transformer": model})
    weights = path if path.is_dir() else path.parent
    name = file.file
    with quiet():
        pipe.load_lora_weights(str(weights), weight_name=name, local_files_only=True)
    torch.nn.Module.to(model, torch.float64)
    return effective(model, file.base)


def diffusers_says(file: LoraFile, path: Path) -> str:
    """same, refuses, drops or differs, and how."""
    try:
        found = by_diffusers(file, path)
    except Exception as error:  # a loader of others may raise anything
        return f"refuses: {type(error).__name__}"
    if not file.changes:
        return "loads something" if any(bool(delta.abs().max() > 1e-9) for delta in found.values()) else "loads nothing"
    if worst(found, file) <= 1:
        return "same"
    wrong = {name: file.changes.get(name) for name in file.base if not _right(found, file, name)}
    dropped = [name for name in wrong if name not in found or float(found[name].abs().max()) < 64 * FP64]
    if len(dropped) == len(file.changes):
        return "loads nothing"
    if len(dropped) == len(wrong):
        return f"drops {len(dropped)} of {len(file.changes)}: {', '.join(_kinds(dropped))}"
    ratios = [
        float((found[n] * c.delta).sum() / (c.delta * c.delta).sum()) for n, c in wrong.items() if c and n in found
    ]
    low, high = min(ratios), max(ratios)
    return f"differs in {len(wrong)} of {len(file.changes)}: scale x {low:.3g}" + (
        f" to {high:.3g}" if high - low > 1e-4 else ""
    )


def _right(found: Found, file: LoraFile, name: str) -> bool:
    expected = file.changes.get(name)
    bound = 64 * FP64 * file.base[name].abs().max() if expected is None else expected.bound
    error = found.get(name, torch.zeros(())) - (0.0 if expected is None else expected.delta)
    return bool((error.abs() <= bound).all())


def _kinds(names: list[str]) -> list[str]:
    """Names without block numbers, each once, the first three."""
    short = dict.fromkeys(".".join(name.split(".")[2:]) if name.startswith("blocks.") else name for name in names)
    return [*list(short)[:3], *(["…"] if len(short) > 3 else [])]


def error_over_bound(door: Door, file: LoraFile, path: Path) -> float | str:
    """The largest error over its bound, or the refusal's message."""
    from lowmem_drf.errors import BadInputError

    try:
        return worst(door(file, path), file, SVD if door is by_init_lora else 0)
    except BadInputError as error:
        return str(error)


def judged(door: Door, row: Row, path: Path) -> tuple[bool, str]:
    """Whether a door is right about a row, and the table's cell."""
    file = row.made()
    if file.expert and door is by_base_lora:
        return True, "-"  # model.base_lora is refused for a model with two transformers
    found = error_over_bound(door, file, path)
    if isinstance(found, float):
        right = not row.kind and found <= 1
        return right, f"{'' if right else 'WRONG: '}{'not refused' if row.kind else f'{found:.2g}'}"
    if not row.kind and door is by_init_lora and not file.trainable and "model.base_lora" in found:
        return True, "merge it"
    return _judged_refusal(row, found)


def _judged_refusal(row: Row, message: str) -> tuple[bool, str]:
    if row.kind and names_kind(message, row.kind, row.module):
        return True, "refused: " + next(word for word in row.kind if word.lower() in message.lower())
    return False, f"WRONG: refused: {message}"


def names_kind(message: str, kind: tuple[str, ...], module: str) -> bool:
    """Whether a refusal says one of the kind's words, and the module under either of its names."""
    names = (module, wan(module), module.replace(".", "_"), wan(module).replace(".", "_")) if module else ()
    low = message.lower()
    return any(word.lower() in low for word in kind) and (not names or any(name in message for name in names))


def inspected(file: LoraFile, path: Path) -> tuple[float | None, dict[str, str]]:
    """What ``inspect-lora --json`` says: the largest error of a change's norm over its bound (``None``: it shows the
    other expert), and what it expects of each program. Raises BadInputError."""
    from lowmem_drf.models.lora.reading import lora_file, read_lora
    from lowmem_drf.models.lora.report import make_report

    said = make_report(lora_file(path), read_lora(path)).as_json()
    programs = {row["program"]: row["takes"] for row in said["programs"]}
    if file.expert == "low" and any(key.startswith("transformer.") for key in file.tensors):
        return None, programs
    norms = {name: norm for name, norm in said["norms"].items() if norm is not None}
    unknown = norms.keys() - file.changes.keys()
    # DoRA's change depends on the model's weights
    missing = [name for name in file.changes.keys() - norms.keys() if name not in file.relative]
    if unknown or missing:
        return math.inf, programs
    errors = [_norm_error(norm, file.changes[name]) for name, norm in norms.items()]
    return max(errors, default=0.0), programs


def _norm_error(norm: float, change: Change) -> float:
    """Over the bound: that of the change, and of a norm in fp32 (a tree of sums, a root)."""
    truth = float(change.delta.norm())
    roundings = math.log2(change.delta.numel()) + 2
    return abs(norm - truth) / (float(change.bound.norm()) + roundings * FP32 * truth)


def judged_inspection(row: Row, path: Path) -> tuple[bool, str, dict[str, str]]:
    """As ``judged``, for ``inspect-lora``; and what it expects of each program."""
    from lowmem_drf.errors import BadInputError

    file = row.made()
    try:
        error, programs = inspected(file, path)
    except BadInputError as refusal:
        right, cell = _judged_refusal(row, str(refusal))
        return right, cell, {}
    if error is None or row.of_model:
        return True, "-", programs
    right = error <= 1 and not row.kind
    return right, f"{'' if right else 'WRONG: '}{'not refused' if row.kind else f'{error:.2g}'}", programs


def agrees(takes: str, diffusers: str, file: LoraFile) -> bool:
    """Whether ``inspect-lora`` expects of diffusers what it does."""
    if diffusers == "same":
        return takes == ("in part" if file.has_more else "yes")
    return takes == ("no" if diffusers.startswith(("refuses", "loads nothing")) else "in part")
