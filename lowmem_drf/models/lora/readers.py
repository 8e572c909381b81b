"""LoRA files put on a transformer, and merged transformers loaded, by the code that their users will read them with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lowmem_drf.models.lora.adapter import attach_lora
from lowmem_drf.models.lora.formats import read_lora

if TYPE_CHECKING:
    import torch
    from diffusers import WanTransformer3DModel


def attach_as_diffusers(transformer: WanTransformer3DModel, path: Path) -> None:
    """By ``WanPipeline.load_lora_weights``, which names the adapter as it likes and raises what it likes."""
    from diffusers import WanPipeline

    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=transformer)
    pipe.load_lora_weights(str(path.parent), weight_name=path.name, local_files_only=True)


def attach_as_lowmem_drf(transformer: WanTransformer3DModel, path: Path) -> None:
    """By ``read_lora``. Raises BadInputError: no LoRA, or one of another model."""
    file = read_lora(path)
    attach_lora(transformer, file.state, file.alpha)


def load_as_diffusers(folder: Path, subfolder: str, dtype: torch.dtype) -> WanTransformer3DModel:
    """A merged transformer, by ``from_pretrained``. In the dtype of its files its weights stay mapped to the files,
    and take no memory of their own."""
    from diffusers import WanTransformer3DModel

    transformer: WanTransformer3DModel = WanTransformer3DModel.from_pretrained(
        folder, subfolder=subfolder, torch_dtype=dtype
    )
    return transformer.eval()
