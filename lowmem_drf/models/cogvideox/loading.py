"""CogVideoX's models from a folder in diffusers' layout, or from the hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lowmem_drf.models import folders
from lowmem_drf.models.cogvideox.published import BLOCKS, NAME, empty_transformer
from lowmem_drf.models.t5 import load_t5, stream_text

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["drop_encoder", "load_file", "load_text", "load_transformer", "load_vae", "stream_text"]


load_transformer = partial(folders.load_transformer, "CogVideoXTransformer3DModel", empty_transformer, BLOCKS)
load_file = partial(folders.refuse_file, NAME)
load_vae = partial(folders.load_vae, "AutoencoderKLCogVideoX")
drop_encoder = folders.drop_encoder


@dataclass(frozen=True)
class TextEncoder:
    """A T5 encoder with its tokenizer."""

    model: Any
    tokenizer: Any

    @torch.no_grad()
    def encode(self, texts: Sequence[str], max_tokens: int = 226) -> Tensor:
        """Embeddings (B, max_tokens, D) in the encoder's dtype. Longer texts are truncated. As in
        ``CogVideoXPipeline`` the padding is part of the text: encoder and transformer see its tokens, without a
        mask."""
        tokens = self.tokenizer(
            list(texts), padding="max_length", max_length=max_tokens, truncation=True, add_special_tokens=True,
            return_tensors="pt",
        )  # fmt: skip
        embeds_BLD: Tensor = self.model(tokens.input_ids.to(self.model.device)).last_hidden_state
        return embeds_BLD


def load_text(
    folder_or_id: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    stream: bool = False,
    subfolder: str = "text_encoder",
) -> TextEncoder:
    """See ``t5.load_t5``."""
    from transformers import T5EncoderModel

    return TextEncoder(*load_t5(T5EncoderModel, folder_or_id, dtype, device, stream, subfolder))
