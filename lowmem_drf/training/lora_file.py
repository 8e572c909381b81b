"""The LoRA files that a run begins with: its checkpoint's, or that of ``train --init-lora`` (``lora.init``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_drf.config import load_config
from lowmem_drf.errors import BadInputError
from lowmem_drf.models.lora.adapter import add_lora, load_lora_state
from lowmem_drf.schema import Config
from lowmem_drf.texts import expanded, toml_value
from lowmem_drf.training.checkpoint import load_checkpoint
from lowmem_drf.training.manifest import read_manifest, refuse_damaged

if TYPE_CHECKING:
    from lowmem_drf.models.lora.changes import LoraChanges


def load_run_lora(transformer: Any, folder: Path, config: Config) -> int:
    """Adds the LoRA of a run's checkpoint (``checkpoint_folder``), at the strength of its use, and returns its step."""
    checkpoint = load_checkpoint(folder)
    add_lora(transformer, **config.lora.adapter | {"alpha": config.used_alpha(checkpoint.step, checkpoint.steps)})
    load_lora_state(transformer, checkpoint.lora)
    return checkpoint.step


def used_lora(folder: Path, config: Config) -> LoraChanges:
    """The LoRA of a run's checkpoint, at the strength of its use as the run is configured now: that of its file is from
    when it was saved."""
    from lowmem_drf.models.lora.reading import read_lora

    lora, saved = read_lora(folder / "lora.safetensors"), read_manifest(folder)
    alpha = config.used_alpha(saved.step, saved.steps)
    return replace(lora, pairs={module: replace(pair, alpha=alpha) for module, pair in lora.pairs.items()})


def overrides_from(preset: str, overrides: Sequence[str], file: Path) -> list[str]:
    """The overrides of ``--init-lora``: the file, rank, alpha and targets as it has them, and ``lora.scale`` 1, which
    its alpha has already, unless the user's overrides say otherwise. The largest of several ranks holds all of them.
    LoKr and LoHa are cut to the preset's."""
    from lowmem_drf.models.generators import generator_config
    from lowmem_drf.models.lora.init import init_targets

    config = load_config(preset, [*overrides, f"lora.init={toml_value(str(file))}"])
    lora = lora_to_begin_with(config)
    try:
        blocks = generator_config(config.model.id).transformer["num_layers"]
    except BadInputError:  # not on this machine yet
        blocks = None
    values: dict[str, object] = {"init": str(file), "scale": 1.0, "targets": init_targets(lora, blocks)}
    if lora.pairs and not lora.others:
        largest = max(lora.pairs.values(), key=lambda pair: pair.rank)
        values |= {"rank": largest.rank, "alpha": largest.alpha, "rslora": False}
    return [f"lora.{key}={toml_value(value)}" for key, value in values.items()]


def lora_to_begin_with(config: Config, targets: Sequence[str] | None = None) -> LoraChanges:
    """The LoRA of ``lora.init``.

    Args:
        targets: ``lora.targets``, if they are known.

    Raises:
        BadInputError: as ``read_lora``, or no run can go on from it.
        LowmemError: it belongs to a damaged checkpoint.
    """
    from lowmem_drf.assembly.loading import read_lora_for
    from lowmem_drf.models.lora.init import as_trained, require_linears, require_trained
    from lowmem_drf.models.lora.reading import lora_file

    file = expanded(config.lora.init)
    refuse_damaged(lora_file(file))
    lora = as_trained(read_lora_for(config, file))
    try:
        require_linears(lora) if targets is None else require_trained(lora, targets)
    except BadInputError as error:
        raise BadInputError(f"{file}: {error}") from error
    return lora
