"""LTX-Video's models from a folder in diffusers' layout, or from the hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowmem_drf.errors import BadInputError
from lowmem_drf.models.ltx.published import BLOCKS, NAME, empty_transformer, is_13b
from lowmem_drf.models.t5 import load_t5, stream_text
from lowmem_drf.models.weights.finite import refuse_model
from lowmem_drf.models.weights.quant import Quant
from lowmem_drf.models.weights.reader import Changes, TensorFiles, files_in, fill_from_files, require_complete
from lowmem_drf.models.weights.sources import complete, downloaded, loading

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["drop_encoder", "load_file", "load_text", "load_transformer", "load_vae", "stream_text"]


def load_transformer(
    folder_or_id: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    quant: Quant = "none",
    subfolder: str = "transformer",
    home: str | torch.device | None = None,
    changes: Changes | None = None,
    blocks: int | None = None,
    taken: Callable[[torch.nn.Parameter], None] | None = None,
) -> Any:
    """See ``Family``."""
    from diffusers import LTXVideoTransformer3DModel

    with loading("the transformer", folder_or_id):
        folder = Path(folder_or_id) if Path(folder_or_id).is_dir() else downloaded(folder_or_id, subfolder)
        model = empty_transformer(LTXVideoTransformer3DModel.load_config(folder, subfolder=subfolder), quant=quant)
        files = TensorFiles(files_in(folder / subfolder))
        require_complete(files, model)
        names = {name: name for name in files.entries}
        return fill_from_files(model, files, names, dtype, device, home, changes, blocks, taken, BLOCKS)


def load_file(file: str | Path, config: Mapping[str, Any], model: str, *arguments: Any, **options: Any) -> Any:
    """Raises BadInputError: single files are not read yet."""
    raise BadInputError(
        f"model.transformer = {str(file)!r}: transformers of {NAME} are read from folders in diffusers' layout alone. "
        "Give that folder as model.id, and leave model.transformer empty."
    )


def load_vae(folder_or_id: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Any:
    """The VAE in subfolder ``vae`` of a diffusers model: frozen, eval. Raises BadInputError if it cannot be loaded."""
    from diffusers import AutoencoderKLLTXVideo

    load = AutoencoderKLLTXVideo.from_pretrained
    with loading("the VAE", folder_or_id):
        vae = complete(load(folder_or_id, subfolder="vae", torch_dtype=dtype, output_loading_info=True))
    vae = vae.to(device).eval().requires_grad_(False)
    refuse_model(vae, f"the VAE of {folder_or_id}")
    return vae


def drop_encoder(vae: Any) -> None:
    """Frees the weights that only encoding needs."""
    vae.encoder = None


@dataclass(frozen=True)
class TextEncoder:
    """A T5 encoder with its tokenizer."""

    model: Any
    tokenizer: Any
    masked: bool = False
    """Whether the encoder sees no padding, as in ``LTXConditionPipeline``; in ``LTXPipeline`` it does. The transformer
    never does (``as_velocity``)."""

    @torch.no_grad()
    def encode(self, texts: Sequence[str], max_tokens: int = 128) -> Tensor:
        """Embeddings (B, max_tokens, D) in the encoder's dtype, zero after a text's last token. Longer texts are
        truncated."""
        tokens = self.tokenizer(
            list(texts), padding="max_length", max_length=max_tokens, truncation=True, add_special_tokens=True,
            return_attention_mask=True, return_tensors="pt",
        )  # fmt: skip
        mask_BL = tokens.attention_mask.to(self.model.device)
        seen_BL = mask_BL if self.masked else None
        embeds_BLD = self.model(tokens.input_ids.to(self.model.device), attention_mask=seen_BL).last_hidden_state
        return embeds_BLD.masked_fill(mask_BL[..., None] == 0, 0)


def load_text(
    folder_or_id: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    stream: bool = False,
    subfolder: str = "text_encoder",
) -> TextEncoder:
    """See ``t5.load_t5``."""
    from diffusers import LTXVideoTransformer3DModel
    from transformers import T5EncoderModel

    with loading("the transformer's configuration", folder_or_id):
        masked = is_13b(LTXVideoTransformer3DModel.load_config(folder_or_id, subfolder="transformer"))
    return TextEncoder(*load_t5(T5EncoderModel, folder_or_id, dtype, device, stream, subfolder), masked)
