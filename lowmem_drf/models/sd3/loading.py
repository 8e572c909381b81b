"""Stable Diffusion 3's models from a folder in diffusers' layout, or from the hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lowmem_drf.errors import BadInputError
from lowmem_drf.models import folders, t5
from lowmem_drf.models.sd3.published import BLOCKS, KINDS, NAME, empty_transformer
from lowmem_drf.models.weights.sources import complete, loading

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem_drf.memory.host import HostStore


load_transformer = partial(folders.load_transformer, "SD3Transformer2DModel", empty_transformer, BLOCKS)
load_file = partial(folders.refuse_file, NAME)
load_vae = partial(folders.load_vae, "AutoencoderKL")
drop_encoder = folders.drop_encoder


@dataclass(frozen=True)
class TextEncoder:
    """One of the three text encoders with its tokenizer. Embeddings have a row of pooled text, then CLIP's tokens, then
    T5's: those of CLIP L, CLIP G and T5 in their places, which add up to what ``StableDiffusion3Pipeline`` makes."""

    model: Any
    tokenizer: Any
    width: int
    """D, of T5's tokens; CLIP's are shorter, and followed by zeros."""
    tokens: int
    """CLIP's."""
    before: tuple[int, int] = (0, 0)
    """Where this CLIP's pooled text and its tokens begin in a row."""

    @torch.no_grad()
    def encode(self, texts: Sequence[str], max_tokens: int = 334) -> Tensor:
        """Embeddings (B, max_tokens, D) in the encoder's dtype. T5 has ``max_tokens`` less CLIP's and the pooled row;
        longer texts are truncated. As in the pipeline, transformer and encoders see the padding.

        Raises BadInputError: no token is left for T5.
        """
        first, device = 1 + self.tokens, self.model.device
        if max_tokens <= first:
            least = f"{first} rows are those of CLIP, and T5 takes what is left. Published: 334 (256 tokens of T5)"
            raise BadInputError(f"model.text_tokens = {max_tokens} is too few for {NAME}: {least}.")
        is_clip = hasattr(self.model, "text_projection")
        length = self.tokens if is_clip else max_tokens - first
        asked = self.tokenizer(
            list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )  # fmt: skip
        found = self.model(asked.input_ids.to(device), output_hidden_states=is_clip)
        made_BLD = torch.zeros(len(texts), max_tokens, self.width, dtype=self.model.dtype, device=device)
        if not is_clip:
            made_BLD[:, first:] = found.last_hidden_state
            return made_BLD
        for rows, at, part in (
            (slice(0, 1), self.before[0], found.text_embeds[:, None]),
            (slice(1, first), self.before[1], found.hidden_states[-2]),
        ):
            made_BLD[:, rows, at : at + part.shape[-1]] = part
        return made_BLD


def load_text(
    folder_or_id: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    stream: bool = False,
    subfolder: str = "text_encoder",
) -> TextEncoder:
    """See ``Family``. Raises BadInputError: it cannot be loaded."""
    from diffusers import SD3Transformer2DModel
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModelWithProjection, T5EncoderModel

    with loading("the text encoder", folder_or_id):
        width = SD3Transformer2DModel.load_config(folder_or_id, subfolder="transformer")["joint_attention_dim"]
        first = CLIPTextConfig.from_pretrained(folder_or_id, subfolder="text_encoder")
    tokens = first.max_position_embeddings
    if KINDS[subfolder] == "t5":
        loaded = t5.load_t5(T5EncoderModel, folder_or_id, dtype, device, stream, subfolder)
        return TextEncoder(*loaded, width, tokens)
    load = CLIPTextModelWithProjection.from_pretrained
    with loading("the text encoder", folder_or_id):
        model = complete(load(folder_or_id, subfolder=subfolder, dtype=dtype, output_loading_info=True))
        tokenizer = AutoTokenizer.from_pretrained(
            folder_or_id, subfolder=subfolder.replace("text_encoder", "tokenizer")
        )
    before = (0, 0) if subfolder == "text_encoder" else (first.projection_dim, first.hidden_size)
    return TextEncoder(model.to(device).eval().requires_grad_(False), tokenizer, width, tokens, before)


def stream_text(model: Any, device: torch.device, store: HostStore) -> None:
    """Streams T5's weights. CLIP's (1.3 GiB at most in 16 bit) stay where they are."""
    if hasattr(model, "encoder"):
        t5.stream_text(model, device, store)
