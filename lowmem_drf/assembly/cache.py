"""Text that a model wrote (questions, reference answers), cached on disk: one JSON file per text, named by the hash of
everything that the text depends on."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from lowmem_drf.files import write_text
from lowmem_drf.texts import parse_json


def cache_folder() -> Path:
    """``$LOWMEM_DRF_CACHE``, or ``lowmem-drf`` in the user's cache folder; for a user without a home, as containers
    have, in the folder of temporary files."""
    if given := os.environ.get("LOWMEM_DRF_CACHE"):
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowmem-drf"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / "lowmem-drf"


class Cache:
    """JSON values by JSON key. An unreadable file counts as missing; an unwritable folder caches nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

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
        except OSError:
            return

    def _file(self, key: dict[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{digest[:32]}.json"
