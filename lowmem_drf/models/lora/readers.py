"""Loads LoRA files and merged transformers with the code that users will load them with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lowmem_drf.models.lora.adapter import attach_lora
from lowmem_drf.models.lora.reading import read_lora

if TYPE_CHECKING:
    import torch
    from diffusers import WanTransformer3DModel


def attach_as_diffusers(transformer: WanTransformer3DModel, path: Path) -> None:
    """Uses ``WanPipeline.load_lora_weights``, which chooses the adapter's name and may raise any exception."""
    from diffusers import WanPipeline

    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=transformer)
    pipe.load_lora_weights(str(path.parent), weight_name=path.name, local_files_only=True)


def attach_as_lowmem_drf(transformer: WanTransformer3DModel, path: Path) -> None:
    """Uses ``read_lora``. Raises BadInputError: no LoRA, or one of another model."""
    attach_lora(transformer, read_lora(path))


def load_as_diffusers(folder: Path, subfolder: str, dtype: torch.dtype) -> WanTransformer3DModel:
    """Loads a merged transformer with ``from_pretrained``. If ``dtype`` is that of the files, the weights stay mapped
    to them and take no memory."""
    from diffusers import WanTransformer3DModel as Transformer

    transformer: WanTransformer3DModel = Transformer.from_pretrained(folder, subfolder=subfolder, torch_dtype=dtype)
    return transformer.eval()
