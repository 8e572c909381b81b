"""Loads a LoRA onto a transformer, from a run's checkpoint or from a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lowmem_drf.errors import BadInputError
from lowmem_drf.models.lora.adapter import add_lora, attach_lora, load_lora_state
from lowmem_drf.models.lora.formats import read_lora
from lowmem_drf.schema import Config
from lowmem_drf.training.checkpoint import load_checkpoint
from lowmem_drf.training.manifest import refuse_damaged

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel


def load_run_lora(transformer: WanTransformer3DModel, folder: Path, config: Config) -> int:
    """Adds the LoRA of a run's checkpoint (``checkpoint_folder``) and returns its step."""
    checkpoint = load_checkpoint(folder)
    add_lora(transformer, config.lora.rank, config.lora.alpha, config.lora.targets)
    load_lora_state(transformer, checkpoint.lora)
    return checkpoint.step


def load_lora_file(transformer: WanTransformer3DModel, path: Path) -> None:
    """Adds the LoRA of a file in any format that ``formats.read_lora`` reads. Raises BadInputError if it holds no LoRA
    or one that does not fit this model, LowmemError if it belongs to a damaged checkpoint."""
    refuse_damaged(path)
    lora = read_lora(path)
    try:
        attach_lora(transformer, lora.state, lora.alpha)
    except BadInputError as error:
        raise BadInputError(f"{path}: {error}") from error
