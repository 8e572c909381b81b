"""LTX-Video's models from a folder in diffusers' layout, or from the hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lowmem_drf.models import folders
from lowmem_drf.models.ltx.published import BLOCKS, NAME, empty_transformer, is_13b
from lowmem_drf.models.t5 import load_t5, stream_text
from lowmem_drf.models.weights.sources import loading

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["drop_encoder", "load_file", "load_text", "load_transformer", "load_vae", "stream_text"]


load_transformer = partial(folders.load_transformer, "LTXVideoTransformer3DModel", empty_transformer, BLOCKS)
load_file = partial(folders.refuse_file, NAME)
load_vae = partial(folders.load_vae, "AutoencoderKLLTXVideo")
drop_encoder = folders.drop_encoder


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
