"""The prompt encoder: UMT5, used as in ``WanPipeline._get_t5_prompt_embeds`` of diffusers 0.42.1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lowmem_drf.models.t5 import load_t5
from lowmem_drf.models.t5 import stream_text as stream_text

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import UMT5EncoderModel


@dataclass(frozen=True)
class TextEncoder:
    """A UMT5 encoder with its tokenizer."""

    model: UMT5EncoderModel
    tokenizer: Any

    @torch.no_grad()
    def encode(self, texts: Sequence[str], max_tokens: int = 512) -> Tensor:
        """Embeddings (B, max_tokens, D) in the encoder's dtype, zero after a text's last token. Longer texts are
        truncated.

        The transformer attends to the zeros too, so ``max_tokens`` must be that of its training, 512 for Wan.
        (``WanPipeline`` passes 512; 226 is only the default of its ``encode_prompt``.)
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


def load_text(
    folder_or_id: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    stream: bool = False,
    subfolder: str = "text_encoder",
) -> TextEncoder:
    """See ``t5.load_t5``."""
    from transformers import UMT5EncoderModel

    return TextEncoder(*load_t5(UMT5EncoderModel, folder_or_id, dtype, device, stream, subfolder))
