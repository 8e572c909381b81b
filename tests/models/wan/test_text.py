"""The prompt encoder is WanPipeline's."""

from __future__ import annotations

import io

import pytest
import torch
from _tiny import save_tiny_generator, tiny_text
from rich.console import Console
from transformers import UMT5Config, UMT5EncoderModel

from lowmem_drf.errors import BadInputError
from lowmem_drf.models.wan.text import TextEncoder, load_text, stream_text
from lowmem_drf.models.weights.sources import loading
from lowmem_drf.planner.ledger import Ledger
from lowmem_drf.planner.stand_ins import planned_store
from lowmem_drf.terminal import showing

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


def test_load_text(tmp_path, capfd) -> None:
    model, tokenizer = tiny_text()
    folder, screen = str(save_tiny_generator(tmp_path)), Console(file=io.StringIO(), force_terminal=True, width=100)
    capfd.readouterr()
    with showing(screen):
        loaded = load_text(folder)
    count = len(dict(loaded.model.named_parameters()))
    assert "reading the text encoder" in screen.file.getvalue() and f"{count}/{count}" in screen.file.getvalue()
    load_text(folder)  # without a console
    assert capfd.readouterr() == ("", "")  # no bar of transformers' own
    assert torch.equal(loaded.encode(PROMPTS, 12), TextEncoder(model, tokenizer).encode(PROMPTS, 12))
    with pytest.raises(BadInputError, match="Cannot load the text encoder"):
        load_text(str(tmp_path / "vae"))


def test_an_error_while_weights_are_read_leaves_no_bar_on_the_screen():
    from transformers.utils.logging import tqdm

    screen = Console(file=io.StringIO(), force_terminal=True, width=100)
    with showing(screen), pytest.raises(BadInputError) as kept, loading("it", "a folder"):
        for number in tqdm([1, 2, 3], desc="Loading weights"):
            raise ValueError(number)
    assert "reading it" in screen.file.getvalue() and screen.file.getvalue().endswith("\x1b[?25h\r\x1b[1A\x1b[2K")
    assert kept.tb  # a traceback holds the loop's frame
    assert list(tqdm([1], disable=True)) == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_embeddings_are_those_of_a_resident_encoder(tmp_path, dtype: torch.dtype) -> None:
    folder = str(save_tiny_generator(tmp_path))
    resident, streamed = load_text(folder, dtype), load_text(folder, dtype, stream=True)
    for _ in range(2):  # passes follow each other
        for max_tokens in (8, 16):
            assert torch.equal(streamed.encode(PROMPTS, max_tokens), resident.encode(PROMPTS, max_tokens))


def test_of_a_streamed_encoder_the_card_holds_two_blocks() -> None:
    config = UMT5Config.from_dict(tiny_text()[0].config.to_dict() | {"num_layers": 6})
    model = UMT5EncoderModel(config).eval().requires_grad_(False)
    blocks = [sum(parameter.nbytes for parameter in block.parameters()) for block in model.encoder.block]
    whole = sum(parameter.nbytes for parameter in model.parameters())
    ids = torch.ones(1, 4, dtype=torch.int64)
    with Ledger() as ledger, torch.no_grad():
        ledger.adopt(model.parameters())
        model(ids)
        resident = ledger.peak_card_bytes
        stream_text(model, torch.device("cpu"), planned_store())
        norm = model.encoder.final_layer_norm.weight.nbytes
        assert ledger.card_bytes <= norm + 64 and ledger.host_bytes >= whole - norm  # besides the weights: the tokens
        ledger.reset_peak()
        model(ids)
        aligned = 256 * len(list(model.encoder.block[0].parameters()))  # each tensor of a block begins at a multiple
        assert ledger.peak_card_bytes <= resident - whole + norm + 2 * (max(blocks) + aligned)
