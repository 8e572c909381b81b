"""Critics with random weights: published sizes, filled without ever holding the model twice."""

from __future__ import annotations

import weakref

import pytest
import torch
from _critic import FAMILIES, SHORT, clips, questions
from _tiny import save_tiny_critic, tiny_critic_config
from torch import nn

from lowmem_drf.errors import BadInputError
from lowmem_drf.models.qwen_vl import random_critic as module
from lowmem_drf.models.qwen_vl.families import family_of
from lowmem_drf.models.qwen_vl.known import KNOWN, KnownCritic
from lowmem_drf.models.qwen_vl.random_critic import empty_model, random_critic, random_model
from lowmem_drf.models.weights.packed_linear import PackedLinear

TINY = "tiny"


@pytest.fixture(params=FAMILIES)
def tiny_known(request, monkeypatch) -> str:
    """A known critic of tiny layers whose vocabulary has room for the byte tokenizer."""
    config = tiny_critic_config(request.param, width=96)
    config["text_config"] |= {"vocab_size": 400, "eos_token_id": 305, "pad_token_id": 306}
    config |= {"image_token_id": 301, "video_token_id": 302, "vision_start_token_id": 303, "vision_end_token_id": 304}
    real = next(known for known in KNOWN.values() if known.config["model_type"] == request.param)
    small = {"size": {"shortest_edge": 64, "longest_edge": 4096}, "patch_size": 4, "min_pixels": 64, "max_pixels": 4096}
    monkeypatch.setitem(module.KNOWN, TINY, KnownCritic(config, real.settings | small, 0))
    return TINY


@pytest.mark.parametrize("name", KNOWN)
def test_sizes_are_the_published_ones(name: str) -> None:
    known = KNOWN[name]
    model = empty_model(known.config)
    assert sum(p.numel() for p in model.parameters()) == known.parameters
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert getattr(model.config, "video_token_id", model.config.image_token_id) in (151656, 49190)


@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_runs(tiny_known: str, quant: str, checkpointing: bool) -> None:
    critic, frames = random_critic(tiny_known, quant=quant), clips(2, dtype=torch.float32)
    critic.set_checkpointing(checkpointing)
    (first, second) = critic(frames, [questions(3), questions(2)])
    gradient = torch.autograd.grad(sum(a.logits_AV.log_softmax(-1)[0, 0] for a in [*first, *second]), frames)[0]
    assert gradient.isfinite().all() and (gradient.abs().amax(dim=(0, 2, 3, 4)) > 0).all()
    assert isinstance(critic.generate("Is it red?", frames[0], 3), str)
    assert not any(t.is_meta for t in [*critic.model.parameters(), *critic.model.buffers()])
    assert not any(p.requires_grad for p in critic.model.parameters())


def test_the_same_weights_in_4_bit_and_without(tiny_known: str) -> None:
    plain, again, other = (random_critic(tiny_known, seed=seed).model.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert any(not torch.equal(plain[name], other[name]) for name in plain)
    small = random_critic(tiny_known, quant="nf4").model
    for name, layer in small.named_modules():
        if isinstance(layer, PackedLinear):
            wanted = PackedLinear(layer.in_features, layer.out_features, False, "nf4")
            wanted.pack(plain[f"{name}.weight"])
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(layer.packed(), wanted.packed(), strict=True))
        elif isinstance(layer, nn.Linear | nn.Embedding):
            assert torch.equal(layer.weight, plain[f"{name}.weight"])


def test_a_rotary_embedding_is_that_of_the_configuration(tiny_known: str) -> None:
    """Its buffers are in no checkpoint."""
    known = module.KNOWN[tiny_known].config
    made = random_critic(tiny_known).model
    settings = {key: value for key, value in known.items() if key != "model_type"}
    fresh = type(made)(type(made).config_class(**settings))
    wanted = dict(fresh.named_buffers())
    assert wanted and all(torch.equal(buffer, wanted[name]) for name, buffer in made.named_buffers())


def test_a_layer_is_quantised_before_the_next_is_drawn(tiny_known: str, monkeypatch) -> None:
    """At most one matrix exists in 16 bits at a time."""
    pack, drawn = PackedLinear.pack, []

    def watched(layer, weight, home) -> None:
        assert not any(ref() is not None for ref in drawn)
        pack(layer, weight, home)
        drawn.append(weakref.ref(weight))

    monkeypatch.setattr(PackedLinear, "pack", watched)
    random_critic(tiny_known, quant="nf4")
    assert len(drawn) == 2 * 7


def test_a_tied_head_is_not_filled_twice(tmp_path) -> None:
    config = tiny_critic_config() | {"tie_word_embeddings": True}
    config["text_config"]["tie_word_embeddings"] = True
    model = random_model(config, torch.float32, "cpu", "none", 0)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_fewer_layers_at_full_width() -> None:
    for name, known in KNOWN.items():
        model = empty_model(known.config, layers=2)
        text, vision = model.config.text_config, model.config.vision_config
        stacks = family_of(model.config.model_type).stacks(model)
        assert (len(stacks.language.layers), len(stacks.blocks)) == (2, 2), name
        assert (
            text.hidden_size == known.config["text_config"]["hidden_size"]
            and vision.hidden_size == known.config["vision_config"]["hidden_size"]
        )
    assert (
        len(empty_model(KNOWN["Qwen/Qwen3-VL-8B-Instruct"].config, layers=10).model.visual.deepstack_merger_list) == 1
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_gives_everything_but_its_weights(family: str, tmp_path) -> None:
    folder = save_tiny_critic(tmp_path, family=family)
    (folder / "model.safetensors").unlink()
    critic = random_critic(str(folder), layers=1)
    assert len(critic.model.model.language_model.layers) == 1
    assert len(critic(clips(1, dtype=torch.float32), [[SHORT]])[0]) == 1


def test_unknown_names() -> None:
    with pytest.raises(BadInputError, match="Qwen/Qwen2.5-VL-7B-Instruct"):
        random_critic("Qwen/Qwen9-VL")


@pytest.mark.parametrize("name", KNOWN)
def test_the_byte_tokenizer(name: str) -> None:
    config = KNOWN[name].config
    tokenizer = module.byte_tokenizer(config)
    word = tokenizer.convert_tokens_to_ids
    video, end = ("<|video_pad|>", "<|im_end|>") if "video_token_id" in config else ("<image>", "<end_of_utterance>")
    assert word(video) == config.get("video_token_id", config["image_token_id"])
    assert word(end) == config["text_config"]["eos_token_id"] == tokenizer.eos_token_id
    text = 'Does the “red” ball jump?\n{"yes": 1}'
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and max(ids) < 300
    assert tokenizer("yes")["input_ids"] == [word("yes")] and tokenizer("No")["input_ids"] == [word("No")]
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
