"""What ``train`` notes for the report beside its other files: with what it ran and what was planned (``run.json``), and
base against tuned at its end (``eval.json``)."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_drf import __version__
from lowmem_drf.errors import BadInputError
from lowmem_drf.files import write_text
from lowmem_drf.texts import parse_json, read_text

if TYPE_CHECKING:
    import torch

NOTES, RESULT = "run.json", "eval.json"
_LIBRARIES = ("torch", "diffusers", "transformers", "peft", "bitsandbytes", "triton", "deepspeed", "xformers")


def write_notes(run: Path, origin: str, device: torch.device, plan: Mapping[str, Any] | None) -> None:
    """Writes ``run.json``. A resumed run overwrites all of it but the origin.

    Args:
        origin: of the configuration, in words.
        plan: as ``plan --json`` prints it. None on a CPU.
    """
    import torch

    notes = {
        "origin": read_notes(run / NOTES).get("origin", origin),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "system": platform.system(),
        "versions": _versions(),
        "plan": plan,
    }
    write_text(run / NOTES, json.dumps(notes, indent=1) + "\n")


def write_result(run: Path, step: int, source: str, result: Mapping[str, Any]) -> None:
    """Writes ``eval.json``: the JSON of ``eval``, the update it is of, and where its prompts come from."""
    write_text(run / RESULT, json.dumps({"step": step, "source": source, "result": result}, indent=1) + "\n")


def read_notes(path: Path) -> dict[str, Any]:
    """Either file. Empty if it is not there, as in earlier runs, or cannot be read."""
    with suppress(BadInputError, ValueError):
        row = parse_json(read_text(path, path.name)) if path.is_file() else {}
        return row if isinstance(row, dict) else {}
    return {}


def _versions() -> dict[str, str]:
    found = {"lowmem-drf": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # optional
            continue
    return found
