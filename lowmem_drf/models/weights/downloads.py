"""Prepares a model for loading: announces and downloads missing files, checks local ones, the disk and host memory.

Downloads only used files of a hub repository: configurations, the tokenizer and safetensors. A model that is complete
in the hub's cache or in a folder needs no network.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lowmem_drf.errors import BadInputError, LowmemError
from lowmem_drf.models.weights.files import (
    IMAGE_ENCODER,
    MODEL_INDEX,
    MORE_TEXT,
    SECOND,
    SUBFOLDERS,
    Problem,
    Role,
    find_problems,
    refuse_pickles,
    subfolders,
    weight_count,
    weight_files,
    weight_indices,
)
from lowmem_drf.models.weights.sources import resolve

if TYPE_CHECKING:
    from huggingface_hub import DryRunFileInfo

Say = Callable[[str], None]

DISK_MARGIN = 1 << 30
"""Bytes of the disk to leave free."""
HOST_MARGIN = 2 << 30
"""Bytes of host memory for everything except weights: Python, the libraries, CUDA's host side."""


def prepare(folder_or_id: str, role: Role, say: Say, without: tuple[str, ...] = ()) -> Path:
    """Checks a folder, or downloads missing files of a hub id, and returns the complete local folder. The next call
    resumes an interrupted download.

    Args:
        say: announces a download: its size and how much is already here.
        without: subfolders that are not needed (``"transformer"`` if a single file replaces it).

    Raises:
        BadInputError: no such folder or repository, no access, no safetensors, a file missing or damaged (named).
        LowmemError: not enough disk; the network failed.
    """
    place = resolve(folder_or_id, role)
    if Path(place).is_dir():
        _refuse(find_problems(Path(place), role, without), place)
        return Path(place)
    cached = _cached_folder(place, role)
    problems = [] if cached is None else find_problems(cached, role, without)
    _refuse([problem for problem in problems if not problem.missing], str(cached))
    if cached is None or problems:
        cached = _download(place, role, say, without)
        _refuse(find_problems(cached, role, without), str(cached))
    return cached


def cached(folder_or_id: str, role: Role | Literal["file"]) -> str:
    """``here``, ``missing``, or what is wrong with the first file. Needs no network.

    Args:
        role: ``"file"``: a single file of a repository (``owner/name/file``).
    """
    if role == "file":
        from huggingface_hub import try_to_load_from_cache

        owner, name, file = folder_or_id.split("/", 2)
        return "here" if isinstance(try_to_load_from_cache(f"{owner}/{name}", file), str) else "missing"
    place = resolve(folder_or_id, role)
    folder = Path(place) if Path(place).is_dir() else _cached_folder(place, role)
    if folder is None:
        return "missing"
    return next((f"{problem.file} {problem.what}" for problem in find_problems(folder, role)), "here")


def check_host_memory(
    folder: Path, role: Role, bytes_per_number: int, without: tuple[str, ...] = (), single: int = 0
) -> None:
    """Requires that a folder's largest model fits into free host memory: models are loaded one after another, in the
    run's dtype; two transformers count as one. Passes if the system does not report free memory.

    Args:
        single: parameters of a transformer that comes from a single file.

    Raises:
        LowmemError: it does not fit.
    """
    free = available_host_bytes()
    wanted = [subfolder for subfolder in subfolders(folder, role) if subfolder not in without]
    needs = {subfolder: bytes_per_number * weight_count(folder / subfolder) for subfolder in wanted}
    if single:
        needs["transformer"] = bytes_per_number * single
    if SECOND in needs:
        needs["transformer"] = needs.get("transformer", 0) + needs.pop(SECOND)
    largest = max(needs, key=lambda subfolder: needs[subfolder])
    if free is not None and needs[largest] + HOST_MARGIN > free:
        model = f"{largest} of the generator" if largest else role
        raise LowmemError(
            f"Loading the {model} ({folder}) takes {_gb(needs[largest])} of host memory and {_gb(HOST_MARGIN)} "
            f"besides; {_gb(free)} are free. Close other programs, add swap, take a smaller model"
            + (", or -s dtype=bf16, which halves it." if bytes_per_number > 2 else ".")
        )


def available_host_bytes() -> int | None:
    """Available memory and free swap, bounded by a container's memory limit (cgroup v2); ``None``: not known."""
    try:
        import psutil

        free = int(psutil.virtual_memory().available + psutil.swap_memory().free)
    except Exception:  # not installed, broken (doctor runs all the same), or a sandbox hides /proc
        return None
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text(encoding="ascii") for name in ("max", "current"))
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return free


def hub_file(repository: str, name: str, say: Say) -> Path:
    """A file of a hub repository, downloaded once. Raises BadInputError and LowmemError like ``prepare``."""
    from huggingface_hub import hf_hub_download, list_repo_files, try_to_load_from_cache

    with _hub_errors(repository):
        cached = try_to_load_from_cache(repository, name)
        if isinstance(cached, str):
            return Path(cached)
        names = list_repo_files(repository)
        if name not in names:
            there = ", ".join(sorted(names)[:8])
            raise BadInputError(f"{repository} on the Hugging Face hub has no file {name}. It has: {there}")
        _announce(repository, [hf_hub_download(repository, name, dry_run=True)], say)
        return Path(hf_hub_download(repository, name))


def _download(hub_id: str, role: Role, say: Say, without: tuple[str, ...]) -> Path:
    from huggingface_hub import list_repo_files, snapshot_download

    with _hub_errors(hub_id):
        wanted = _wanted(hub_id, role, list_repo_files(hub_id), without)
        _announce(hub_id, snapshot_download(hub_id, allow_patterns=wanted, dry_run=True), say)
        return Path(snapshot_download(hub_id, allow_patterns=wanted))


def _wanted(hub_id: str, role: Role, files: list[str], without: tuple[str, ...]) -> list[str]:
    """The files of a repository that loading reads. Raises BadInputError if it has no safetensors weights."""
    wanted, more = [], list[str]()
    if role == "generator":
        wanted = [
            name for name in files if name == MODEL_INDEX or re.match(r"(tokenizer(_\d)?|image_processor)/", name)
        ]
        more = [subfolder for subfolder in (SECOND, IMAGE_ENCODER) if f"{subfolder}/config.json" in files]
        more += [
            name.removesuffix("/config.json") for name in files if re.fullmatch(rf"{MORE_TEXT}\d/config.json", name)
        ]
    for subfolder in (*SUBFOLDERS[role], *more):
        if subfolder in without:
            wanted += [name for name in files if name == f"{subfolder}/config.json"]
            continue
        prefix = f"{subfolder}/" if subfolder else ""
        names = [name.removeprefix(prefix) for name in files if name.startswith(prefix)]
        names = [name for name in names if "/" not in name]
        weights = weight_files(names)
        if not weights:
            refuse_pickles(f"{hub_id} on the Hugging Face hub", prefix, names)
            raise BadInputError(
                f"{hub_id} on the Hugging Face hub has no safetensors in {prefix or 'its top folder'}: it is not a "
                f"{role} in the layout expected."
            )
        small = [name for name in names if name.endswith((".json", ".txt", ".model", ".jinja"))]
        small = [name for name in small if ".index." not in name]
        wanted += [prefix + name for name in (*weights, *weight_indices(names), *small)]
    return wanted


def _announce(hub_id: str, files: list[DryRunFileInfo], say: Say) -> None:
    """Announces the download. Raises LowmemError if the disk is too small."""
    from huggingface_hub.constants import HF_HUB_CACHE

    todo, here = (sum(file.file_size or 0 for file in files if file.will_download == new) for new in (True, False))
    say(f"{hub_id}: {_gb(todo)} to download, {_gb(here) if here else '0'} of it is here; to {HF_HUB_CACHE}")
    place = next(path for path in (Path(HF_HUB_CACHE), *Path(HF_HUB_CACHE).absolute().parents) if path.exists())
    if (free := shutil.disk_usage(place).free) < todo + DISK_MARGIN:
        raise LowmemError(
            f"{hub_id} needs {_gb(todo)} more on the disk of {place}, and {_gb(free)} are free. "
            "Make room (hf cache prune), or let HF_HOME name a folder on another disk."
        )


def _cached_folder(hub_id: str, role: Role) -> Path | None:
    """The cached snapshot of a repository, complete or not. Raises BadInputError for an invalid id."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for subfolder in SUBFOLDERS[role]:
        try:
            cached = try_to_load_from_cache(hub_id, f"{subfolder}/config.json".lstrip("/"))
        except HFValidationError as error:
            problem = f"There is no folder {hub_id}, and it is no id on the Hugging Face hub (owner/name)."
            raise BadInputError(problem) from error
        if isinstance(cached, str):
            return Path(cached).parents[1 if subfolder else 0]
    return None


@contextmanager
def _hub_errors(hub_id: str) -> Iterator[None]:
    """Converts the hub's errors to BadInputError and LowmemError."""
    from huggingface_hub import errors

    again = "Run the same command again: what is here already is not downloaded twice."
    try:
        yield
    except errors.GatedRepoError as error:
        raise BadInputError(
            f"{hub_id} asks for its licence to be accepted: open https://huggingface.co/{hub_id}, accept it, "
            "then hf auth login."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise BadInputError(
            f"There is no folder {hub_id}, and no such model on the Hugging Face hub, or it is private (hf auth login)."
        ) from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise BadInputError(
            f"{hub_id} is not complete on this machine, and the Hugging Face hub cannot be reached (or HF_HUB_OFFLINE "
            f"is set). Download it where there is a network: hf download {hub_id}; or give a folder."
        ) from error
    except errors.HfHubHTTPError as error:
        raise LowmemError(f"The Hugging Face hub refused {hub_id}: {_first_line(error)}. {again}") from error
    except Exception as error:
        # the hub's client passes on its HTTP library's exceptions, and that library has changed
        if isinstance(error, OSError) or type(error).__module__.startswith(("httpx", "huggingface_hub")):
            raise LowmemError(f"The download of {hub_id} stopped: {_first_line(error)}. {again}") from error
        raise


def _refuse(problems: list[Problem], where: str) -> None:
    if not problems:
        return
    lines = [f"{where}/{problem.file} {problem.what}" for problem in problems]
    many = f"\n… and {len(lines) - 4} more" if len(lines) > 4 else ""
    cure = "Give a complete folder in diffusers / transformers layout."
    if not all(problem.missing for problem in problems):
        cure = "Delete the damaged files and get them anew (an id of the Hugging Face hub: run the same command again)."
    raise BadInputError("\n".join(lines[:4]) + f"{many}\n{cure}")


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
