"""Loads the LoRA of a run's checkpoint onto a transformer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lowmem_drf.models.lora.adapter import add_lora, load_lora_state
from lowmem_drf.schema import Config
from lowmem_drf.training.checkpoint import load_checkpoint

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel


def load_run_lora(transformer: WanTransformer3DModel, folder: Path, config: Config) -> int:
    """Adds the LoRA of a run's checkpoint (``checkpoint_folder``) and returns its step."""
    checkpoint = load_checkpoint(folder)
    add_lora(transformer, config.lora.rank, config.lora.alpha, config.lora.targets)
    load_lora_state(transformer, checkpoint.lora)
    return checkpoint.step
