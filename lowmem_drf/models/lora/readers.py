"""Loads LoRA files and merged transformers with diffusers, as users do."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_drf.models.generators import family_of

if TYPE_CHECKING:
    import torch


def attach_as_diffusers(transformer: Any, path: Path) -> None:
    """Uses the pipeline's ``load_lora_weights``, which chooses the adapter's name and may raise any exception."""
    with warnings.catch_warnings():  # peft's, of layers of an image, for which diffusers adds zeros to the file's pairs
        warnings.filterwarnings("ignore", "While injecting the PEFT adapters", RuntimeWarning)
        family_of(transformer).pipeline(transformer).load_lora_weights(
            str(path.parent), weight_name=path.name, local_files_only=True
        )


def load_as_diffusers(kind: type[Any], folder: Path, subfolder: str, dtype: torch.dtype) -> Any:
    """Loads a merged transformer of class ``kind`` with ``from_pretrained``. If ``dtype`` is that of the files, the
    weights stay mapped to them and take no memory."""
    return kind.from_pretrained(folder, subfolder=subfolder, torch_dtype=dtype).eval()
