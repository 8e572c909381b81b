"""The manifest of a checkpoint: what its files were when they were saved, so that damage is noticed before it is used.

``manifest.json`` holds the state that is no tensor, the settings that may not change, and size and SHA-256 of every
other file. Its last entry is the SHA-256 of the text before it; the whole is one canonical text, so that any other
byte anywhere is noticed. Format 1, of earlier versions that saved ``cursor.json`` in its place, is read without these
checks.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lowmem_drf.config import known_keys
from lowmem_drf.errors import BadInputError, LowmemError
from lowmem_drf.files import text_hash
from lowmem_drf.prompts import fingerprint
from lowmem_drf.schema import Config
from lowmem_drf.texts import shown
from lowmem_drf.types import Prompt

FORMAT = 2
MANIFEST = "manifest.json"
_FORMAT_1 = "cursor.json"

MAY_CHANGE = (
    *("steps", "skip_prompts", "micro_batch", "device", "engine", "processes", "zero.", "log."),
    *(
        f"optim.{key}"
        for key in ("lr", "grad_clip", "schedule", "cycles", "power", "warmup_steps", "eps", "weight_decay")
    ),
    *("optim.anchor", "optim.stop", "optim.max_skipped", "lora.scale", "lora.max_sigma"),
    *(
        f"memory.{key}"
        for key in ("checkpoint", "token_slices", "park", "stream", "text_device", "vram_gib", "fit", "on_oom")
    ),
    *(f"memory.{key}" for key in ("vae_strips", "vae_caches", "vae_cache_every", "keep_attention")),
    *("memory.record_decode", "memory.record_rollout"),
    *("memory.vae_dtype", "memory.vae_grad_dtype", "kernels.", "model.decoder"),
)
"""Prefixes of the keys that a resumed run may override: they change neither models nor reward, or are what a run that
meets NaN may have to change (``training.skips.advice``), or choose the decoder that the gradient goes through."""

_BY_CONTENT = ("prompts", "critic.questions")
"""Files whose content a resumed run compares, wherever they are now."""


class DamagedError(LowmemError):
    """A checkpoint is not what was saved."""


@dataclass(frozen=True)
class Manifest:
    """The entries are those of ``checkpoint.Checkpoint`` and of its ``prompts.Cursor``."""

    step: int
    epoch: int
    index: int
    prompts: str
    spread: Mapping[str, tuple[int, float, float]]
    skipped: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    questions: str = ""
    tiny_cosine: float | None = None
    steps: int = 0
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Name -> ``bytes`` and ``sha256`` of every other file of the checkpoint."""


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest of the files that are in the folder."""
    files = {path.name: _measured(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_bytes(_sealed({"format": FORMAT, **asdict(replace(manifest, files=files))}))


def read_manifest(folder: Path, files: bool = True) -> Manifest:
    """The manifest of the checkpoint in a folder named ``step-<step>``.

    Args:
        files: read the other files too, and compare them.

    Raises:
        DamagedError: the manifest, or a file, is not what was saved; the message says which.
        LowmemError: a later version wrote it, or it may not be read.
    """
    try:
        manifest = _format_1(folder) if (folder / _FORMAT_1).exists() else _parsed(folder / MANIFEST)
        if folder.name != f"step-{manifest.step:06d}":
            raise DamagedError(f"it is that of update {manifest.step}")
        for name, file in manifest.files.items() if files else ():
            if (folder / name).stat().st_size != file["bytes"]:
                raise DamagedError(f"{name} has another size than when it was saved")
            if _measured(folder / name) != file:
                raise DamagedError(f"{name} has other bytes than when it was saved")
    except DamagedError:
        raise
    except PermissionError as error:
        raise LowmemError(f"the checkpoint {folder} may not be read ({error}). Check its permissions.") from error
    except OSError as error:
        raise DamagedError(f"{Path(error.filename or folder).name} cannot be read: {error.strerror}") from error
    return manifest


def refuse_damaged(path: Path) -> None:
    """Raises LowmemError for a file of a checkpoint that is not what was saved; does nothing for any other file."""
    try:
        saved = _parsed(path.parent / MANIFEST).files.get(path.name) if (path.parent / MANIFEST).is_file() else None
        if saved and path.is_file() and _measured(path) != saved:
            raise DamagedError("it has other bytes than when it was saved")
    except DamagedError as error:
        raise LowmemError(f"{path} belongs to a damaged checkpoint ({error}). Take that of another one.") from error


def fixed_settings(config: Config) -> dict[str, Any]:
    """The settings of a run that may not change, by dotted key."""
    row = config.model_dump(mode="json")
    return {key: _value(row, key) for key in known_keys() if not key.startswith(MAY_CHANGE)}


def require_settings(run: Path, config: Config, manifest: Manifest) -> None:
    """Raises BadInputError if the run's ``config.toml`` (``config``) was edited in a key that may not change."""
    now = fixed_settings(config)
    edited = [
        f"{key} is {shown(now[key])}, and was {shown(value)}"
        for key, value in manifest.settings.items()
        if key in now and key not in _BY_CONTENT and not same_setting(now[key], value)
    ]
    if edited:
        more = f"; and {len(edited) - 3} more" if edited[3:] else ""
        raise BadInputError(
            f"{run / 'config.toml'} was edited since update {manifest.step} was saved: {'; '.join(edited[:3])}{more}. "
            "Put the old values back, or start a new run."
        )


def require_prompts(run: Path, prompts: Sequence[Prompt], saved: str) -> None:
    """Raises BadInputError if ``saved`` is the ``fingerprint`` of other prompts."""
    if saved != fingerprint(prompts):
        raise BadInputError(
            f"the prompts of {run} have changed since its last checkpoint, or their images. Restore the files, or "
            "start a new run. To leave some out: -s 'skip_prompts=[\"0003\"]' (ids, or line numbers of four digits)."
        )


def same_setting(now: Any, before: Any) -> bool:
    """Equal, or paths of files that were moved, or lists of them."""
    if isinstance(now, list) and isinstance(before, list) and len(now) == len(before):
        return all(map(same_setting, now, before))
    if isinstance(now, str) and isinstance(before, str) and Path(now).is_absolute() and Path(before).is_absolute():
        return Path(now).name == Path(before).name
    return bool(now == before)


def _value(row: Mapping[str, Any], key: str) -> Any:
    value: Any = row
    for part in key.split("."):
        value = value[part]
    return value


def _measured(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sealed(row: Mapping[str, Any]) -> bytes:
    digest = text_hash(json.dumps(row, indent=2))
    return f"{json.dumps({**row, 'digest': digest}, indent=2)}\n".encode()


def _parsed(path: Path) -> Manifest:
    data = path.read_bytes()
    try:
        row = json.loads(data)
        if _sealed({key: value for key, value in row.items() if key != "digest"}) != data:
            raise ValueError
        if row["format"] == FORMAT:
            return _manifest(row)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{MANIFEST} has other bytes than when it was saved") from error
    raise LowmemError(
        f"the checkpoint {path.parent} was written by another version of lowmem-drf (format {row['format']!r:.9}; this "
        f"one reads {FORMAT}). Use that version, or a later one."
    )


def _format_1(folder: Path) -> Manifest:
    try:
        return _manifest(json.loads((folder / _FORMAT_1).read_bytes()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{_FORMAT_1} does not hold what was saved") from error


def _manifest(row: Mapping[str, Any]) -> Manifest:
    """Raises ValueError, KeyError, TypeError or AttributeError for a row that is none."""
    numbers = [row["step"], row["epoch"], row["index"], row.get("skipped", 0), row.get("steps", 0)]
    files = {str(name): (file["bytes"], file["sha256"]) for name, file in row.get("files", {}).items()}
    numbers += [size for size, _ in files.values()]
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise ValueError
    if not all(re.fullmatch(r"\w[\w.-]{0,80}", name, re.ASCII) for name in files):
        raise ValueError
    step, epoch, index, skipped, steps = numbers[:5]
    spread = {name: (int(count), float(mean), float(var)) for name, (count, mean, var) in row["spread"].items()}
    cosine = row.get("tiny_cosine")
    rest = dict(row.get("settings", {})), str(row.get("questions", "")), None if cosine is None else float(cosine)
    sizes = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in files.items()}
    return Manifest(step, epoch, index, str(row["prompts"]), spread, skipped, *rest, steps, sizes)
