"""Streamed weights: bitwise equal gradients, two layers on the card, any order of passes."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from _streams import late_store
from _tiny import randomise_lora, save_tiny_critic, tiny_condition, tiny_latents, tiny_transformer
from torch import nn
from torch.nn import functional as F

from lowmem_drf.memory.host import HostStore
from lowmem_drf.memory.streaming import HostEmbedding, Streamed
from lowmem_drf.models.blocks import Activations
from lowmem_drf.models.lora.adapter import add_lora, lora_layers, lora_parameters
from lowmem_drf.models.qwen_vl.critic import load_critic
from lowmem_drf.models.wan.denoiser import as_velocity, set_activations
from lowmem_drf.models.weights.packed_linear import PackedLinear
from lowmem_drf.ops import fused_ops, naive_ops, triton_attention
from lowmem_drf.planner.ledger import Ledger
from lowmem_drf.planner.stand_ins import planned_store
from lowmem_drf.types import Question

CPU = torch.device("cpu")
LAYERS = 4


def tuned(**config):
    transformer = tiny_transformer(torch.float32, layers=LAYERS, **config)
    add_lora(transformer, rank=2, alpha=2.0)
    randomise_lora(transformer)
    return transformer


def passes(transformer, dtype=torch.float32):
    """The passes of a step: forwards without gradient, then forward and backward in turn; and two graphs alive at once,
    with a pass between."""
    velocity, lora = as_velocity(transformer), lora_parameters(transformer)
    x, text = tiny_latents(1, dtype=dtype), tiny_condition(1, dtype)
    results = []
    with torch.no_grad():
        results += [velocity(x, sigma, text) for sigma in (0.9, 0.5)]
    for sigma in (0.5, 0.2):
        x_in = x.clone().requires_grad_()
        v = velocity(x_in, sigma, text)
        results += torch.autograd.grad(v, [x_in, *lora], torch.ones_like(v))
    first, second = velocity(x, 0.7, text), velocity(x, 0.3, text)
    results += torch.autograd.grad(first, lora, torch.ones_like(first))
    with torch.no_grad():
        results.append(velocity(x, 0.1, text))
    results += torch.autograd.grad(second, lora, torch.ones_like(second))
    return results


SETTINGS = [
    {},
    {"slices": 3},
    {"checkpoint": "host", "keep_attention": "host", "slices": 2},
    {"checkpoint": False},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=[",".join(map(str, one)) or "plain" for one in SETTINGS])
def test_gradients_are_those_of_resident_weights_to_the_bit(settings):
    transformer, store = tuned(), planned_store()
    set_activations(transformer, Activations(store=HostStore(CPU), **settings))
    wanted = passes(transformer)
    with Ledger():  # under which every fetch is a copy of its own
        streamed = Streamed(list(transformer.blocks), CPU, store)
        set_activations(transformer, Activations(store=store, streamed=streamed, **settings))
        got = passes(transformer)
    assert len(got) == len(wanted) > 100
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_gradients_are_right_however_late_the_copies_are(monkeypatch, quant):
    """The CUDA path, with streams that copy only when waited for."""
    transformer = tuned()
    if quant != "none":
        packed(transformer)
    set_activations(transformer, Activations(slices=2))
    wanted = passes(transformer)
    store = late_store(monkeypatch, arena=1 << 16, in_flight=1 << 12)
    streamed = Streamed(list(transformer.blocks), CPU, store)
    settings: dict[str, Any] = {"checkpoint": "host", "keep_attention": "host", "slices": 2}
    set_activations(transformer, Activations(store=store, streamed=streamed, **settings))
    assert all(torch.equal(a, b) for a, b in zip(passes(transformer), wanted, strict=True))


@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize("slices", [1, 3])
def test_a_graph_keeps_no_weights_of_blocks_that_are_recomputed(slices, quant):
    """Only the pieces of two layers stay alive while graphs wait for their backward. Also with the kernels' linear
    layers."""
    transformer = tuned()
    if quant != "none":
        packed(transformer)
    with Ledger():
        streamed = Streamed(list(transformer.blocks), CPU, planned_store())
        came = arrivals(streamed)
        rows = replace(naive_ops(), lean_linears=True)
        set_activations(transformer, Activations(slices=slices, rows=rows, streamed=streamed))
        graphs = [
            as_velocity(transformer)(tiny_latents(1, dtype=torch.float32), sigma, tiny_condition(1, torch.float32))
            for sigma in (0.7, 0.3)
        ]
        assert len(came) == 2 * LAYERS and alive(came) <= 2
        for v in graphs:
            torch.autograd.grad(v, lora_parameters(transformer), torch.ones_like(v))
        assert len(came) > 2 * LAYERS and alive(came) <= 2
        streamed.drop()
        del graphs, v
        assert alive(came) == 0


@pytest.mark.slow
def test_kernels_run_on_streamed_weights():
    """Our kernels, interpreted: bitwise equal gradients, and no graph keeps weights of a recomputed block."""
    settings: dict[str, Any] = {"rows": fused_ops(), "attention": triton_attention()}
    settings |= {"slices": 2, "keep_attention": "card"}
    transformer = tuned(attention_head_dim=16)
    set_activations(transformer, Activations(**settings))
    wanted = gradients(transformer)
    with Ledger():
        streamed = Streamed(list(transformer.blocks), CPU, planned_store())
        came = arrivals(streamed)
        set_activations(transformer, Activations(streamed=streamed, **settings))
        assert all(torch.equal(a, b) for a, b in zip(gradients(transformer), wanted, strict=True))
        v = velocity_of(transformer)
        assert len(came) == 3 * LAYERS and alive(came) <= 2 and v.requires_grad


def velocity_of(transformer):
    return as_velocity(transformer)(tiny_latents(1, dtype=torch.float32), 0.5, tiny_condition(1, torch.float32))


def gradients(transformer):
    v = velocity_of(transformer)
    return torch.autograd.grad(v, lora_parameters(transformer), torch.ones_like(v))


def arrivals(streamed):
    """A list that will hold a weak reference to the storage of each fetched piece."""
    came: list[weakref.ref[torch.Tensor]] = []
    for layer in streamed.layers:
        layer.fetch = lambda do=layer.fetch, layer=layer: (
            do(),
            came.append(weakref.ref(layer._here.untyped_storage())),
        )
    return came


def alive(references):
    gc.collect()
    return len({id(storage) for reference in references if (storage := reference()) is not None})


def packed(transformer):
    """Converts the blocks' linear layers to NF4, below the LoRA."""
    for layer in lora_layers(transformer).values():
        linear = layer.base_layer
        layer.base_layer = PackedLinear(linear.in_features, linear.out_features, linear.bias is not None, "nf4")
        layer.base_layer.pack(linear.weight)
        layer.base_layer.bias = linear.bias


def test_a_lora_may_come_after_streaming():
    wanted = passes(tuned())
    transformer = tiny_transformer(torch.float32, layers=LAYERS)
    streamed = Streamed(list(transformer.blocks), CPU, HostStore(CPU))
    set_activations(transformer, Activations(streamed=streamed))
    add_lora(transformer, rank=2, alpha=2.0)
    randomise_lora(transformer)
    assert all(torch.equal(a, b) for a, b in zip(passes(transformer), wanted, strict=True))


class Wide(nn.Module):
    """A layer with weights much larger than its activations."""

    def __init__(self, generator):
        super().__init__()
        self.linear = nn.Linear(512, 512, bias=False)
        self.linear.weight = nn.Parameter(torch.randn(512, 512, generator=generator) / 30, requires_grad=False)
        self.register_buffer("shift", torch.ones(512))

    def forward(self, x):
        return x + F.silu(self.linear(x)) * self.shift


def wide_layers(count=6):
    generator = torch.Generator().manual_seed(0)
    return [Wide(generator) for _ in range(count)]


def run(layers, x, checkpointed):
    from torch.utils.checkpoint import checkpoint

    for layer in layers:
        x = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
    return x


def test_the_card_holds_two_layers_and_the_host_all_of_them():
    layers = wide_layers()
    one = 512 * 513 * 4
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (wanted,) = torch.autograd.grad(run(layers, x, False).square().sum(), x)
    with Ledger() as ledger:
        ledger.adopt(tensor for layer in layers for tensor in (*layer.parameters(), *layer.buffers()))
        assert ledger.card_bytes == len(layers) * one
        streamed = Streamed(layers, CPU, planned_store())
        for place, layer in enumerate(layers):
            layer.forward = streamed.forward(place, layer.forward)
        assert (ledger.card_bytes, ledger.host_bytes) == (0, len(layers) * one == streamed.nbytes and streamed.nbytes)
        for _ in range(2):
            with torch.no_grad():
                ledger.reset_peak()
                run(layers, x, False)
                assert 2 * one <= ledger.peak_card_bytes < 2.2 * one
            ledger.reset_peak()
            (got,) = torch.autograd.grad(run(layers, x, True).square().sum(), x)
            assert 2 * one <= ledger.peak_card_bytes < 2.2 * one
            assert torch.equal(got, wanted)
        streamed.drop()
        del got
        gc.collect()
        assert ledger.card_bytes < 0.1 * one


def test_every_layer_is_on_its_way_before_it_is_entered():
    """In a forward, in the backward that recomputes it, and from pass to pass; except the very first layer."""
    layers = wide_layers()
    streamed = Streamed(layers, CPU, HostStore(CPU))
    log = []
    for place, layer in enumerate(streamed.layers):
        layer.prefetch = lambda place=place, do=layer.prefetch: (log.append(("prefetch", place)), do())
        layer.fetch = lambda place=place, do=layer.fetch, layer=layer: (
            log.append(("enter", place, layer._here is not None)),
            do(),
        )
    for place, layer in enumerate(layers):
        layer.forward = streamed.forward(place, layer.forward)
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(1)).requires_grad_()
    for _ in range(2):
        with torch.no_grad():
            run(layers, x, False)
            run(layers, x, False)
        run(layers, x, True).sum().backward()
    entered = [i for i, entry in enumerate(log) if entry[0] == "enter"]
    surprised = [log[i] for i in entered if not log[i][2] and ("prefetch", log[i][1]) not in log[max(0, i - 3) : i]]
    assert surprised == [("enter", 0, False)]
    assert len(entered) == 2 * (2 + 1 + 1) * len(layers)


@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_streamed_critic_says_the_same(tmp_path, family, quant):
    folder = str(save_tiny_critic(tmp_path, width=96, family=family))
    asked = [[Question("TA", "is the circle red ?", "yes"), Question("Phy", "what ?", "it moves well", kind="dense")]]
    frames = torch.rand(1, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def gradient(critic):
        critic.set_checkpointing(True)
        answers = critic(frames, asked)[0]
        logits = torch.cat([answer.logits_AV for answer in answers])
        return logits.detach(), torch.autograd.grad(logits.log_softmax(-1)[:, 3].sum(), frames)[0]

    wanted = gradient(load_critic(folder, torch.float32, quant=quant))
    critic = load_critic(folder, torch.float32, quant=quant)
    with Ledger() as ledger:
        ledger.adopt(tensor for tensor in (*critic.model.parameters(), *critic.model.buffers()))
        before = ledger.card_bytes
        streamed = critic.stream(CPU, planned_store())
        assert isinstance(critic.model.get_input_embeddings(), HostEmbedding)
        assert ledger.card_bytes < before - streamed.nbytes / 2
        got = gradient(critic)
        spoken = critic.generate("what ?", max_new_tokens=4)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert spoken == load_critic(folder, torch.float32, quant=quant).generate("what ?", max_new_tokens=4)
