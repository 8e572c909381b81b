"""A linear layer with a LoRA as one function: peft's values and gradients in fewer bytes."""

from __future__ import annotations

import pytest
import torch
from _relay import LIMIT, relative_difference
from _tiny import randomise_lora, tiny_transformer
from torch.nn import functional as F

from lowmem_drf.models.lora.adapter import ADAPTER, add_lora, lora_scale
from lowmem_drf.models.lora.linear import linear
from lowmem_drf.planner.ledger import Ledger


@pytest.fixture(scope="module")
def model():
    transformer = tiny_transformer(torch.float64, layers=1)
    add_lora(transformer, rank=2, alpha=3.0)
    randomise_lora(transformer)
    return transformer


def layers(model):
    block = model.blocks[0]
    return block.attn1.to_q, block.ffn.net[2]


def gradients(layer, call, x):
    x = x.clone().requires_grad_()
    y = call(layer, x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    lora = [matrices[ADAPTER].weight for matrices in (layer.lora_A, layer.lora_B)]
    return [y.detach(), *torch.autograd.grad(y, [x, *lora], upstream)]


def peft(gelu):
    return lambda layer, x: layer(F.gelu(x, approximate="tanh") if gelu else x)


def ours(gelu):
    return lambda layer, x: linear(layer, x, gelu)


@pytest.mark.parametrize("gelu", [False, True], ids=["plain", "gelu"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (63,), (2, 3, 5)], ids=str)
def test_values_and_gradients_are_pefts(model, shape, gelu):
    for layer in layers(model):
        x = torch.randn(*shape, layer.in_features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for a, b in zip(gradients(layer, ours(gelu), x), gradients(layer, peft(gelu), x), strict=True):
            assert relative_difference(a, b) < LIMIT
        strided = torch.stack([x, x], -1)[..., 0]
        assert not strided.is_contiguous()
        for a, b in zip(gradients(layer, ours(gelu), strided), gradients(layer, peft(gelu), x), strict=True):
            assert relative_difference(a, b) < LIMIT


def test_a_lora_that_is_off_or_not_there_is_not_asked(model):
    layer = layers(model)[0]
    x = torch.randn(3, layer.in_features, dtype=torch.float64)
    with lora_scale(model, 0):
        assert torch.equal(linear(layer, x), layer.base_layer(x))
    with lora_scale(model, 2):
        twice = linear(layer, x)
    assert relative_difference(twice - layer.base_layer(x), 2 * (linear(layer, x) - layer.base_layer(x))) < LIMIT
    assert torch.equal(linear(layer.base_layer, x, gelu=True), layer.base_layer(F.gelu(x, approximate="tanh")))


def test_gradients_that_nobody_wants_are_not_made(model):
    layer = layers(model)[1]
    x = torch.randn(5, layer.in_features, dtype=torch.float64, requires_grad=True)
    a, b = layer.lora_A, layer.lora_B
    for matrices in (a, b):
        matrices.requires_grad_(False)
    try:
        (d_x,) = torch.autograd.grad(linear(layer, x, gelu=True).sum(), x)
    finally:
        for matrices in (a, b):
            matrices.requires_grad_(True)
    (wanted,) = torch.autograd.grad(peft(True)(layer, x).sum(), x)
    assert relative_difference(d_x, wanted) < LIMIT


def test_bytes():
    """The second layer of a feed-forward keeps its input; at any time there is at most one more tensor of that size."""
    wide, narrow = 4000, 24
    block = torch.nn.Linear(wide, narrow)
    holder = torch.nn.ModuleDict({"blocks": torch.nn.ModuleDict({"ffn": block})}).requires_grad_(False)
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=["ffn"]), holder, adapter_name=ADAPTER)
    layer = holder["blocks"]["ffn"]
    x = torch.randn(500, wide, requires_grad=True)
    hidden = x.nbytes

    def peaks(call):
        with Ledger() as ledger:
            ledger.adopt([x])
            y = call(layer, x)
            found = [ledger.peak_card_bytes, ledger.card_bytes]
            ledger.reset_peak()
            torch.autograd.grad(y, [x, layer.lora_A[ADAPTER].weight], torch.ones_like(y))
            return [size - hidden for size in (*found, ledger.peak_card_bytes)]

    forward, kept, backward = peaks(ours(True))
    theirs = peaks(peft(True))
    assert kept < 0.1 * hidden and theirs[1] > hidden  # beside x
    assert forward < 1.1 * hidden and backward < 1.1 * hidden
    assert theirs[2] > 2.9 * hidden
