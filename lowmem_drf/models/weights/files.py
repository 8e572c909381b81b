"""Safetensors files before they are read: is everything there, and is it whole? Nothing is loaded; headers are read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lowmem_drf.errors import BadInputError

Role = Literal["generator", "critic"]

SUBFOLDERS: dict[Role, tuple[str, ...]] = {"generator": ("transformer", "vae", "text_encoder"), "critic": ("",)}
"""Where a model folder holds weights, each with a config.json. A generator of two experts has ``SECOND`` besides."""

SECOND = "transformer_2"
MODEL_INDEX = "model_index.json"
"""Of a generator: which models it has."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_WEIGHTS = re.compile(r"(model|diffusion_pytorch_model)(-\d{5}-of-\d{5})?\.safetensors")
_INDEX = re.compile(r"(model|diffusion_pytorch_model)\.safetensors\.index\.json")
_LFS_POINTER = b"version https://git-lfs"
_NOT_SAFETENSORS = "is damaged: it does not begin with the header of a safetensors file"


@dataclass(frozen=True, slots=True)
class Problem:
    """A file that is missing or damaged."""

    file: str
    """Relative to the model's folder."""
    what: str
    missing: bool


def find_problems(folder: Path, role: Role, without: tuple[str, ...] = ()) -> list[Problem]:
    """What keeps a model folder from being loaded. ``without``: subfolders that are not needed.

    Raises:
        BadInputError: weights in another format than safetensors.
    """
    problems: list[Problem] = []
    for subfolder in subfolders(folder, role):
        if subfolder in without:
            continue
        place, prefix = folder / subfolder, f"{subfolder}/" if subfolder else ""
        if not (place / "config.json").is_file():
            problems.append(Problem(f"{prefix}config.json", "is missing", True))
        names = sorted(path.name for path in place.iterdir()) if place.is_dir() else []
        found, indices = weight_files(names), weight_indices(names)
        wanted = set(found) | {shard for index in indices for shard in _shards(place / index)}
        if not wanted:
            refuse_pickles(str(folder), prefix, names)
            problems.append(Problem(f"{prefix}*.safetensors", "are missing", True))
        if not indices and (shards := [name for name in found if "-of-" in name]):
            problems.append(Problem(f"{prefix}{shards[0].split('-0')[0]}.safetensors.index.json", "is missing", True))
        for name in sorted(wanted):
            if (place / name).is_file():
                if what := damage(place / name):
                    problems.append(Problem(prefix + name, what, False))
            else:
                problems.append(Problem(prefix + name, "is missing", True))
    if role == "generator":
        if not (folder / "tokenizer").is_dir():
            problems.append(Problem("tokenizer/", "is missing", True))
        if not (folder / MODEL_INDEX).is_file():
            problems.append(Problem(MODEL_INDEX, "is missing", True))
    return problems


def subfolders(folder: Path, role: Role) -> tuple[str, ...]:
    """Where this model folder is to hold weights."""
    index = folder / MODEL_INDEX
    second = role == "generator" and index.is_file() and has_second(read_model_index(index))
    return (*SUBFOLDERS[role], SECOND) if second else SUBFOLDERS[role]


def read_model_index(file: Path) -> dict[str, Any]:
    """Raises BadInputError where it cannot be read."""
    try:
        index: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        index.get("boundary_ratio")
    except (OSError, ValueError, AttributeError) as error:
        raise BadInputError(f"{file} cannot be read ({error}). Get it anew.") from error
    return index


def has_second(index: Mapping[str, Any]) -> bool:
    """Whether a ``model_index.json`` names a second transformer that its pipeline uses: without a boundary it uses the
    first alone."""
    return index.get("boundary_ratio") is not None and bool((index.get(SECOND) or [None])[-1])


def weight_files(names: list[str]) -> list[str]:
    """Those of a folder's names that diffusers and transformers load, whole or in shards; variants (``.fp16.``) are not
    among them."""
    return [name for name in names if _WEIGHTS.fullmatch(name)]


def weight_indices(names: list[str]) -> list[str]:
    """The lists of shards among a folder's names."""
    return [name for name in names if _INDEX.fullmatch(name)]


def refuse_pickles(where: str, prefix: str, names: list[str]) -> None:
    """Raises BadInputError where the weights are there in a format that can hold code."""
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        raise BadInputError(
            f"{where} holds its weights as {prefix}{pickles[0]}, and only safetensors files are loaded: pickles can run code. "
            "Take a repository with safetensors, or convert them: from_pretrained(…).save_pretrained(FOLDER, safe_serialization=True)."
        )


def damage(file: Path) -> str:
    """What is wrong with a safetensors file; empty where its header and its size agree."""
    try:
        header, start = read_header(file)
    except ValueError as error:
        return str(error)
    end = start + max((entry["data_offsets"][1] for entry in _entries(header)), default=0)
    if (size := file.stat().st_size) != end:
        return f"is {'cut off' if size < end else 'too long'}: {size:,} bytes, and its header says {end:,}"
    return ""


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's header, and where its data starts. Raises ValueError with what is wrong."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError("is a pointer of Git LFS, not the file itself: run git lfs pull in its folder")
        stream.seek(0)
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or (length > size - 8 and stream.read(1) in (b"", b"{")):
            raise ValueError(f"is cut off: its {size:,} bytes end before its header does")
        if length > size - 8:
            raise ValueError(_NOT_SAFETENSORS)
        stream.seek(8)
        try:
            header = json.loads(stream.read(length))
            for entry in _entries(header):
                math.prod(entry["shape"]), entry["data_offsets"][1], entry["dtype"]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise ValueError(_NOT_SAFETENSORS) from error
    return header, 8 + length


def weight_count(folder: Path) -> int:
    """Numbers in all weight files of a folder: parameters."""
    names = sorted(path.name for path in folder.iterdir())
    shards = {shard for index in weight_indices(names) for shard in _shards(folder / index)}
    return sum(
        math.prod(entry["shape"])
        for name in shards or weight_files(names)
        for entry in _entries(read_header(folder / name)[0])
    )


def _entries(header: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (entry for name, entry in header.items() if name != "__metadata__")


def _shards(index: Path) -> set[str]:
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise BadInputError(f"{index} cannot be read ({error}). Get it anew.") from error
