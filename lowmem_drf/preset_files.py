"""The presets of the package, and TOML files in their place: which there are, which is for which card, what a header
says."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import lowmem_drf
from lowmem_drf.errors import BadInputError
from lowmem_drf.files import require_output, write_text
from lowmem_drf.schema import Config
from lowmem_drf.texts import expanded, one_line, read_text, shown

DEFAULT_PRESET = "toy-fast"
"""Loaded by ``load_config`` when no preset is named, and by ``train`` on a machine without a card: it runs anywhere."""
MOST_PRESET_BYTES = 2**20
"""Of a preset or a run's ``config.toml``."""


def presets() -> dict[str, Path]:
    """Name -> file of every preset of the package, sorted by name."""
    folders = [Path(root) / "presets" for root in lowmem_drf.__path__]
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.toml"))}


def preset_path(preset: str) -> Path:
    """The file of a preset, given by name or path. Raises BadInputError that lists the presets."""
    if preset in presets():
        return presets()[preset]
    path = expanded(preset)
    if path.suffix == ".toml" or "/" in preset:
        if path.is_file():
            return path
        cure = "See the presets of this package with: lowmem-drf presets list"
        raise BadInputError(f"preset file {one_line(preset)} does not exist. {cure}")
    near = difflib.get_close_matches(preset, presets(), n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    cure = f"Presets: {', '.join(presets())}; or give a path to a TOML file."
    raise BadInputError(f"there is no preset {shown(preset)}.{hint} {cure}")


def preset_text(preset: str) -> str:
    """A preset as its file has it."""
    return text_of(preset_path(preset))


def text_of(path: Path) -> str:
    """The text of a preset's file. Raises BadInputError: none, too large, or not UTF-8."""
    return read_text(path, f"preset file {path}", MOST_PRESET_BYTES)


def preset_summary(path: Path) -> str:
    """The purpose of a preset: the first line of its header comment."""
    return text_of(path).partition("\n")[0].lstrip("# ").strip()


def preset_card(path: Path) -> str:
    """The text after ``GPU:`` in a preset's header comment. It begins with the card's memory (``24 GB``), unless the
    preset needs no card."""
    found = re.search(r"^# GPU: *(.+)$", text_of(path), re.MULTILINE)
    return found[1].strip() if found else "not stated"


def default_preset(card_gb: float | None, card: str = "") -> str:
    """The largest preset that fits a card of ``card_gb`` GB (10^9 bytes), or ``toy-fast`` where none fits or there is
    no card (``None``). Of equally large ones, the preset made for the card named ``card``, then the shortest name
    (``rtx4090`` before ``rtx4090-20step``)."""
    sizes = {name: preset_gb(path) for name, path in presets().items()}
    fitting = {name: size for name, size in sizes.items() if size is not None and size <= (card_gb or 0.0)}
    rank = {name: (size, _is_for(name, card), -len(name)) for name, size in fitting.items()}
    return max(rank, key=rank.__getitem__, default=DEFAULT_PRESET)


def chosen_preset() -> tuple[str, str]:
    """The default preset of this machine, and the reason for it as text to print behind its name."""
    import torch

    if not torch.cuda.is_available():
        return default_preset(None), " (the default: there is no CUDA card)"
    card = torch.cuda.get_device_properties(0)
    gb = card.total_memory / 1e9
    return default_preset(gb, card.name), f" (the default: the largest that fits the {card.name}, {gb:.0f} GB)"


def require_card(preset: str, config: Config) -> None:
    """Raises BadInputError where a preset is for a card and torch sees none, unless the CPU was asked for."""
    import torch

    card = preset_card(preset_path(preset))
    if config.device == "auto" and " GB" in card and not torch.cuda.is_available():
        raise BadInputError(
            f"{preset} is for a card ({card}), and torch {torch.__version__} sees no CUDA card here. lowmem-drf doctor "
            "says why. On a CPU an update may take hours; if that is what you want: -s device=cpu"
        )


def _is_for(preset: str, card: str) -> bool:
    """True if the header (``24 GB (RTX 4090)``) names the card ("NVIDIA GeForce RTX 4090")."""
    named = re.search(r"\((.+?)\)", preset_card(presets()[preset]))
    return bool(named and card and named[1].lower() in card.lower())


def preset_gb(path: Path) -> float | None:
    """The card's memory in GB (10^9 bytes) that the header names, or ``None``."""
    found = re.match(r"(\d+) GB", preset_card(path))
    return float(found[1]) if found else None


def copy_preset(preset: str, target: Path | None = None, force: bool = False) -> Path:
    """Copies a preset to a new file, by default under its name in the current folder. Raises BadInputError for an
    existing file unless ``force``."""
    source = preset_path(preset)
    path = target or Path(source.name)
    if path.is_dir():
        path /= source.name
    require_output(path, "TARGET", lambda existing: False, force, streams=True, kind="TOML file")
    text = text_of(source)
    extends = re.search(r'^extends *= *"(.+)"', text, re.MULTILINE)
    if extends and extends[1] not in presets():  # a path relative to the preset's folder: the copy has another one
        text = text.replace(extends[0], f'extends = "{extended_preset(source, extends[1])}"', 1)
    write_text(path, text)
    return path


def extended_preset(path: Path, extends: Any) -> Path:
    """The file that ``extends`` names in the preset at ``path``: a preset's name, or a path relative to this file."""
    if not isinstance(extends, str):
        cure = 'give one preset, by its name or by its path from this file, for example extends = "rtx4090"'
        raise BadInputError(f"{path}: extends: {cure}")
    is_path = extends not in presets() and (extends.endswith(".toml") or "/" in extends)
    try:
        return preset_path(str(path.parent.absolute() / expanded(extends)) if is_path else extends)
    except BadInputError as error:
        raise BadInputError(f"{path}: extends: {error}") from error
