"""``model.base_lora``: merges a published LoRA into the frozen base while loading, for example one that distils a
generator to four steps.

    comfyui    diffusion_model.blocks.0.self_attn.q.lora_A.weight (or lora_down), .alpha
    diffusers  transformer.blocks.0.attn1.to_q.lora_A.weight, alpha in the header
    kohya      lora_unet_blocks_0_self_attn_q.lora_down.weight, .alpha
    lightx2v   also .diff of a weight, .diff_b of a bias, .diff_m of a block's modulation

Unlike the files that training writes (``formats``), these contain modules outside the blocks, ranks that differ between
modules, and tensors that are no LoRA. Every tensor must be used, because a partly applied distillation does not work.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem_drf.errors import BadInputError
from lowmem_drf.models.lora.formats import (
    ADAPTER_METADATA,
    SIDES,
    header_alpha,
    is_pair,
    read_tensors,
    split_key,
    tensor_alpha,
)
from lowmem_drf.models.wan.names import wan_name
from lowmem_drf.models.weights.downloads import hub_file
from lowmem_drf.models.weights.reader import Change
from lowmem_drf.texts import expanded, one_line, parse_json, some

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")
_WHOLE = {"diff": "weight", "diff_b": "bias", "diff_m": "scale_shift_table"}
"""Suffix of a full-size difference -> the parameter of its module."""
_HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+)[:/](.+\.safetensors)")


def base_changes(
    source: str, shapes: Mapping[str, tuple[int, ...]], say: Callable[[str], None], scale: float = 1.0
) -> dict[str, Change]:
    """The changes that a LoRA, times ``scale``, makes to a transformer's parameters, for ``load_denoiser`` and
    ``load_single_file``.

    Args:
        source: a safetensors file, or ``owner/repo/file.safetensors`` (also ``owner/repo:file.safetensors``) on the
            hub, downloaded once.
        shapes: of the transformer's parameters, by diffusers' names.
        say: announces a download.

    Raises:
        BadInputError: no such file; unreadable; a tensor matches nothing in this transformer, has another shape or is
            not finite.
        LowmemError: the download failed.
    """
    path = find_base_lora(source, say)
    tensors, metadata = read_tensors(path)
    try:
        return read_changes(tensors, metadata, shapes, scale)
    except BadInputError as error:
        cure = "Name another file with model.base_lora."
        raise BadInputError(f"model.base_lora, {source}: {str(error).removesuffix('.')}. {cure}") from error


def find_base_lora(source: str, say: Callable[[str], None]) -> Path:
    """The local file, downloaded if necessary. Raises BadInputError, LowmemError."""
    path = expanded(source)
    if path.is_file():
        return path
    if match := _HUB_FILE.fullmatch(source):
        return hub_file(match[1], match[2], say)
    raise BadInputError(
        f"model.base_lora = {source!r} is neither a file nor owner/repo/file.safetensors on the Hugging Face hub. "
        "Only safetensors files are read."
    )


def read_changes(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    scale: float = 1.0,
) -> dict[str, Change]:
    """The changes to each parameter of a model of these ``shapes`` (by diffusers' names), times ``scale``.

    Raises:
        BadInputError: names the first problems.
    """
    if patterns := _alpha_patterns(metadata):
        raise BadInputError(
            f"its header gives single modules an alpha of their own ({one_line(patterns)}), which is not supported"
        )
    known = _known_modules(tensors, shapes)
    pairs: dict[str, dict[str, Tensor]] = {}
    parts: dict[str, list[Change]] = {}
    unused, misfits = [], []
    for key, value in tensors.items():
        bare = key
        for prefix in _PREFIXES:
            bare = bare.removeprefix(prefix)
        stem, suffix = split_key(bare, SIDES | _WHOLE)
        module = known.get(stem)
        if module is None or not suffix:
            unused.append(key)
        elif not bool(value.isfinite().all()):
            misfits.append(f"{key} holds NaN or infinity")
        elif suffix in SIDES:
            pairs.setdefault(module, {})[SIDES[suffix]] = value
        else:
            name = f"{module}.{_WHOLE[suffix]}".removeprefix(".")
            if shapes.get(name) == tuple(value.shape):
                parts.setdefault(name, []).append(value.to)
            else:
                misfits.append(f"{key} is {list(value.shape)}, and the model's {name} is {_shape(shapes, name)}")
    for module, pair in pairs.items():
        name = f"{module}.weight"
        if not {"A", "B"} <= pair.keys():
            misfits.append(f"it holds half a pair for {module}")
            continue
        down, up, shape = pair["A"], pair["B"], shapes.get(name)
        fits = is_pair(down, up) and (up.shape[0], *down.shape[1:]) == shape
        if shape is None or not fits:
            sizes = f"{list(up.shape)} x {list(down.shape)}"
            misfits.append(f"its pair for {module} is {sizes}, and the model's {name} is {_shape(shapes, name)}")
            continue
        rank = int(down.shape[0])
        alpha = tensor_alpha(pair["alpha"], module) if "alpha" in pair else header_alpha(metadata, rank)
        parts.setdefault(name, []).append(partial(_product, down, up, alpha / rank, shape))
    if unused:
        misfits.insert(0, f"{len(unused)} of its tensors belong to nothing in this transformer ({some(unused)})")
    if misfits or not parts:
        problems = "; ".join(one_line(misfit, 200) for misfit in misfits[:4]) or "it holds nothing"
        raise BadInputError(f"{problems}. It was made for another model, or is of a kind that is not supported.")
    return {name: partial(_sum, changes, scale) for name, changes in parts.items()}


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str) -> list[int] | str:
    return list(shapes[name]) if name in shapes else "not there"


def _known_modules(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Module names in files -> diffusers' names. A file uses either naming, because Wan's ``norm2`` is another module
    than diffusers'."""
    modules = dict.fromkeys(name.rpartition(".")[0] for name in shapes)
    if any(".attn1." in key or ".attn2." in key for key in tensors):
        return {module: module for module in modules if module}
    known = {"head": ""}  # for head.diff_m, the last modulation
    for module in filter(None, modules):
        try:
            own = module if re.fullmatch(r"blocks\.\d+", module) else wan_name(module)
        except KeyError:  # module of an image-to-video model
            continue
        known |= {own: module, f"lora_unet_{own.replace('.', '_')}": module}
    return known


def _product(
    down: Tensor, up: Tensor, factor: float, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Product of two matrices, or of the two kernels of the patch embedding (the second is 1x1x1)."""
    product = up.to(device, dtype).flatten(1) @ down.to(device, dtype).flatten(1)
    return (factor * product).reshape(shape)


def _sum(changes: list[Change], scale: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    return scale * reduce(add, (change(device, dtype) for change in changes))


def _alpha_patterns(metadata: Mapping[str, str]) -> str:
    try:
        header = parse_json(metadata.get(ADAPTER_METADATA, "{}"))
        return ", ".join(header.get("transformer.alpha_pattern") or ())
    except (ValueError, AttributeError, TypeError) as error:
        raise BadInputError(f"its header is damaged: {error}") from error
