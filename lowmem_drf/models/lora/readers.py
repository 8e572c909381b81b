"""Loads LoRA files and merged transformers with diffusers, as users do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from diffusers import WanTransformer3DModel


def attach_as_diffusers(transformer: WanTransformer3DModel, path: Path) -> None:
    """Uses ``WanPipeline.load_lora_weights``, which chooses the adapter's name and may raise any exception."""
    from diffusers import WanPipeline

    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=transformer)
    pipe.load_lora_weights(str(path.parent), weight_name=path.name, local_files_only=True)


def load_as_diffusers(folder: Path, subfolder: str, dtype: torch.dtype) -> WanTransformer3DModel:
    """Loads a merged transformer with ``from_pretrained``. If ``dtype`` is that of the files, the weights stay mapped
    to them and take no memory."""
    from diffusers import WanTransformer3DModel as Transformer

    transformer: WanTransformer3DModel = Transformer.from_pretrained(folder, subfolder=subfolder, torch_dtype=dtype)
    return transformer.eval()
