"""A T5 or UMT5 encoder, which several families have for their prompts: loading and streaming."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lowmem_drf.memory.host import HostStore
from lowmem_drf.memory.streaming import HostEmbedding, Streamed
from lowmem_drf.models.weights.sources import complete, loading

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T5_XXL = {
    "architectures": ["T5EncoderModel"], "model_type": "t5", "vocab_size": 32128, "d_model": 4096, "d_kv": 64,
    "d_ff": 10240, "num_layers": 24, "num_decoder_layers": 24, "num_heads": 64, "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128, "dropout_rate": 0.1, "layer_norm_epsilon": 1e-06,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "pad_token_id": 0, "eos_token_id": 1,
    "decoder_start_token_id": 0,
}  # fmt: skip
"""``config.json`` of T5 v1.1 XXL, written down from memory."""


def load_t5(
    kind: type[PreTrainedModel],
    folder_or_id: str,
    dtype: torch.dtype,
    device: str | torch.device,
    stream: bool,
    subfolder: str = "text_encoder",
) -> tuple[Any, Any]:
    """(encoder, tokenizer): subfolders ``text_encoder`` and ``tokenizer`` of a diffusers model, or ``text_encoder_3``
    and ``tokenizer_3``: frozen, eval.

    Args:
        device: where it computes.
        stream: its weights stay in host memory (``stream_text``).

    Raises:
        BadInputError: they cannot be loaded.
    """
    from transformers import AutoTokenizer

    device, load = torch.device(device), kind.from_pretrained
    with loading("the text encoder", folder_or_id):
        model = complete(load(folder_or_id, subfolder=subfolder, dtype=dtype, output_loading_info=True))
        tokenizer = AutoTokenizer.from_pretrained(
            folder_or_id, subfolder=subfolder.replace("text_encoder", "tokenizer")
        )
    model.eval().requires_grad_(False)
    if stream:
        stream_text(model, device, HostStore(device))
    return model.to(device), tokenizer


def stream_text(model: Any, device: torch.device, store: HostStore) -> None:
    """Streams the encoder's weights: its blocks come to ``device`` one by one in every pass, and the token embedding (2
    GiB of Wan's in 16 bit) stays in host memory, where rows are looked up. Embeddings are bitwise those of a resident
    encoder. The caller moves what is left, the last norm."""
    model.set_input_embeddings(HostEmbedding(model.get_input_embeddings(), device, store))
    blocks: list[Any] = list(model.encoder.block)
    streamed = Streamed(blocks, device, store)
    for place, block in enumerate(blocks):
        block.forward = streamed.forward(place, block.forward)
