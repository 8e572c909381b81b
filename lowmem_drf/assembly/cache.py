"""What a model wrote, kept on the disk: questions and reference answers are made once for a prompt, a model and a
version.

One readable JSON file each, named by the hash of all that the text depends on.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from lowmem_drf.files import write_text


def cache_folder() -> Path:
    """``$LOWMEM_DRF_CACHE``, or ``lowmem-drf`` in the user's cache folder."""
    given = os.environ.get("LOWMEM_DRF_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowmem-drf"


class Cache:
    """Values by key (both JSON). A file that cannot be read counts as missing; a folder that cannot be written to only
    forgets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: dict[str, Any]) -> Any:
        """What was put under this key, or ``None``."""
        try:
            row = json.loads(self._file(key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return row.get("value") if isinstance(row, dict) and row.get("key") == key else None

    def put(self, key: dict[str, Any], value: Any) -> None:
        """Written aside and renamed: a reader never sees a part."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self._file(key), json.dumps({"key": key, "value": value}, indent=2, ensure_ascii=False) + "\n")
        except OSError:
            return

    def _file(self, key: dict[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{digest[:32]}.json"
