"""Packed linear layers: bitsandbytes' bits, gradients of the dequantised weights, and only packed tensors saved."""

from __future__ import annotations

import copy
import weakref

import bitsandbytes as bnb
import pytest
import torch
from _close import assert_within_budget
from _relay import LIMIT, relative_difference
from _tiny import randomise_lora, tiny_condition, tiny_latents
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lowmem_drf.errors import LowmemError
from lowmem_drf.models.blocks import Activations
from lowmem_drf.models.lora.adapter import (
    ADAPTER,
    add_lora,
    attach_lora,
    lora_layers,
    lora_parameters,
    lora_scale,
    lora_state,
    remove_lora,
)
from lowmem_drf.models.lora.changes import LoraChanges
from lowmem_drf.models.lora.linear import linear
from lowmem_drf.models.wan.denoiser import as_velocity, set_activations
from lowmem_drf.models.wan.random_generator import random_transformer
from lowmem_drf.models.weights.packed_linear import PackedLinear, unpack
from lowmem_drf.models.weights.quant import set_products
from lowmem_drf.planner.ledger import Ledger

QUANTS, INTEGERS = ["nf4", "int8"], "int8 products"
SHAPES = [(160, 128), (24, 32), (32, 24), (10, 96), (7, 33), (3, 1), (1, 64)]
"""(out, in): blocks that end with a row, that reach over rows, that are not full; an odd number of weights."""
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layer(
    quant: str, shape: tuple[int, int] = (160, 128), bias: bool = True, dtype: torch.dtype = torch.float32
) -> PackedLinear:
    made = PackedLinear(shape[1], shape[0], bias, quant)
    made.pack(0.1 * noise(*shape))
    if bias:
        made.bias = nn.Parameter(noise(shape[0], seed=1, dtype=dtype), requires_grad=False)
    return made


def values(packed: PackedLinear, dtype: torch.dtype) -> torch.Tensor:
    return unpack(packed.quant, packed.shape, packed.packed(), dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_nf4_has_the_bits_of_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = noise(*shape, dtype=dtype)
    made = PackedLinear(shape[1], shape[0], False, "nf4")
    laid_out = [(tensor.shape, tensor.dtype) for tensor in made.packed()]
    made.pack(weight)
    assert laid_out == [(tensor.shape, tensor.dtype) for tensor in made.packed()]
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    theirs = (packed, state.absmax, state.state2.absmax, state.state2.code, state.offset)
    assert all(torch.equal(a, b) for a, b in zip(made.packed(), theirs, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nf4_stands_for_its_sixteen_values(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Written out by the formula: the value of each half byte times the scale of its block."""
    made = layer("nf4", shape, bias=False)
    count = shape[0] * shape[1]
    halves = torch.stack([made.weight.flatten() >> 4, made.weight.flatten() & 15], 1).flatten()[:count].long()
    scales = (
        made.nested_code[made.absmax.long()] * made.nested_absmax.repeat_interleave(256)[: len(made.absmax)]
        + made.offset
    )
    table = bnb.functional.get_4bit_type("nf4", device="cpu")
    wanted = (table[halves] * scales.repeat_interleave(64)[:count]).view(shape)
    assert torch.equal(values(made, dtype), wanted.to(dtype))
    # half of the widest gap between two of the values, and half a step of a scale's own scale
    assert ((wanted - 0.1 * noise(*shape)).abs() <= 0.153 * scales.max() + 0.01 * made.nested_absmax.max()).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_has_the_values_of_bitsandbytes_within_half_a_step(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = noise(*shape)
    made = PackedLinear(shape[1], shape[0], False, "int8")
    made.pack(weight)
    q, scale, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(weight)
    assert torch.equal(made.weight, q) and torch.equal(made.scale, scale)
    assert torch.equal(values(made, dtype), (q * (scale / 127)[:, None]).to(dtype))
    assert ((values(made, torch.float64) - weight).abs() <= scale[:, None] / 254 * (1 + 1e-5)).all()


@pytest.mark.parametrize("quant", QUANTS)
def test_zeros_stay_zeros(quant: str) -> None:
    made = PackedLinear(64, 3, False, quant)
    made.pack(torch.zeros(3, 64))
    assert torch.equal(values(made, torch.float32), torch.zeros(3, 64))


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_products_and_gradients_are_those_of_the_values_bitwise(quant: str, dtype: torch.dtype, bias: bool) -> None:
    made = layer(quant, bias=bias, dtype=dtype)
    x, upstream = noise(2, 5, 128, dtype=dtype).requires_grad_(), noise(2, 5, 160, seed=2, dtype=dtype)
    ours, theirs = made(x), F.linear(x, values(made, dtype), made.bias)
    assert torch.equal(ours, theirs) and ours.dtype == dtype
    assert torch.equal(*(torch.autograd.grad(y, x, upstream)[0] for y in (ours, theirs)))
    with torch.no_grad():
        assert torch.equal(made(x), theirs)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_one_row_without_gradient(quant: str, dtype: torch.dtype) -> None:
    made, x = layer(quant, dtype=dtype), noise(1, 1, 128, dtype=dtype)
    exact = F.linear(x.double(), values(made, torch.float64), made.bias.double())
    with torch.no_grad():
        if dtype is torch.float64:
            assert relative_difference(made(x), exact) < LIMIT
        else:
            assert_within_budget("one row", made(x), exact, F.linear(x, values(made, dtype), made.bias))
    with_gradient = made(x.requires_grad_())
    assert torch.autograd.grad(with_gradient.sum(), x)[0].any()


@pytest.mark.parametrize("quant", QUANTS)
def test_a_backward_keeps_the_bits_and_nothing_else(quant: str) -> None:
    """Saved through autograd, so that checkpointing drops them, and without copies."""
    made, x = layer(quant), noise(7, 128).requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = made(x)
    assert [tensor.data_ptr() for tensor in kept] == [tensor.data_ptr() for tensor in made.packed()]
    wanted = noise(7, 160, seed=3) @ values(made, torch.float32)
    for name, tensor in [*made.named_parameters(), *made.named_buffers()]:  # as streaming does after a forward
        empty = tensor.new_empty(0)
        made._parameters[name] = nn.Parameter(empty, requires_grad=False) if name in made._parameters else None
        if name in made._buffers:
            made._buffers[name] = empty
    del tensor
    (gradient,) = torch.autograd.grad(y, x, noise(7, 160, seed=3))
    assert torch.equal(gradient, wanted)
    watched = [weakref.ref(tensor) for tensor in kept]
    kept.clear()
    del y
    assert not any(ref() is not None for ref in watched)


@pytest.mark.parametrize("quant", QUANTS)
def test_under_checkpointing_nothing_is_kept_and_gradients_are_the_same(quant: str) -> None:
    made, x = layer(quant), noise(7, 128).requires_grad_()
    (wanted,) = torch.autograd.grad(made(x).sum(), x)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = checkpoint(made, x, use_reentrant=False)
    assert not {tensor.data_ptr() for tensor in kept} & {tensor.data_ptr() for tensor in made.packed()}
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], wanted)


@pytest.mark.parametrize(("quant", "packed_bytes"), [("nf4", 0.5 + 1 / 64 + 4 / 64 / 256), ("int8", 1 + 4 / 512)])
def test_bytes(quant: str, packed_bytes: float) -> None:
    """Of the packed weight, and of the one unpacked weight in a forward and in a backward (NF4: with fp32 scales)."""
    made = layer(quant, (1024, 512), bias=False)
    weight = 1024 * 512
    assert sum(tensor.nbytes for tensor in made.packed()) == pytest.approx(packed_bytes * weight, abs=2000)
    x = noise(3, 512, dtype=torch.bfloat16).requires_grad_()
    with Ledger() as ledger:
        ledger.adopt([x, *made.packed()])
        before = ledger.card_bytes
        y = made(x)
        forward, kept = ledger.peak_card_bytes - before, ledger.card_bytes - before
        ledger.reset_peak()
        torch.autograd.grad(y, x, torch.ones_like(y))
        backward = ledger.peak_card_bytes - before
    assert kept == y.nbytes
    assert max(forward, backward) <= (2 + 4 / 64) * weight + 5 * (x.nbytes + y.nbytes) + 5000


@pytest.mark.parametrize("quant", QUANTS)
def test_packing_leaves_no_full_weight_behind(quant: str) -> None:
    made, weight = PackedLinear(512, 1024, False, quant), noise(1024, 512)
    with Ledger() as ledger:
        made.pack(weight)
        assert ledger.card_bytes == weight.nbytes + sum(tensor.nbytes for tensor in made.packed())
    with pytest.raises(ValueError, match=r"a weight of \[512, 1024\] for a layer of \[1024, 512\]"):
        made.pack(weight.t())


@pytest.mark.parametrize("quant", QUANTS)
def test_a_cast_reaches_the_bias_alone(quant: str) -> None:
    made = layer(quant)
    before = [tensor.clone() for tensor in made.packed()]
    for cast in (made.to(torch.bfloat16), made.double(), made.half(), copy.deepcopy(made).to("cpu")):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(cast.packed(), before, strict=True))
    assert made.bias.dtype == torch.float16
    assert all(tensor.is_meta for tensor in made.to("meta").packed())


def test_from_bitsandbytes_shares_its_tensors_and_leaves_it_empty() -> None:
    theirs = bnb.nn.Linear4bit(128, 160, True, torch.float32, quant_type="nf4", device="meta")
    theirs.weight = bnb.nn.Params4bit(noise(160, 128), requires_grad=False, quant_type="nf4", module=theirs).to("cpu")
    theirs.bias = nn.Parameter(noise(160), requires_grad=False)
    x, state, bits = noise(3, 128), theirs.weight.quant_state, weakref.ref(theirs.weight)
    wanted = F.linear(x, bnb.functional.dequantize_4bit(theirs.weight.data, state), theirs.bias)
    made = PackedLinear.from_bnb(theirs)
    assert made.absmax is state.absmax and made.nested_code is state.state2.code and type(made.weight) is nn.Parameter
    assert torch.equal(made(x), wanted) and bits() is None


@pytest.mark.parametrize(
    "settings", [{"quant_type": "fp4"}, {"compress_statistics": False}, {"blocksize": 128}], ids=str
)
def test_other_settings_of_bitsandbytes_are_refused(settings) -> None:
    theirs = bnb.nn.Linear4bit(128, 160, False, torch.float32, device="meta")
    arguments = {"quant_type": "nf4", "compress_statistics": True} | settings
    theirs.weight = bnb.nn.Params4bit(noise(160, 128), requires_grad=False, module=theirs, **arguments).to("cpu")
    with pytest.raises(LowmemError, match="is not NF4 with double quantisation"):
        PackedLinear.from_bnb(theirs)


# In a transformer with a LoRA.

CONFIG = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "rope_max_seq_len": 32,
}


def tuned(quant: str, dtype: torch.dtype = torch.float64):
    transformer = random_transformer(CONFIG, dtype, quant=quant.split()[0])
    set_products(transformer, quant == INTEGERS)
    for module in transformer.modules():
        if isinstance(module, PackedLinear):  # random weights of 0.02 would leave every gradient at the residual's
            module.pack(noise(*module.shape, seed=module.in_features) / 5)
    add_lora(transformer, rank=2, alpha=3.0)
    for found in lora_layers(transformer).values():  # fp32 on packed weights, whatever the rest is in
        for matrices in (found.lora_A, found.lora_B):
            matrices[ADAPTER].to(torch.promote_types(dtype, torch.float32))
    randomise_lora(transformer)
    return transformer


def gradients(layer_, call, x):
    x = x.clone().requires_grad_()
    y = call(layer_, x)
    lora = [matrices[ADAPTER].weight for matrices in (layer_.lora_A, layer_.lora_B)]
    return [y.detach(), *torch.autograd.grad(y, [x, *lora], noise(*y.shape, seed=1, dtype=y.dtype))]


@pytest.mark.parametrize("quant", [*QUANTS, INTEGERS])
@pytest.mark.parametrize("gelu", [False, True], ids=["plain", "gelu"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (63,)], ids=str)
def test_the_lean_lora_linear_is_pefts_on_the_same_bits(quant: str, gelu: bool, shape: tuple[int, ...]) -> None:
    transformer = tuned(quant)
    assert {type(found.base_layer) for found in lora_layers(transformer).values()} == {PackedLinear}
    for found in (transformer.blocks[0].attn1.to_q, transformer.blocks[0].ffn.net[2]):
        x = noise(*shape, found.in_features, dtype=torch.float64)
        ours = gradients(found, lambda module, x: linear(module, x, gelu), x)
        theirs = gradients(found, lambda module, x: module(F.gelu(x, approximate="tanh") if gelu else x), x)
        assert all(relative_difference(a, b) < LIMIT for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("quant", [*QUANTS, INTEGERS])
def test_the_lean_lora_linear_keeps_its_input_and_the_bits(quant: str) -> None:
    transformer = tuned(quant, torch.bfloat16)
    found = transformer.blocks[0].ffn.net[2]
    x = noise(50, 32, dtype=torch.bfloat16).requires_grad_()
    kept: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.update({tensor.data_ptr(): tensor.nbytes}) or tensor, lambda tensor: tensor
    ):
        y = linear(found, x, gelu=True)
    lora = [matrices[ADAPTER].weight for matrices in (found.lora_A, found.lora_B)]
    for tensor in (x, *lora, *found.base_layer.packed()):
        assert kept.pop(tensor.data_ptr()) == tensor.nbytes
    assert list(kept.values()) == [50 * 2 * 2]  # A u
    y.sum().backward()
    assert x.grad.isfinite().all()


def test_products_of_integers_are_those_of_the_values_up_to_rounding() -> None:
    """Forward and backward, and the LoRA's own gradients, whose products are as always: those at B from the very same
    numbers."""
    exact, rounded = tuned("int8"), tuned(INTEGERS)
    x = noise(50, 24, dtype=torch.float64)
    wanted, got = (gradients(model.blocks[0].attn1.to_q, linear, x) for model in (exact, rounded))
    for a, b in zip(got[:2], wanted[:2], strict=True):
        assert 1e-4 < relative_difference(a, b) < 0.02
    assert all(torch.equal(a, b) for a, b in zip(got[2:], wanted[2:], strict=True))
    set_products(rounded, False)
    again = gradients(rounded.blocks[0].attn1.to_q, linear, x)
    assert all(torch.equal(a, b) for a, b in zip(again, wanted, strict=True))


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_lora_on_packed_weights(quant: str, dtype: torch.dtype) -> None:
    """Its dtype, its scale, removing and attaching it, bit by bit."""
    transformer = random_transformer(CONFIG, dtype, quant=quant)
    x, text = tiny_latents(1, dtype=torch.float32), tiny_condition(1, torch.float32)
    base = as_velocity(transformer)(x, 0.5, text)
    add_lora(transformer, rank=2, alpha=3.0)
    assert {p.dtype for p in lora_parameters(transformer)} == {torch.float32}
    assert torch.equal(as_velocity(transformer)(x, 0.5, text), base)
    randomise_lora(transformer)
    state, said = lora_state(transformer), as_velocity(transformer)(x, 0.5, text)
    assert not torch.equal(said, base)
    with lora_scale(transformer, 0):
        assert torch.equal(as_velocity(transformer)(x, 0.5, text), base)
    remove_lora(transformer)
    assert torch.equal(as_velocity(transformer)(x, 0.5, text), base)
    attach_lora(transformer, LoraChanges.from_state(state, 3.0))
    assert torch.equal(as_velocity(transformer)(x, 0.5, text), said)


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("slices", [1, 5])
def test_lora_gradients_are_those_of_the_values_bitwise(quant: str, slices: int) -> None:
    """Against an unpacked transformer of exactly those values, checkpointed blocks and slices of tokens included."""
    packed, plain = tuned(quant), tuned("none")
    for name, module in packed.named_modules():
        if isinstance(module, PackedLinear):
            plain.get_submodule(name).weight.data = values(module, torch.float64)
    x, text = tiny_latents(1), tiny_condition(1)
    made = []
    for transformer in (packed, plain):
        set_activations(transformer, Activations(True, slices=slices))
        v = as_velocity(transformer)(x, 0.5, text)
        made.append(
            [v.detach(), *torch.autograd.grad(v, lora_parameters(transformer), noise(*v.shape, dtype=torch.float64))]
        )
    assert all(torch.equal(a, b) and bool(a.any()) for a, b in zip(*made, strict=True))
