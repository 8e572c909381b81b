"""The prompt encoder is WanPipeline's."""

from __future__ import annotations

import pytest
import torch
from _tiny import save_tiny_generator, tiny_text

from lowmem_drf.errors import BadInputError
from lowmem_drf.models.text import TextEncoder, load_text

PROMPTS = ["a red circle moves left", "  a blue   square &amp; a green triangle ", "", "the " * 30]


@pytest.mark.parametrize("max_tokens", [8, 16])
def test_embeddings_are_those_of_wan_pipeline(max_tokens: int) -> None:
    from diffusers import WanPipeline

    model, tokenizer = tiny_text()
    pipe = WanPipeline(tokenizer, model, None, None)
    wanted, negative = pipe.encode_prompt(PROMPTS, "", max_sequence_length=max_tokens)
    encoder = TextEncoder(model, tokenizer)
    assert torch.equal(encoder.encode(PROMPTS, max_tokens), wanted)
    assert torch.equal(encoder.encode([""], max_tokens), negative[:1])
    assert not wanted[0, 6:].any() and wanted[0, :6].all(dim=-1).all()


def test_load_text(tmp_path) -> None:
    model, tokenizer = tiny_text()
    loaded = load_text(str(save_tiny_generator(tmp_path)))
    assert torch.equal(loaded.encode(PROMPTS, 12), TextEncoder(model, tokenizer).encode(PROMPTS, 12))
    with pytest.raises(BadInputError, match="Cannot load the text encoder"):
        load_text(str(tmp_path / "vae"))
