"""Merges LoRA files into the weights of a transformer while they are loaded: ``model.base_lora``, such as a file that
distils a generator to four steps, and what a LoRA of ``sample --lora`` changes besides linear layers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem_drf.errors import BadInputError
from lowmem_drf.models.lora.reading import read_lora
from lowmem_drf.models.weights.downloads import hub_file
from lowmem_drf.models.weights.reader import Change, Shapes
from lowmem_drf.models.weights.sources import FEWSTEP, WEIGHTS
from lowmem_drf.texts import expanded

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem_drf.models.lora.changes import LoraChanges

_HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+)[:/](.+\.safetensors)")


def base_changes(sources: Sequence[tuple[str, float]], shapes: Shapes, say: Callable[[str], None]) -> dict[str, Change]:
    """The changes that LoRAs make to a transformer's parameters, for ``load_denoiser`` and ``load_single_file``.

    Args:
        sources: (LoRA, strength) in the order in which they are merged. A LoRA is a file or folder as in ``read_lora``,
            or ``owner/repo/file.safetensors`` (also ``owner/repo:file.safetensors``) on the hub, downloaded once, or
            ``toyworld-fewstep``.
        shapes: of the transformer's parameters, by diffusers' names.
        say: announces a download, and what is left out.

    Raises:
        BadInputError: no such file; one that ``read_lora`` refuses; one of another model.
        LowmemError: the download failed.
    """
    found = []
    for source, scale in sources:
        lora = read_base_lora(source, shapes, say)
        found.append(lora_changes(lora, scale))
        say("; ".join((f"{source}: merged into {len(found[-1])} tensors of the base", *left_out(lora))))
    return in_turn(*found)


def read_base_lora(source: str, shapes: Shapes, say: Callable[[str], None]) -> LoraChanges:
    """One of the ``sources`` of ``base_changes``, which fits the transformer. Raises as ``base_changes``."""
    try:
        lora = read_lora(find_base_lora(source, say))
        lora.require_fit(shapes)
    except BadInputError as error:
        said = str(error).removeprefix(f"{expanded(source)}: ")
        raise BadInputError(f"model.base_lora, {source}: {said}") from error
    return lora


def in_turn(*changes: Mapping[str, Change]) -> dict[str, Change]:
    """The changes of several LoRAs, each of which is merged into what those before it made."""
    names = dict.fromkeys(name for some in changes for name in some)
    by_name = {name: [some[name] for some in changes if name in some] for name in names}
    return {name: own[0] if len(own) == 1 else partial(_one_by_one, own) for name, own in by_name.items()}


def find_base_lora(source: str, say: Callable[[str], None], key: str = "model.base_lora") -> Path:
    """The local file, downloaded if necessary. ``key``: the setting that names it. Raises BadInputError and
    LowmemError."""
    path = expanded(source)
    if path.exists():
        return path
    if source == FEWSTEP:
        return WEIGHTS / "fewstep.safetensors"
    if match := _HUB_FILE.fullmatch(source):
        return hub_file(match[1], match[2], say)
    if path.is_absolute():
        raise BadInputError(
            f"there is no such file. Put it back, or give its new place with -s {key}=FILE, or in the run's "
            "config.toml. Of a run, the file must keep its name."
        )
    if difflib.get_close_matches(source, (FEWSTEP,), cutoff=0.75):
        raise BadInputError(f"there is no such LoRA. Did you mean {FEWSTEP}?")
    raise BadInputError(
        "it is neither a file nor owner/repo/file.safetensors on the Hugging Face hub. Only safetensors files are read."
    )


def lora_changes(lora: LoraChanges, scale: float = 1.0) -> dict[str, Change]:
    """All changes of a LoRA, times ``scale``, by parameter."""
    changes: dict[str, list[Change]] = {name: list(others) for name, others in lora.others.items()}
    for module, pair in lora.pairs.items():
        changes.setdefault(f"{module}.weight", []).append(pair)
    return {name: partial(_sum, own, scale) for name, own in changes.items()}


def left_out(lora: LoraChanges) -> list[str]:
    """What of the file is left out, in words."""
    return [f"left out: {why} ({len(keys)} of its tensors)" for why, keys in lora.left_out.items()]


def _sum(changes: Sequence[Change], scale: float, weight: Tensor) -> Tensor:
    total = changes[0](weight)
    for change in changes[1:]:
        total = total + change(weight)
    return scale * total


def _one_by_one(changes: Sequence[Change], weight: Tensor) -> Tensor:
    total = changes[0](weight)
    for change in changes[1:]:
        total = total + change(weight + total)
    return total
