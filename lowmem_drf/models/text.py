"""The prompt encoder: UMT5, as ``WanPipeline._get_t5_prompt_embeds`` of diffusers 0.42.1 uses it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lowmem_drf.models.sources import complete, loading

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import UMT5EncoderModel


@dataclass(frozen=True)
class TextEncoder:
    """A UMT5 encoder with its tokenizer."""

    model: UMT5EncoderModel
    tokenizer: Any

    @torch.no_grad()
    def encode(self, texts: Sequence[str], max_tokens: int = 226) -> Tensor:
        """Embeddings (B, max_tokens, D) in the encoder's dtype; zeros after a text's own tokens; longer texts are cut.

        ``max_tokens`` is part of what the transformer sees (it attends to the zeros too): keep the one it was trained with, 226 in
        WanPipeline.
        """
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        tokens = self.tokenizer(
            [prompt_clean(text) for text in texts],
            padding="max_length",
            max_length=max_tokens,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        mask_BL = tokens.attention_mask.to(self.model.device)
        embeds_BLD = self.model(tokens.input_ids.to(self.model.device), mask_BL).last_hidden_state
        return embeds_BLD.masked_fill(mask_BL[..., None] == 0, 0)


def load_text(folder_or_id: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> TextEncoder:
    """Subfolders ``text_encoder`` and ``tokenizer`` of a diffusers model: frozen, eval. Raises BadInputError if they cannot be loaded."""
    from transformers import AutoTokenizer, UMT5EncoderModel

    with loading("the text encoder", folder_or_id):
        model = complete(UMT5EncoderModel.from_pretrained(folder_or_id, subfolder="text_encoder", dtype=dtype, output_loading_info=True))
        tokenizer = AutoTokenizer.from_pretrained(folder_or_id, subfolder="tokenizer")
    return TextEncoder(model.to(device).eval().requires_grad_(False), tokenizer)
