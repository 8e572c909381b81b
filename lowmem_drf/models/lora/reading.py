"""Reads LoRA files of every tool: the one reader behind ``sample --lora``, ``model.base_lora``, ``train --init-lora``
and ``inspect-lora``.

Every tensor of a file is used, or reported (``left_out``), or the file is refused: a LoRA that is applied in part
is silently wrong. The scale of a module is, in this order, that of its alpha tensor, of peft's settings (header or
``adapter_config.json``), or 1. Where diffusers drops tensors (differences of norms), they are applied, as in ComfyUI.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowmem_drf.errors import BadInputError
from lowmem_drf.models.generators import FAMILIES, names_of
from lowmem_drf.models.lora.changes import Difference, Dora, Factors, LoraChanges, Other, Pair
from lowmem_drf.models.lora.keys import LOHA, LOKR, Keys, read_keys
from lowmem_drf.models.lora.settings import ADAPTER_METADATA, Settings, checked_alpha, read_settings
from lowmem_drf.models.weights.files import PICKLES, damage, is_pickle
from lowmem_drf.models.weights.finite import not_finite
from lowmem_drf.models.weights.gguf_files import is_gguf
from lowmem_drf.models.weights.reader import DTYPES, FLOAT8, INTEGERS, TensorFiles
from lowmem_drf.texts import one_line, read_text, shown, some

if TYPE_CHECKING:
    from lowmem_drf.models.experts import Expert

ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
CHECKPOINT_FILE = "lora.safetensors"
_CURE = f"Give a LoRA of a {names_of(FAMILIES)} model in safetensors format."
_PARAMETERS = ("scale_shift_table",)
"""Modules that are a parameter themselves."""


def read_lora(path: Path, expert: Expert | None = None) -> LoraChanges:
    """Reads a LoRA file of any layout (``keys``), a peft adapter's folder, or a checkpoint's ``lora.safetensors``. The
    tensors keep the file's dtype and are on the CPU.

    Args:
        expert: of a model with two, the one that it is for.

    Raises:
        BadInputError: no such file, no safetensors, no LoRA of a text-to-video model of a known family; the message
            names the kind of file, or the module.
    """
    file = lora_file(path)
    if what := _damage(file):
        raise BadInputError(f"{file} {what}." + (f" {_CURE}" if "Give " not in what else ""))
    try:
        files = TensorFiles([file])
        keys = read_keys(files.entries, expert)
        _refuse_dtypes(files, keys)
        settings = _settings(file, files.metadata, keys)
        pairs: dict[str, Pair] = {}
        others: dict[str, list[Other]] = {}
        for module, parts in keys.modules.items():
            read = {part: _read(files, part, key) for part, key in parts.items()}
            _take(module, keys.stems[module], read, settings, pairs, others)
    except (BadInputError, ValueError, OSError, RuntimeError) as error:
        said = one_line(str(error), 400).removesuffix(".")
        raise BadInputError(f"{file}: {said}." + (f" {_CURE}" if "Give " not in said else "")) from error
    return LoraChanges(pairs, others, keys.left_out, keys.layout, files.metadata)


def lora_file(path: Path) -> Path:
    """The safetensors file of a LoRA, of a peft adapter's folder, or of a checkpoint. Raises BadInputError if there is
    none."""
    if path.is_dir():
        found = sorted(file.name for file in path.iterdir())
        files = [name for name in found if name.endswith(".safetensors")]
        if known := [name for name in (ADAPTER_FILE, CHECKPOINT_FILE) if name in files]:
            return path / known[0]
        if len(files) == 1:
            return path / files[0]
        if files:
            what = f"holds {some(files)}: give one of them"
        elif pickles := [name for name in found if name.endswith(PICKLES)]:
            what = f"holds its weights as a pickle ({pickles[0]}), which can run code: only safetensors files are read"
        else:
            what = f"holds no adapter ({ADAPTER_FILE})"
        raise BadInputError(f"The folder {path} {what}. {_CURE}")
    if not path.is_file():
        raise BadInputError(f"There is no file {path}. {_CURE}")
    return path


def _damage(file: Path) -> str:
    """What is wrong with a file as a whole; "" if nothing."""
    try:
        if is_gguf(file):
            return "is a GGUF file: a quantised model, no LoRA. Give it as model.transformer"
        if file.suffix in PICKLES or is_pickle(file):
            return "is a pickle, which can run code: only safetensors files are read. Convert it, or get it anew"
        return damage(file)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def _refuse_dtypes(files: TensorFiles, keys: Keys) -> None:
    for parts in keys.modules.values():
        for part, key in parts.items():
            entry = files.entries[key]
            known = {**DTYPES, **FLOAT8, **(INTEGERS if part == "alpha" else {})}
            if entry.dtype not in known:
                raise BadInputError(
                    f"it holds {shown(key)} as {shown(entry.dtype)}; LoRAs are read in 8, 16, 32 or 64 bit floating "
                    "point"
                )
            if not math.prod(entry.shape):
                raise BadInputError(f"its {shown(key)} is {shown(list(entry.shape))}: it holds no numbers")


def _read(files: TensorFiles, part: str, key: str) -> Tensor:
    value = files.read(key, {**DTYPES, **FLOAT8, **INTEGERS})
    # an alpha that is used is checked then; LoKr of whole matrices has one that is not, and in fp16 it is infinite
    if part != "alpha" and not_finite({key: value.float() if value.dtype == torch.float64 else value}):
        raise BadInputError(f"its {shown(key)} holds NaN or infinity, or numbers too large for fp32")
    return value


def _settings(file: Path, metadata: Mapping[str, str], keys: Keys) -> Settings | None:
    if text := metadata.get(ADAPTER_METADATA):
        return read_settings(text, "its header")
    config = file.parent / ADAPTER_CONFIG
    if (file.name == ADAPTER_FILE or keys.layout == "peft") and config.is_file():
        return read_settings(read_text(config, str(config)), str(config))
    if "alpha" in metadata:  # a checkpoint of ours
        try:
            return Settings("LORA", None, float(metadata["alpha"]), {}, {}, False)
        except ValueError as error:
            raise BadInputError(f"its header is damaged: alpha is {shown(metadata['alpha'])}") from error
    return None


def _take(
    module: str,
    stem: str,
    read: dict[str, Tensor],
    settings: Settings | None,
    pairs: dict[str, Pair],
    others: dict[str, list[Other]],
) -> None:
    """Adds a module's changes."""
    weight = module if module.rpartition(".")[2] in _PARAMETERS else f"{module}.weight"
    for part, name in (("diff", weight), ("diff_b", f"{module}.bias"), ("diff_m", module)):
        if part in read:
            others.setdefault(name, []).append(Difference(read[part]))
    product = _product(module, stem, read, settings)
    if product is None:
        if left := sorted(read.keys() & {"A", "B", "alpha", "bias", "dora", *LOKR, *LOHA}):
            raise BadInputError(f"it holds half a LoRA pair for {shown(module)} ({', '.join(left)} alone)")
        return
    if "bias" in read:
        others.setdefault(f"{module}.bias", []).append(Difference(read["bias"], product.scale, "lora_B.bias"))
    if "dora" in read:
        others.setdefault(weight, []).append(Dora(product, read["dora"]))
    elif isinstance(product, Pair):
        pairs[module] = product
    else:
        others.setdefault(weight, []).append(product)


def _product(module: str, stem: str, read: Mapping[str, Tensor], settings: Settings | None) -> Pair | Factors | None:
    """A module's pair, LoKr or LoHa, whose matrices can be multiplied."""
    kinds = [kind for kind, parts in (("LoRA", ("A", "B")), ("LoKr", LOKR), ("LoHa", LOHA)) if read.keys() & set(parts)]
    if len(kinds) > 1:
        raise BadInputError(f"it holds {' and '.join(kinds)} for {shown(module)}, and one of them is expected")
    names = (stem, module)
    match kinds:
        case ["LoRA"] if "A" in read and "B" in read:
            a, b = read["A"], read["B"]
            if a.ndim < 2 or b.ndim < 2 or math.prod(b.shape[1:]) != a.shape[0]:
                sizes = one_line(f"{list(b.shape)} x {list(a.shape)}")
                raise BadInputError(f"its pair for {shown(module)} is {sizes}, which are no two matrices of one rank")
            if all(size == 1 for size in a.shape[2:]):
                a = a.flatten(1)
            return Pair(a, b.flatten(1), _alpha(module, names, read, settings, int(a.shape[0])))
        case ["LoKr" | "LoHa" as kind]:
            first, second = (_factor(read, f"{'lokr' if kind == 'LoKr' else 'hada'}_w{i}") for i in (1, 2))
            if not first or not second:
                return None
            by_rank = (first, second) if kind == "LoKr" else (first,)
            ranks = [int(parts[1].shape[0]) for parts in by_rank if len(parts) == 2 and parts[1].ndim == 2]
            made = Factors(first, second, _scale(module, names, read, settings, ranks), kind)
            if not made.is_product():
                raise BadInputError(
                    f"its {kind} for {shown(module)} is {one_line(made.size)}, which cannot be multiplied"
                )
            return made
    return None


def _factor(read: Mapping[str, Tensor], name: str) -> tuple[Tensor, ...]:
    if name in read:
        return (read[name],)
    return (read[f"{name}_a"], read[f"{name}_b"]) if f"{name}_a" in read and f"{name}_b" in read else ()


def _scale(
    module: str, names: tuple[str, ...], read: Mapping[str, Tensor], settings: Settings | None, ranks: list[int]
) -> float:
    """Of LoKr and LoHa. LyCORIS and ComfyUI do not scale two whole matrices; peft does, by its settings' rank."""
    if ranks:
        rank = ranks[0]
    elif settings and settings.rank and "alpha" not in read:
        rank = settings.rank
    else:
        return 1.0
    return _alpha(module, names, read, settings, rank) / rank


def _alpha(
    module: str, names: tuple[str, ...], read: Mapping[str, Tensor], settings: Settings | None, rank: int
) -> float:
    from_settings = settings.alpha_of(names, rank) if settings else float(rank)
    if "alpha" not in read:
        return from_settings
    value = read["alpha"]
    if value.numel() != 1:
        raise BadInputError(f"its alpha of {shown(module)} holds {value.numel()} numbers in place of one")
    if settings and from_settings != rank:
        raise BadInputError(
            f"its header and its alpha tensors both scale it ({shown(module)}), and programs differ in what they make "
            "of that"
        )
    return checked_alpha(float(value), f"its alpha of {shown(module)}")
