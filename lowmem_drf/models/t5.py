"""Streaming of a T5 or UMT5 encoder, which several families have for their prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowmem_drf.memory.streaming import HostEmbedding, Streamed

if TYPE_CHECKING:
    import torch

    from lowmem_drf.memory.host import HostStore


def stream_text(model: Any, device: torch.device, store: HostStore) -> None:
    """Streams the encoder's weights: its blocks come to ``device`` one by one in every pass, and the token embedding (2
    GiB of Wan's in 16 bit) stays in host memory, where rows are looked up. Embeddings are bitwise those of a resident
    encoder. The caller moves what is left, the last norm."""
    model.set_input_embeddings(HostEmbedding(model.get_input_embeddings(), device, store))
    blocks: list[Any] = list(model.encoder.block)
    streamed = Streamed(blocks, device, store)
    for place, block in enumerate(blocks):
        block.forward = streamed.forward(place, block.forward)
