"""Writes LoRA files in the key formats of other tools. The examples are of Wan.

    comfyui    diffusion_model.blocks.0.self_attn.q.lora_A.weight
               alpha / rank folded into A. ComfyUI and diffusers load it.
    diffusers  transformer.blocks.0.attn1.to_q.lora_A.weight
               unfolded, alpha in the header (``lora_adapter_metadata``). diffusers and peft load it.
    kohya      lora_unet_blocks_0_self_attn_q.lora_down.weight
               unfolded, an ``.alpha`` beside each pair. musubi-tuner and ComfyUI load it, and diffusers if it contains
               every Linear of every block.

A folded file has no ``lora_adapter_metadata`` and no ``.alpha``: readers would scale it twice. Sources:
``comfy/lora.py`` of ComfyUI, ``loaders/lora_conversion_utils.py`` of diffusers 0.42.1. Only Linears inside the blocks
have a name in all three. ``reading`` reads these and all other layouts.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Literal, get_args

import torch

from lowmem_drf.errors import BadInputError
from lowmem_drf.models.lora.settings import ADAPTER_METADATA
from lowmem_drf.texts import one_line

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem_drf.models.family import Family
    from lowmem_drf.models.lora.changes import LoraChanges

LoraFormat = Literal["comfyui", "diffusers", "kohya"]
FORMATS: tuple[str, ...] = get_args(LoraFormat)


def default_format(family: Family) -> LoraFormat:
    """The one that most programs load."""
    return "comfyui" if family.NAMES.comfyui else "diffusers"


def to_format(lora: LoraChanges, form: LoraFormat, dtype: torch.dtype, family: Family) -> dict[str, Tensor]:
    """The tensors of a file. Alpha is folded in the dtype of the LoRA, before rounding to ``dtype``.

    Raises:
        BadInputError: the LoRA changes more than pairs of Linears; the format has no name for a module, or is not
            written for the family; a value is too large for ``dtype``.
    """
    written = {"kohya": family.NAMES.kohya, "comfyui": bool(family.NAMES.comfyui), "diffusers": True}
    if not written[form]:
        raise BadInputError(
            f"The {form} format is not written for {family.NAME}: diffusers would not read it. Export with "
            f"--format {default_format(family)}."
        )
    if lora.others:
        raise BadInputError(
            f"{one_line(next(iter(lora.others)), 80)} is changed by no pair, which no format here holds."
        )
    tensors: dict[str, Tensor] = {}
    for module, pair in lora.pairs.items():
        if form == "diffusers":
            a, b = f"transformer.{module}.lora_A.weight", f"transformer.{module}.lora_B.weight"
        elif form == "comfyui":
            a, b = (f"{_stem(module, form, family)}.lora_{side}.weight" for side in "AB")
        else:
            a, b = (f"{_stem(module, form, family)}.lora_{side}.weight" for side in ("down", "up"))
            tensors[f"{_stem(module, form, family)}.alpha"] = torch.tensor(pair.alpha, dtype=torch.float32)
        tensors[a] = (pair.a * pair.scale if form == "comfyui" else pair.a).to(dtype)
        tensors[b] = pair.b.to(dtype)
    if lost := [name for name, value in tensors.items() if not bool(torch.isfinite(value).all())]:
        short = str(dtype).removeprefix("torch.")
        raise BadInputError(f"{one_line(lost[0], 80)} does not fit into {short}. Export with --dtype bf16 or fp32.")
    return {name: value.contiguous() for name, value in tensors.items()}


def adapter_metadata(lora: LoraChanges) -> dict[str, str]:
    """The header entry from which diffusers reads alphas, ranks and modules of an unfolded file."""
    from peft import LoraConfig

    rank, alpha = lora.rank, lora.alpha
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=sorted(lora.pairs),
        rank_pattern={module: pair.rank for module, pair in lora.pairs.items() if pair.rank != rank},
        alpha_pattern={module: pair.alpha for module, pair in lora.pairs.items() if pair.alpha != alpha},
    ).to_dict()
    plain = {f"transformer.{key}": sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    return {ADAPTER_METADATA: json.dumps(plain, sort_keys=True, default=str)}


def diffusers_reads_kohya(lora: LoraChanges, family: Family) -> bool:
    """True if diffusers 0.42.1 can convert the kohya file: it needs every attention and feed-forward Linear of blocks 0
    to n - 1; of those for an image all or none."""
    modules = set(lora.pairs)
    blocks = {int(module.split(".")[1]) for module in modules if module.startswith(f"{family.BLOCKS}.")}
    names = family.NAMES
    images = {module for module in modules if module.endswith(tuple(names.image_linears))}
    kinds = (*names.linears, *(names.image_linears if images else ()))
    return bool(blocks) and {f"{family.BLOCKS}.{i}.{name}" for i in range(len(blocks)) for name in kinds} <= modules


def model_hash(file: bytes) -> str:
    """``sshs_model_hash`` of kohya's sd-scripts: SHA-256 of a safetensors file after its header, so metadata does not
    change it."""
    return hashlib.sha256(file[8 + int.from_bytes(file[:8], "little") :]).hexdigest()


def _stem(module: str, form: LoraFormat, family: Family) -> str:
    """Name of a block's Linear in ComfyUI's or kohya's files."""
    match = re.fullmatch(rf"({family.BLOCKS}\.\d+)\.(.+)", module)
    linears = {**family.NAMES.linears, **family.NAMES.image_linears}
    if match is None or match[2] not in linears:
        raise BadInputError(
            f"The {form} format has no name for a LoRA on {one_line(module, 80)}. Export with --format diffusers."
        )
    own = f"{match[1]}.{linears[match[2]]}"
    return f"{family.NAMES.comfyui}.{own}" if form == "comfyui" else f"lora_unet_{own.replace('.', '_')}"
