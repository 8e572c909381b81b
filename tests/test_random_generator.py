"""Generators of random weights, and of fake ones: the same tensors, in the same dtypes, as loading would leave."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from _critic import FAMILIES, clips, questions
from _tiny import save_tiny_critic, save_tiny_generator, tiny_condition, tiny_latents
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lowmem_drf.memory.fakes import Fakes
from lowmem_drf.models.critic import load_critic
from lowmem_drf.models.decoder import WanDecoder, load_vae
from lowmem_drf.models.denoiser import as_velocity, load_denoiser
from lowmem_drf.models.fake import Linear4bit, empty_lora, fake_critic, fake_text, fake_transformer, fake_vae
from lowmem_drf.models.known_generators import KNOWN_GENERATORS, generator_config
from lowmem_drf.models.lora import add_lora, lora_parameters
from lowmem_drf.models.random_generator import random_text, random_transformer, random_vae
from lowmem_drf.models.text import load_text

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    return save_tiny_generator(tmp_path_factory.mktemp("generator"))


@pytest.fixture
def mode():
    return FakeTensorMode(allow_non_fake_inputs=True)


def layout(model) -> dict:
    """What a model is made of: shape and dtype by name; parameters and buffers."""
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def loaded(generator, kind: str, dtype):
    load = {"transformer": load_denoiser, "vae": load_vae, "text": lambda *arguments: load_text(*arguments).model}
    return load[kind](str(generator), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["transformer", "vae", "text"])
def test_random_is_laid_out_as_loaded(generator, kind: str, dtype) -> None:
    make = {"transformer": random_transformer, "vae": random_vae, "text": random_text}[kind]
    random, real = make(getattr(generator_config(str(generator)), kind), dtype), loaded(generator, kind, dtype)
    assert layout(random) == layout(real)
    assert not random.training and not any(parameter.requires_grad for parameter in random.parameters())
    assert not any(tensor.is_meta for tensor in [*random.parameters(), *random.buffers()])
    rotary = dict(real.named_buffers())
    assert all(torch.equal(buffer, rotary[name]) for name, buffer in random.named_buffers())


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["transformer", "vae", "text"])
@pytest.mark.parametrize("inside", [False, True], ids=["no mode", "under the mode"])
def test_fake_is_laid_out_as_loaded(generator, kind: str, dtype, inside: bool, mode) -> None:
    make = {"transformer": fake_transformer, "vae": fake_vae, "text": fake_text}[kind]
    config = getattr(generator_config(str(generator)), kind)
    with mode if inside else nullcontext():
        fake = make(config, dtype, mode)
    assert layout(fake) == layout(loaded(generator, kind, dtype))
    assert all(isinstance(parameter, FakeTensor) and not parameter.requires_grad for parameter in fake.parameters())
    assert not any(isinstance(buffer, FakeTensor) for buffer in fake.buffers())


def test_norms_of_a_16_bit_transformer_are_in_fp32(generator) -> None:
    dtypes = {name: parameter.dtype for name, parameter in random_transformer(generator_config(str(generator)).transformer, torch.bfloat16).named_parameters()}
    assert dtypes["blocks.0.scale_shift_table"] == dtypes["scale_shift_table"] == dtypes["blocks.0.norm2.weight"] == torch.float32
    assert dtypes["condition_embedder.time_embedder.linear_1.weight"] == torch.float32
    assert dtypes["blocks.0.attn1.norm_q.weight"] == dtypes["proj_out.weight"] == torch.bfloat16


def test_the_same_seed_the_same_weights(generator) -> None:
    config = generator_config(str(generator)).transformer
    first, again, other = (random_transformer(config, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_random_models_run(generator) -> None:
    config = generator_config(str(generator))
    x = tiny_latents(1, dtype=torch.float32).requires_grad_()
    velocity = as_velocity(random_transformer(config.transformer))(x, 0.5, tiny_condition(1, torch.float32))
    frames = WanDecoder(random_vae(config.vae)).decode(velocity)
    (gradient,) = torch.autograd.grad(frames.sum(), x)
    assert frames.isfinite().all() and gradient.isfinite().all() and gradient.any()
    embeddings = random_text(config.text)(torch.ones(1, 5, dtype=torch.int64)).last_hidden_state
    assert embeddings.isfinite().all() and embeddings.std() > 0


def test_a_shared_embedding_stays_one(generator, mode) -> None:
    config = generator_config(str(generator)).text
    for model in (random_text(config), fake_text(config, torch.float32, mode)):
        assert model.shared.weight is model.encoder.embed_tokens.weight


def test_fewer_layers_at_full_width() -> None:
    config = KNOWN_GENERATORS["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"].config
    transformer = random_transformer(config.transformer, torch.bfloat16, layers=1)
    assert len(transformer.blocks) == 1 and transformer.blocks[0].ffn.net[0].proj.weight.shape == (8960, 1536)


def test_a_fake_generator_runs_forward_and_backward(mode) -> None:
    """At true size: 832x480x81, 32,760 tokens."""
    config = KNOWN_GENERATORS["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"].config
    transformer = fake_transformer(config.transformer | {"num_layers": 2}, torch.bfloat16, mode)
    text, vae = fake_text(config.text | {"num_layers": 2}, torch.bfloat16, mode), fake_vae(config.vae, torch.float32, mode)
    with Fakes(mode):
        add_lora(transformer, rank=4, alpha=4.0)
        empty_lora(transformer, mode)
        with torch.no_grad():
            cond = text(torch.ones(1, 512, dtype=torch.int64), torch.ones(1, 512, dtype=torch.int64)).last_hidden_state
        with mode:
            x = torch.empty(1, 16, 21, 60, 104, requires_grad=True)
        velocity = as_velocity(transformer)(x, 0.5, cond)
        decoder = WanDecoder(vae)
        frames, caches = decoder.chunk(velocity[:, :, :1], decoder.start(1))
        more, _ = decoder.chunk(velocity[:, :, 1:2], caches)
        (frames.sum() + more.sum()).backward()
    assert frames.shape == (1, 1, 3, 480, 832) and more.shape == (1, 4, 3, 480, 832)
    assert x.grad.shape == x.shape and all(parameter.grad.dtype == torch.float32 for parameter in lora_parameters(transformer))
    assert all(isinstance(tensor, FakeTensor) for tensor in (velocity, frames, more, x.grad))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_fake_critic_runs_as_a_real_one(family: str, quant: str, checkpointing: bool, tmp_path, mode) -> None:
    folder = str(save_tiny_critic(tmp_path, family=family, width=96))
    real, fake = load_critic(folder, quant=quant, fps=4.0), fake_critic(folder, torch.float32, 4.0, quant, mode)
    real.set_checkpointing(checkpointing)
    fake.set_checkpointing(checkpointing)
    frames = clips(2, dtype=torch.float32)
    wanted = real(frames, [questions(3), questions(2)])
    with Fakes(mode):
        with mode:
            shown = torch.empty(frames.shape, requires_grad=True)
        got = fake(shown, [questions(3), questions(2)])
        (gradient,) = torch.autograd.grad(sum(answer.logits_AV.log_softmax(-1)[0, 0] for clip in got for answer in clip), shown)
    assert [[answer.logits_AV.shape for answer in clip] for clip in got] == [[answer.logits_AV.shape for answer in clip] for clip in wanted]
    assert gradient.shape == frames.shape and isinstance(gradient, FakeTensor)


def test_4_bit_bytes_are_those_of_bitsandbytes(tmp_path, mode) -> None:
    import bitsandbytes as bnb

    folder = str(save_tiny_critic(tmp_path, width=96))
    real, fake = load_critic(folder, quant="nf4").model, fake_critic(folder, torch.float32, None, "nf4", mode).model
    layers = {name: module for name, module in real.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert layers.keys() == {name for name, module in fake.named_modules() if isinstance(module, Linear4bit)}
    for name, layer in layers.items():
        state, stand_in = layer.weight.quant_state, fake.get_submodule(name)
        pairs = [
            (stand_in.weight, layer.weight),
            (stand_in.absmax, state.absmax),
            (stand_in.nested_absmax, state.state2.absmax),
            (stand_in.nested_code, state.state2.code),
            (stand_in.offset, state.offset),
        ]
        assert [(ours.shape, ours.dtype) for ours, _ in pairs] == [(theirs.shape, theirs.dtype) for _, theirs in pairs]
        assert (stand_in.bias is None) == (layer.bias is None)


def test_4_bit_arithmetic_is_that_of_bitsandbytes(mode) -> None:
    """With values in the places of the fakes."""
    import bitsandbytes as bnb
    from torch import nn

    from lowmem_drf.models.quant import quantised_linear

    plain = nn.Linear(96, 160)
    real, stand_in = quantised_linear(plain.weight.data, plain.bias.data, torch.float32), Linear4bit(plain, torch.float32, mode)
    state = real.weight.quant_state
    stand_in.weight = nn.Parameter(real.weight.data, requires_grad=False)
    stand_in.absmax, stand_in.nested_absmax, stand_in.nested_code, stand_in.offset = state.absmax, state.state2.absmax, state.state2.code, state.offset
    x = torch.randn(7, 96, requires_grad=True)
    ours, theirs = stand_in(x), nn.functional.linear(x, bnb.functional.dequantize_4bit(real.weight.data, state), plain.bias)
    upstream = torch.randn(7, 160)
    assert torch.equal(ours, theirs)
    assert torch.equal(torch.autograd.grad(ours, x, upstream)[0], torch.autograd.grad(real(x), x, upstream)[0])
