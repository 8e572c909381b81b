"""What took long to make (questions and reference answers that a model wrote, plans, embeddings), cached on disk: one
file per result, named by the hash of everything that the result depends on. An unreadable file counts as missing; an
unwritable folder caches nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_drf.files import write_text, written_aside
from lowmem_drf.texts import parse_json

if TYPE_CHECKING:
    from torch import Tensor


def cache_folder() -> Path:
    """``$LOWMEM_DRF_CACHE``, or ``lowmem-drf`` in the user's cache folder; for a user without a home, as containers
    have, in the folder of temporary files."""
    if given := os.environ.get("LOWMEM_DRF_CACHE"):
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowmem-drf"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / "lowmem-drf"


LIBRARIES = ("torch", "diffusers", "transformers", "peft", "bitsandbytes", "triton", "xformers")
"""What a plan runs."""


@cache
def code_versions() -> dict[str, str | None]:
    """What results of this program's own code depend on: the versions of Python and of ``LIBRARIES`` (``None``: not
    installed), and a hash of all source files of this package and its kernels."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    package = Path(__file__).resolve().parents[1]
    kernels = package.parent / "kernels"  # of a checkout; in a wheel they are inside the package
    files = [*package.rglob("*.py"), *(kernels.rglob("*.py") if kernels.is_dir() else ())]
    return found | {"source": files_hash(files)}


def files_hash(files: Iterable[Path]) -> str:
    """Changes with the files' paths and contents. A file that cannot be read counts as empty."""
    digest = hashlib.sha256()
    for file in sorted(files):
        content = b""
        with suppress(OSError):
            content = file.read_bytes()
        digest.update(f"{file}\0{len(content)}\0".encode("utf-8", "surrogateescape") + content)
    return digest.hexdigest()


class Cache:
    """JSON values by JSON key.

    ``most``: files in the folder; the oldest are deleted. ``None``: any number.
    """

    def __init__(self, folder: Path, most: int | None = None) -> None:
        self.folder, self._most = folder, most

    def get(self, key: dict[str, Any]) -> Any:
        """The value of this key, or ``None``."""
        try:
            row = parse_json(self._file(key).read_bytes())
        except (OSError, ValueError):
            return None
        return row.get("value") if isinstance(row, dict) and row.get("key") == key else None

    def put(self, key: dict[str, Any], value: Any) -> None:
        """Writes the file under another name and renames it, so that readers never see a part."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self._file(key), json.dumps({"key": key, "value": value}, indent=2, ensure_ascii=False) + "\n")
            if self._most is not None:
                files = sorted(self.folder.glob("*.json"), key=lambda file: file.stat().st_mtime)
                for file in files[: -self._most]:
                    file.unlink()
        except OSError:  # also where another process deletes the same files
            return

    def _file(self, key: dict[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{digest[:32]}.json"


class TensorCache:
    """Tensors by name, such as a text. ``key``: JSON of everything else that they depend on."""

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        self._folder, self._key = folder, key

    def get(self, name: str) -> dict[str, Tensor] | None:
        """What ``put`` was given, or ``None``."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._file(name), framework="pt") as file:
                own = (file.metadata() or {}).get("key") == self._name(name)
                return {part: file.get_tensor(part).clone() for part in file.keys()} if own else None  # noqa: SIM118
        except (OSError, SafetensorError):
            return None

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Written aside and renamed: a reader never sees a part."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        with suppress(OSError, SafetensorError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with written_aside(self._file(name)) as aside:
                rows = {part: tensor.contiguous() for part, tensor in tensors.items()}
                save_file(rows, aside, metadata={"key": self._name(name)})

    def _name(self, name: str) -> str:
        return json.dumps(self._key | {"text": name}, sort_keys=True, ensure_ascii=False)

    def _file(self, name: str) -> Path:
        return self._folder / f"{hashlib.sha256(self._name(name).encode()).hexdigest()[:32]}.safetensors"
