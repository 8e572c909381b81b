"""Text embeddings: equal to the encoder's, cached on disk for a large encoder, never taken from another encoder."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from _tiny import save_tiny_generator

from lowmem_drf.assembly import conditions as module
from lowmem_drf.assembly.conditions import encode_texts
from lowmem_drf.config import load_config
from lowmem_drf.models.wan import family as wan

CPU = torch.device("cpu")
TEXTS = ["a red circle moves left", "a blue square stays still", "", "a red circle moves left"]


@pytest.fixture(scope="module")
def generator(tmp_path_factory) -> Path:
    return save_tiny_generator(tmp_path_factory.mktemp("generator"))


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LOWMEM_DRF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "texts"


@pytest.fixture
def large(monkeypatch) -> None:
    """Every encoder counts as large."""
    monkeypatch.setattr(module, "LARGE_BYTES", 1)


@pytest.fixture
def loads(monkeypatch) -> list:
    """Weak references to the encoders that were loaded, and what each was asked to encode."""
    seen: list = []
    load = wan.load_text

    def watched(*arguments):
        encoder = load(*arguments)
        encode, asked = type(encoder).encode, []
        seen.append((weakref.ref(encoder.model), asked))
        monkeypatch.setattr(
            type(encoder),
            "encode",
            lambda self, some, max_tokens: asked.append(list(some)) or encode(self, some, max_tokens),
        )
        return encoder

    monkeypatch.setattr(wan, "load_text", watched)
    return seen


def configuration(tiny_preset, *settings: str):
    return load_config(str(tiny_preset), list(settings))


def test_they_are_the_encoders(generator, cache, tiny_preset) -> None:
    config = configuration(tiny_preset)
    encoded = encode_texts(config, str(generator), TEXTS, CPU)
    assert list(encoded) == list(dict.fromkeys(TEXTS))
    encoder = wan.load_text(str(generator), torch.float32)
    for text, row in encoded.items():
        (whole,) = encoder.encode([text], config.model.text_tokens)
        assert torch.equal(row, whole[: len(row)]) and not whole[len(row) :].any() and row[-1].any()
        assert row.untyped_storage().nbytes() == row.nbytes


def test_a_small_encoder_leaves_nothing_on_the_disk(generator, cache, tiny_preset) -> None:
    from lowmem_drf.models.weights.sources import resolve

    encode_texts(configuration(tiny_preset), str(generator), TEXTS, CPU)
    encode_texts(
        configuration(tiny_preset, "model.text_tokens=8"), resolve("toyworld", "generator"), ["a red circle"], CPU
    )
    assert not cache.exists()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_second_time_nothing_is_loaded(generator, cache, large, loads, tiny_preset, dtype: str) -> None:
    config = configuration(tiny_preset, f"dtype={dtype}")
    first = encode_texts(config, str(generator), TEXTS, CPU)
    assert len(loads) == 1 and len([*cache.iterdir()]) == 3
    again = encode_texts(config, str(generator), TEXTS[::-1], CPU)
    assert len(loads) == 1
    assert all(torch.equal(first[text], again[text]) and first[text].dtype == again[text].dtype for text in first)


def test_only_what_is_missing_is_encoded_and_alike(generator, cache, large, loads, tiny_preset) -> None:
    """Encoded one at a time, so that an embedding does not depend on the other texts."""
    config = configuration(tiny_preset)
    some = encode_texts(config, str(generator), TEXTS[:1], CPU)
    more = encode_texts(config, str(generator), TEXTS, CPU)
    assert loads[1][1] == [[TEXTS[1]], [TEXTS[2]]]
    shutil.rmtree(cache)
    fresh = encode_texts(config, str(generator), TEXTS, CPU)
    assert all(torch.equal(fresh[text], more[text]) for text in fresh) and torch.equal(some[TEXTS[0]], fresh[TEXTS[0]])


def test_the_encoder_is_gone_afterwards(generator, cache, large, loads, tiny_preset) -> None:
    encode_texts(configuration(tiny_preset), str(generator), TEXTS, CPU)
    gc.collect()
    ((encoder, _),) = loads
    assert encoder() is None


def test_a_streamed_encoder_is_gone_too_and_shares_the_cache(generator, cache, large, loads, tiny_preset) -> None:
    streamed = encode_texts(configuration(tiny_preset, "memory.text_device=stream"), str(generator), TEXTS, CPU)
    gc.collect()
    ((encoder, _),) = loads
    assert encoder() is None
    resident = encode_texts(configuration(tiny_preset), str(generator), TEXTS, CPU)
    assert len(loads) == 1
    shutil.rmtree(cache)
    assert all(
        torch.equal(streamed[text], row)
        for text, row in encode_texts(configuration(tiny_preset), str(generator), TEXTS, CPU).items()
    )
    assert resident.keys() == streamed.keys()


def test_another_encoder_or_setting_has_its_own(generator, cache, large, loads, tiny_preset, tmp_path) -> None:
    encode_texts(configuration(tiny_preset), str(generator), TEXTS[:1], CPU)
    other = save_tiny_generator(tmp_path / "other", seed=1)
    same = Path(shutil.copytree(generator, tmp_path / "same"))
    for expected, folder, settings in (
        (1, same, []),
        (2, other, []),
        (3, generator, ["dtype=bf16"]),
        (4, generator, ["model.text_tokens=9"]),
    ):
        encode_texts(configuration(tiny_preset, *settings), str(folder), TEXTS[:1], CPU)
        assert len(loads) == expected
    described = same / "transformer" / "config.json"  # with which an encoder may change what it makes of a text
    described.write_text(json.dumps(json.loads(described.read_text(encoding="utf-8")) | {"freq_dim": 128}))
    encode_texts(configuration(tiny_preset), str(same), TEXTS[:1], CPU)
    assert len(loads) == 5


def test_large_files_are_told_apart_by_slices(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "WHOLE_BYTES", 0)
    monkeypatch.setattr(module, "SLICE_BYTES", 16)
    for name in ("text_encoder", "tokenizer"):
        (tmp_path / name).mkdir()
    file = tmp_path / "text_encoder" / "model.safetensors"
    prints = set()
    for content in (bytes(4096), b"\1" + bytes(4095), bytes(4095) + b"\1", bytes(4097)):
        file.write_bytes(content)
        prints.add(module._fingerprint(tmp_path, ["text_encoder"]))
    assert len(prints) == 4


def test_a_damaged_file_counts_as_missing(generator, cache, large, loads, tiny_preset) -> None:
    config = configuration(tiny_preset)
    first = encode_texts(config, str(generator), TEXTS[:2], CPU)
    one, two = sorted(cache.iterdir())
    one.write_bytes(b"nonsense")
    shutil.copy(two, one.with_name("copy"))
    again = encode_texts(config, str(generator), TEXTS[:2], CPU)
    assert len(loads) == 2 and all(torch.equal(first[text], again[text]) for text in first)
    # a file under another text's name
    shutil.copy(two, one)
    again = encode_texts(config, str(generator), TEXTS[:2], CPU)
    assert len(loads) == 3 and all(torch.equal(first[text], again[text]) for text in first)


def test_a_folder_that_cannot_be_written_to_only_forgets(generator, cache, large, loads, tiny_preset) -> None:
    cache.parent.mkdir()
    cache.write_text("in the way")
    config = configuration(tiny_preset)
    first, again = (encode_texts(config, str(generator), TEXTS, CPU) for _ in range(2))
    assert len(loads) == 2 and all(torch.equal(first[text], again[text]) for text in first)
