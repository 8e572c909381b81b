"""Random and fake generators: the same tensors, in the same dtypes, as after loading."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from _critic import FAMILIES, clips, questions
from _tiny import save_tiny_critic, save_tiny_generator, tiny_condition, tiny_latents
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lowmem_drf.models.generators import KNOWN_GENERATORS, generator_config
from lowmem_drf.models.lora.adapter import add_lora, lora_parameters
from lowmem_drf.models.qwen_vl.critic import load_critic
from lowmem_drf.models.wan.denoiser import as_velocity, load_denoiser
from lowmem_drf.models.wan.random_generator import random_transformer, random_vae
from lowmem_drf.models.wan.text import load_text
from lowmem_drf.models.wan.vae.decoder import WanDecoder, load_vae
from lowmem_drf.models.weights.packed_linear import PackedLinear, unpack
from lowmem_drf.planner.depths import shallow_generator
from lowmem_drf.planner.fake_models import empty_lora, fake_critic, fake_text, fake_transformer, fake_vae
from lowmem_drf.planner.fakes import Fakes

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    return save_tiny_generator(tmp_path_factory.mktemp("generator"))


@pytest.fixture
def mode():
    return FakeTensorMode(allow_non_fake_inputs=True)


def layout(model) -> dict:
    """Shape and dtype by name, of parameters and buffers."""
    return {
        name: (tuple(tensor.shape), tensor.dtype)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }


def loaded(generator, kind: str, dtype):
    load = {"transformer": load_denoiser, "vae": load_vae, "text": lambda *arguments: load_text(*arguments).model}
    return load[kind](str(generator), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["transformer", "vae"])
def test_random_is_laid_out_as_loaded(generator, kind: str, dtype) -> None:
    make = {"transformer": random_transformer, "vae": random_vae}[kind]
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
    config = generator_config(str(generator))
    with mode if inside else nullcontext():
        fake = make(config, dtype, mode)
    assert layout(fake) == layout(loaded(generator, kind, dtype))
    assert all(isinstance(parameter, FakeTensor) and not parameter.requires_grad for parameter in fake.parameters())
    assert not any(isinstance(buffer, FakeTensor) for buffer in fake.buffers())


def test_norms_of_a_16_bit_transformer_are_in_fp32(generator) -> None:
    transformer = random_transformer(generator_config(str(generator)).transformer, torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in transformer.named_parameters()}
    tables = "blocks.0.scale_shift_table", "scale_shift_table", "blocks.0.norm2.weight"
    for name in (*tables, "condition_embedder.time_embedder.linear_1.weight"):
        assert dtypes[name] == torch.float32
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


def test_a_shared_embedding_stays_one(generator, mode) -> None:
    model = fake_text(generator_config(str(generator)), torch.float32, mode)
    assert model.shared.weight is model.encoder.embed_tokens.weight


def test_fewer_layers_at_full_width() -> None:
    config = KNOWN_GENERATORS["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"].config
    transformer = random_transformer(config.transformer, torch.bfloat16, layers=1)
    assert len(transformer.blocks) == 1 and transformer.blocks[0].ffn.net[0].proj.weight.shape == (8960, 1536)


def test_a_fake_generator_runs_forward_and_backward(mode) -> None:
    """At true size: 832x480x81, 32,760 tokens."""
    depths = {"transformer": 2, "text": 2}
    config = shallow_generator(KNOWN_GENERATORS["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"].config, depths)
    transformer = fake_transformer(config, torch.bfloat16, mode)
    text, vae = fake_text(config, torch.bfloat16, mode), fake_vae(config, torch.float32, mode)
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
    assert x.grad.shape == x.shape and all(
        parameter.grad.dtype == torch.float32 for parameter in lora_parameters(transformer)
    )
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
        (gradient,) = torch.autograd.grad(
            sum(answer.logits_AV.log_softmax(-1)[0, 0] for clip in got for answer in clip), shown
        )
    assert [[answer.logits_AV.shape for answer in clip] for clip in got] == [
        [answer.logits_AV.shape for answer in clip] for clip in wanted
    ]
    assert gradient.shape == frames.shape and isinstance(gradient, FakeTensor)


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_packed_weights_have_the_bytes_of_real_ones(generator, quant: str, mode) -> None:
    described = generator_config(str(generator))
    config = described.transformer
    real, fake = (
        random_transformer(config, torch.bfloat16, quant=quant),
        fake_transformer(described, torch.bfloat16, mode, quant),
    )
    assert layout(real) == layout(fake) and layout(real) != layout(random_transformer(config, torch.bfloat16))
    assert layout(real) == layout(load_denoiser(str(generator), torch.bfloat16, quant=quant))


def test_a_packed_critic_has_the_bytes_of_a_real_one(tmp_path, mode) -> None:
    folder = str(save_tiny_critic(tmp_path, width=96))
    real, fake = load_critic(folder, quant="nf4").model, fake_critic(folder, torch.float32, None, "nf4", mode).model
    assert layout(real) == layout(fake)


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_packed_weights_are_those_that_are_not_packed(generator, quant: str) -> None:
    """The same random draws; only the linear layers of attentions and feed-forwards in blocks are packed, within half a
    step of their format."""
    config = generator_config(str(generator)).transformer
    plain, packed = random_transformer(config), random_transformer(config, quant=quant)
    found = {name for name, module in packed.named_modules() if isinstance(module, PackedLinear)}
    inside = (
        "attn1.to_q",
        "attn1.to_k",
        "attn1.to_v",
        "attn1.to_out.0",
        "attn2.to_q",
        "attn2.to_k",
        "attn2.to_v",
        "attn2.to_out.0",
    )
    assert found == {
        f"blocks.{block}.{name}" for block in range(2) for name in (*inside, "ffn.net.0.proj", "ffn.net.2")
    }
    others = dict(packed.named_parameters())
    for name, wanted in plain.named_parameters():
        module = name.removesuffix(".weight")
        if module not in found:
            assert torch.equal(others[name], wanted) and wanted.dtype.is_floating_point
            continue
        layer = packed.get_submodule(module)
        got = unpack(quant, layer.shape, layer.packed(), torch.float32)
        largest = wanted.abs().amax(1, keepdim=True) if quant == "int8" else wanted.abs().max()
        # nf4: half of its widest gap, 0.304, and the rounding of the scale
        step = largest / 254 if quant == "int8" else 0.16 * largest
        assert ((got - wanted).abs() <= step * 1.001).all()


def test_a_fake_packed_transformer_runs_forward_and_backward(generator, mode) -> None:
    config = generator_config(str(generator))
    for quant in ("nf4", "int8"):
        transformer = fake_transformer(config, torch.bfloat16, mode, quant)
        add_lora(transformer, rank=2, alpha=2.0)
        empty_lora(transformer, mode)
        with Fakes(mode):
            with mode:
                x = torch.empty(1, 4, 3, 4, 4, requires_grad=True)
                text = torch.empty(1, 6, 16)
            velocity = as_velocity(transformer)(x, 0.5, text)
            velocity.sum().backward()
        assert isinstance(x.grad, FakeTensor) and all(
            parameter.grad is not None for parameter in lora_parameters(transformer)
        )
