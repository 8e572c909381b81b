"""Reads and writes LoRA files in the key formats of Wan tools.

    comfyui    diffusion_model.blocks.0.self_attn.q.lora_A.weight
               alpha / rank folded into A. ComfyUI and diffusers load it.
    diffusers  transformer.blocks.0.attn1.to_q.lora_A.weight
               unfolded, alpha in the header (``lora_adapter_metadata``). diffusers and peft load it.
    kohya      lora_unet_blocks_0_self_attn_q.lora_down.weight
               unfolded, an ``.alpha`` beside each pair. musubi-tuner and ComfyUI load it, and diffusers if it contains
               every Linear of every block.

A folded file has no ``lora_adapter_metadata`` and no ``.alpha``: readers would scale it twice. Sources:
``comfy/lora.py`` of ComfyUI, ``loaders/lora_conversion_utils.py`` of diffusers 0.42.1. Only Linears inside the blocks
have a name in all three.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from lowmem_drf.errors import BadInputError
from lowmem_drf.models.wan.names import BLOCK_LINEARS
from lowmem_drf.models.weights.files import damage
from lowmem_drf.models.weights.finite import not_finite
from lowmem_drf.texts import one_line, parse_json, shown

LoraFormat = Literal["comfyui", "diffusers", "kohya"]
FORMATS: tuple[str, ...] = get_args(LoraFormat)

SIDES = {"lora_A.weight": "A", "lora_down.weight": "A", "lora_B.weight": "B", "lora_up.weight": "B", "alpha": "alpha"}
ADAPTER_METADATA = "lora_adapter_metadata"


@dataclass(frozen=True)
class LoraFile:
    """A LoRA with the names of ``adapter``, fp32 values and one alpha for all modules."""

    state: dict[str, Tensor]
    alpha: float
    metadata: dict[str, str]

    @property
    def rank(self) -> int:
        return int(next(value for name, value in self.state.items() if name.endswith("lora_A.weight")).shape[0])

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(A, B) by module."""
        modules, state = sorted({name.rsplit(".lora_", 1)[0] for name in self.state}), self.state
        return {module: (state[f"{module}.lora_A.weight"], state[f"{module}.lora_B.weight"]) for module in modules}

    def delta(self, module: str) -> Tensor:
        """The change of one module's weight, (alpha / rank) B A, fp64. All together take more memory than the model."""
        a, b = (self.state[f"{module}.lora_{side}.weight"].double() for side in "AB")
        return (b @ a).mul_(self.alpha / self.rank)


def to_format(
    state: Mapping[str, Tensor], alpha: float, rank: int, form: LoraFormat, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of a file. Alpha is folded in the dtype of ``state``, before rounding to ``dtype``.

    Raises:
        BadInputError: the format has no name for a module; a value is too large for ``dtype``.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        module, side = name.removesuffix(".weight").rsplit(".lora_", 1)
        if form == "diffusers":
            tensors[f"transformer.{name}"] = value.to(dtype)
        elif form == "comfyui":
            folded = value * (alpha / rank) if side == "A" else value
            tensors[f"{_stem(module, form)}.lora_{side}.weight"] = folded.to(dtype)
        else:
            stem = _stem(module, form)
            tensors[f"{stem}.lora_{'down' if side == 'A' else 'up'}.weight"] = value.to(dtype)
            tensors[f"{stem}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    if lost := [name for name, value in tensors.items() if not bool(torch.isfinite(value).all())]:
        short = str(dtype).removeprefix("torch.")
        raise BadInputError(f"{one_line(lost[0], 80)} does not fit into {short}. Export with --dtype bf16 or fp32.")
    return {name: value.contiguous() for name, value in tensors.items()}


def adapter_metadata(state: Mapping[str, Tensor], alpha: float, rank: int) -> dict[str, str]:
    """The header entry from which diffusers reads alpha, rank and modules of an unfolded file."""
    from peft import LoraConfig

    modules = sorted({name.rsplit(".lora_", 1)[0] for name in state})
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules).to_dict()
    plain = {f"transformer.{key}": sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    return {ADAPTER_METADATA: json.dumps(plain, sort_keys=True, default=str)}


def read_lora(path: Path) -> LoraFile:
    """Reads a LoRA of any of the three formats, or a checkpoint's ``lora.safetensors``.

    Raises:
        BadInputError: no such file, not safetensors, no LoRA of a Wan transformer.
    """
    tensors, metadata = read_tensors(path)
    try:
        return from_format(tensors, metadata)
    except BadInputError as error:
        raise BadInputError(f"{path}: {error}. Give another LoRA of a Wan transformer.") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file and its metadata. Matrices in 8 bit become bf16, which holds their every value.

    Raises BadInputError: no such file, no safetensors, tensors of another kind than a LoRA's.
    """
    from safetensors import safe_open

    if not path.is_file():
        raise BadInputError(f"There is no file {path}. Give a LoRA in safetensors format.")
    tensors, metadata = {}, dict[str, str]()
    try:
        if not (problem := damage(path)):
            with safe_open(path, framework="pt") as file:
                metadata = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except Exception as error:  # also what PyTorch raises where it lacks a dtype or a shape
        problem = f"is not a readable safetensors file ({one_line(str(error))})"
    if problem:
        raise BadInputError(f"{path} {problem}. Give a LoRA in safetensors format.")
    for name, value in tensors.items():
        if value.is_floating_point():
            tensors[name] = value.to(torch.bfloat16) if value.element_size() == 1 else value
        elif value.is_complex() or not name.endswith(".alpha"):
            kind = str(value.dtype).removeprefix("torch.")
            raise BadInputError(f"{path} holds {shown(name)} as {kind}. Give a LoRA in 16 or 32 bit floating point.")
    return tensors, metadata


def from_format(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> LoraFile:
    """The inverse of ``to_format`` for every format. Alphas that differ between modules are folded; alpha is then the
    rank.

    Raises:
        BadInputError: a key of none of the formats, half a pair, more than one rank.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        stem, suffix = split_key(key, SIDES)
        if not suffix:
            raise BadInputError(
                f"its tensor {shown(key)} is not part of a LoRA that this program reads (pairs of lora_A and lora_B, "
                "or lora_down and lora_up)"
            )
        pairs.setdefault(_module_name(stem), {})[SIDES[suffix]] = value.to(torch.float32)
    if not pairs:
        raise BadInputError("it holds no LoRA")
    if half := [module for module, pair in pairs.items() if not {"A", "B"} <= pair.keys()]:
        raise BadInputError(f"it holds half a LoRA pair for {one_line(half[0], 80)}")
    for module, pair in pairs.items():
        if not is_pair(pair["A"], pair["B"]) or pair["A"].ndim + pair["B"].ndim != 4:
            sizes = f"{list(pair['B'].shape)} x {list(pair['A'].shape)}"
            raise BadInputError(
                f"its pair for {one_line(module, 80)} is {one_line(sizes)}, which are no two matrices of one rank"
            )
    ranks = {int(pair["A"].shape[0]) for pair in pairs.values()}
    if len(ranks) > 1:
        raise BadInputError(f"its modules have ranks {shown(sorted(ranks))}; one rank for all is supported")
    if lost := not_finite({f"{module}.{side}": pair[side] for module, pair in pairs.items() for side in "AB"}):
        raise BadInputError(
            f"{len(lost)} of its matrices hold NaN or infinity (the first: {one_line(lost[0], 80)}); take another file"
        )
    (rank,) = ranks
    default = header_alpha(metadata, rank)
    alphas = {
        module: tensor_alpha(pair["alpha"], module) if "alpha" in pair else default for module, pair in pairs.items()
    }
    one = len(set(alphas.values())) == 1
    state: dict[str, Tensor] = {}
    for module, pair in pairs.items():
        state[f"{module}.lora_A.weight"] = pair["A"] if one else pair["A"] * (alphas[module] / rank)
        state[f"{module}.lora_B.weight"] = pair["B"]
    return LoraFile(state, next(iter(alphas.values())) if one else float(rank), dict(metadata))


def diffusers_reads_kohya(state: Mapping[str, Tensor]) -> bool:
    """True if diffusers 0.42.1 can convert the kohya file: it needs every attention and feed-forward Linear of blocks 0
    to n - 1."""
    modules = {name.rsplit(".lora_", 1)[0] for name in state}
    blocks = {int(module.split(".")[1]) for module in modules if module.startswith("blocks.")}
    wanted = {f"blocks.{i}.{name}" for i in range(len(blocks)) for name in BLOCK_LINEARS if "add_" not in name}
    return bool(blocks) and wanted <= modules


def model_hash(file: bytes) -> str:
    """``sshs_model_hash`` of kohya's sd-scripts: SHA-256 of a safetensors file after its header, so metadata does not
    change it."""
    return hashlib.sha256(file[8 + int.from_bytes(file[:8], "little") :]).hexdigest()


def split_key(key: str, suffixes: Iterable[str]) -> tuple[str, str]:
    """Key -> (module name in the file, suffix). An unknown suffix stays part of the name; "" is returned for it."""
    suffix = next((suffix for suffix in suffixes if key.endswith(f".{suffix}")), "")
    return (key.removesuffix(f".{suffix}"), suffix) if suffix else (key, "")


def _stem(module: str, form: LoraFormat) -> str:
    """Name of a block's Linear in ComfyUI's or kohya's files."""
    match = re.fullmatch(r"(blocks\.\d+)\.(.+)", module)
    if match is None or match[2] not in BLOCK_LINEARS:
        raise BadInputError(
            f"The {form} format has no name for a LoRA on {one_line(module, 80)}. Export with --format diffusers."
        )
    wan = f"{match[1]}.{BLOCK_LINEARS[match[2]]}"
    return f"diffusion_model.{wan}" if form == "comfyui" else f"lora_unet_{wan.replace('.', '_')}"


def _module_name(stem: str) -> str:
    """The inverse of ``_stem``. diffusers' files have the module's name after a prefix, checkpoints without one."""
    if not stem.startswith(("diffusion_model.", "lora_")):
        return stem.removeprefix("transformer.")
    if number := re.search(r"blocks[._](\d+)", stem):
        for module in (f"blocks.{number[1]}.{linear}" for linear in BLOCK_LINEARS):
            if stem in (_stem(module, "comfyui"), _stem(module, "kohya")):
                return module
    raise BadInputError(f"its module {shown(stem)} is none of a Wan transformer's: this is a LoRA of another model")


def header_alpha(metadata: Mapping[str, str], rank: int) -> float:
    """Alpha from the header of a diffusers file or a checkpoint; the default is the rank, as in all tools."""
    try:
        if ADAPTER_METADATA in metadata:
            alpha = float(parse_json(metadata[ADAPTER_METADATA]).get("transformer.lora_alpha", rank))
        else:
            alpha = float(metadata.get("alpha", rank))
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise BadInputError(f"its header is damaged: {one_line(str(error))}") from error
    return _checked_alpha(alpha, "its header's alpha")


def tensor_alpha(value: Tensor, module: str) -> float:
    """A module's alpha from its tensor. Raises BadInputError unless it is one positive number."""
    if value.numel() != 1:
        raise BadInputError(f"its alpha of {one_line(module, 80)} holds {value.numel()} numbers in place of one")
    return _checked_alpha(float(value), f"its alpha of {one_line(module, 80)}")


def is_pair(a: Tensor, b: Tensor) -> bool:
    """Whether B A can be multiplied: matrices, or kernels of a convolution, of one rank."""
    return a.ndim >= 2 and b.ndim >= 2 and a.shape[0] >= 1 and b.flatten(1).shape[1] == a.shape[0]


def _checked_alpha(alpha: float, what: str) -> float:
    if not 1e-6 <= alpha <= 1e6:  # also false for NaN
        raise BadInputError(f"{what} is {alpha}, and numbers from 1e-6 to 1e6 make sense")
    return alpha
