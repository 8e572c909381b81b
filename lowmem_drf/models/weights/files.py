"""Checks that a model's safetensors files are complete and undamaged. Reads headers, loads nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lowmem_drf.errors import BadInputError
from lowmem_drf.texts import parse_json

Role = Literal["generator", "critic", "reward"]

SUBFOLDERS: dict[Role, tuple[str, ...]] = {
    "generator": ("transformer", "vae", "text_encoder"),
    "critic": ("",),
    "reward": ("",),
}
"""Folders with weights and a config.json. A generator with two experts also has ``SECOND``, one with several text
encoders those that begin with ``MORE_TEXT``, some image-to-video ones ``IMAGE_ENCODER``."""

SECOND = "transformer_2"
MORE_TEXT = "text_encoder_"
"""Before the number of a generator's second text encoder, and of others after it."""
IMAGE_ENCODER = "image_encoder"
"""Of a generator whose clips begin with an image; ``image_processor`` beside it has its pixels' scaling."""
MODEL_INDEX = "model_index.json"
"""Lists a generator's models."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_WEIGHTS = re.compile(r"(model|diffusion_pytorch_model)(-\d{5}-of-\d{5})?\.safetensors")
_INDEX = re.compile(r"(model|diffusion_pytorch_model)\.safetensors\.index\.json")
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
_BYTES |= {"I8": 1, "U8": 1, "I16": 2, "I32": 4, "I64": 8}
_MOST_HEADER = 100_000_000
"""Bytes of a header, as in the safetensors library."""
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
    """Why a model folder cannot be loaded. ``without``: subfolders that are not needed.

    Raises BadInputError: weights in another format than safetensors.
    """
    problems: list[Problem] = []

    def missing(file: str, what: str = "is missing") -> None:
        problems.append(Problem(file, what, True))

    for subfolder in subfolders(folder, role):
        if subfolder in without:
            continue
        place, prefix = folder / subfolder, f"{subfolder}/" if subfolder else ""
        if not (place / "config.json").is_file():
            missing(f"{prefix}config.json")
        names = sorted(path.name for path in place.iterdir()) if place.is_dir() else []
        found, indices = weight_files(names), weight_indices(names)
        wanted = set(found) | {shard for index in indices for shard in _shards(place / index)}
        if not wanted:
            refuse_pickles(str(folder), prefix, names)
            missing(f"{prefix}*.safetensors", "are missing")
        if not indices and (shards := [name for name in found if "-of-" in name]):
            missing(f"{prefix}{shards[0].split('-0')[0]}.safetensors.index.json")
        for name in sorted(wanted):
            if not (place / name).is_file():
                missing(prefix + name)
            elif what := damage(place / name):
                problems.append(Problem(prefix + name, what, False))
    if role == "generator":
        needed = subfolders(folder, role)
        beside = [sub.replace("text_encoder", "tokenizer") for sub in needed if "text" in sub]
        for name in [*beside, *(["image_processor"] if IMAGE_ENCODER in needed else [])]:
            if not (folder / name).is_dir():
                missing(f"{name}/")
        if not (folder / MODEL_INDEX).is_file():
            missing(MODEL_INDEX)
    return problems


def subfolders(folder: Path, role: Role) -> tuple[str, ...]:
    """Subfolders in which this model must have weights."""
    file = folder / MODEL_INDEX
    index = read_model_index(file) if role == "generator" and file.is_file() else {}
    text = [name for name in index if name.startswith(MORE_TEXT) and has_model(index, name)]
    image = [IMAGE_ENCODER] if has_model(index, IMAGE_ENCODER) else []
    return (*SUBFOLDERS[role], *text, *image, *([SECOND] if has_second(index) else []))


def read_model_index(file: Path) -> dict[str, Any]:
    """Raises BadInputError if it cannot be read."""
    try:
        index: dict[str, Any] = parse_json(file.read_bytes())
        index.get("boundary_ratio")
    except (OSError, ValueError, AttributeError) as error:
        raise BadInputError(f"{file} cannot be read ({error}). Get it anew.") from error
    return index


def has_second(index: Mapping[str, Any]) -> bool:
    """True if a ``model_index.json`` names a second transformer and the boundary without which it is not used."""
    return index.get("boundary_ratio") is not None and has_model(index, SECOND)


def has_model(index: Mapping[str, Any], name: str) -> bool:
    """True if a ``model_index.json`` names a class for a model: ``[null, null]`` stands for none."""
    return bool((index.get(name) or [None])[-1])


def weight_files(names: list[str]) -> list[str]:
    """The names that diffusers and transformers load, whole or in shards, without variants (``.fp16.``)."""
    return [name for name in names if _WEIGHTS.fullmatch(name)]


def weight_indices(names: list[str]) -> list[str]:
    """The names of shard indices."""
    return [name for name in names if _INDEX.fullmatch(name)]


def refuse_pickles(where: str, prefix: str, names: list[str]) -> None:
    """Raises BadInputError if there are weights in a format that can run code."""
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        raise BadInputError(
            f"{where} holds its weights as {prefix}{pickles[0]}, and only safetensors files are loaded: "
            "pickles can run code. Take a repository with safetensors, or convert them: "
            "from_pretrained(…).save_pretrained(FOLDER, safe_serialization=True)."
        )


def is_pickle(file: Path) -> bool:
    """Whether a file is a pickle, alone or in an archive as ``torch.save`` makes it, by its content."""
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        begin = stream.read(9)
    # a safetensors file may begin with 0x80 too, the length of its header; that header follows
    return begin[:4] == b"PK\x03\x04" or (begin[:1] == b"\x80" and begin[8:] != b"{")


def damage(file: Path) -> str:
    """A description of a safetensors file's damage; empty if its header and size agree."""
    try:
        header, start = read_header(file)
    except ValueError as error:
        return str(error)
    places = [entry["data_offsets"] for entry in _entries(header)]
    end = start + max((place[1] for place in places), default=0)
    if (size := file.stat().st_size) != end:
        return f"is {'cut off' if size < end else 'too long'}: {size:,} bytes, and its header says {end:,}"
    if sum(last - first for first, last in places) > end - start:
        return "is damaged: its header says that tensors share bytes"
    return ""


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """(header of a safetensors file, offset of its data). Raises ValueError that describes the damage."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError("is a pointer of Git LFS, not the file itself: run git lfs pull in its folder")
        stream.seek(0)
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or (length > size - 8 and stream.read(1) in (b"", b"{")):
            raise ValueError(f"is cut off: its {size:,} bytes end before its header does")
        if length > min(size - 8, _MOST_HEADER):
            raise ValueError(_NOT_SAFETENSORS)
        stream.seek(8)
        try:
            header = parse_json(stream.read(length))
            whole = all(map(_is_entry, _entries(header))) and isinstance(header.get("__metadata__", {}), dict)
        except (ValueError, AttributeError) as error:
            raise ValueError(_NOT_SAFETENSORS) from error
    if not whole:
        raise ValueError(_NOT_SAFETENSORS)
    return header, 8 + length


def weight_count(folder: Path) -> int:
    """Parameters in all weight files of a folder."""
    headers = [read_header(file)[0] for file in listed_weights(folder)]
    return sum(math.prod(entry["shape"]) for header in headers for entry in _entries(header))


def listed_weights(folder: Path) -> list[Path]:
    """The weight files that a library loads, sorted: the shards that an index lists, or else the one file."""
    names = [path.name for path in folder.iterdir()]
    shards = {shard for index in weight_indices(names) for shard in _shards(folder / index)}
    return [folder / name for name in sorted(shards or weight_files(names))]


def _is_entry(entry: Any) -> bool:
    """Whether it says in numbers where a tensor is, and the place has the tensor's size."""
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end]} if len(dtype) <= 16:
            numbers = [*shape, start, end]
        case _:
            return False
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        return False
    size = _BYTES.get(dtype)
    return start <= end if size is None else end - start == size * math.prod(shape)


def _entries(header: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (entry for name, entry in header.items() if name != "__metadata__")


def _shards(index: Path) -> set[str]:
    try:
        return set(map(str, parse_json(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInputError(f"{index} cannot be read ({error}). Get it anew.") from error
