"""NF4 critics: which layers are quantised, and gradients equal to those of the dequantised weights."""

from __future__ import annotations

import sys

import bitsandbytes as bnb
import pytest
import torch
from _critic import FAMILIES, clips, questions
from _tiny import SavedBytes, save_tiny_critic
from torch import nn
from transformers import BitsAndBytesConfig

from lowmem_drf.errors import BadInputError, LowmemError
from lowmem_drf.models.qwen_vl.critic import load_critic
from lowmem_drf.models.weights import quant
from lowmem_drf.models.weights.packed_linear import PackedLinear, unpack
from lowmem_drf.models.weights.quant import check_quantised

WIDTH = 96
"""The intermediate size is 128: more than a block of 64 in a row."""


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return save_tiny_critic(tmp_path_factory.mktemp("nf4"), family=request.param, width=WIDTH)


def linears(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def dequantised(folder, dtype: torch.dtype):
    """A 16- or 32-bit critic with the dequantised weights of the NF4 one."""
    plain, small = load_critic(str(folder), dtype), load_critic(str(folder), dtype, quant="nf4")
    modules = dict(small.model.named_modules())
    with torch.no_grad():
        for name, module in linears(plain.model).items():
            if isinstance(modules[name], PackedLinear):
                module.weight.copy_(unpack("nf4", modules[name].shape, modules[name].packed(), dtype))
    return plain


def gradient(critic, frames, asked):
    answers = [a for clip in critic(frames, asked) for a in clip]
    loss = sum(a.logits_AV.log_softmax(-1).gather(-1, a.target_A[:, None]).mean() for a in answers)
    return torch.autograd.grad(loss, frames)[0], torch.cat([a.logits_AV for a in answers])


def test_what_is_quantised(folder) -> None:
    critic = load_critic(str(folder), torch.bfloat16, quant="nf4")
    found = linears(critic.model)
    inside = {name for name in found if name.startswith("model.language_model.layers.")}
    assert len(inside) == 2 * 7 and {name for name, m in found.items() if isinstance(m, PackedLinear)} == inside
    assert {found[name].weight.dtype for name in inside} == {torch.uint8}
    assert {found[name].quant for name in inside} == {"nf4"}
    assert not any(isinstance(m, bnb.nn.Linear4bit) for m in critic.model.modules())
    rest = [p for name, p in critic.model.named_parameters() if name.removesuffix(".weight") not in inside]
    assert len(rest) > 30 and {p.dtype for p in rest} == {torch.bfloat16}
    assert not any(p.requires_grad for p in critic.model.parameters()) and not critic.model.training


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_is_that_of_the_values_the_bits_stand_for(folder, dtype: torch.dtype, checkpointing: bool) -> None:
    """The bound is twice the rounding error of the critic with the dequantised weights (fp32 against fp64; bf16 against
    fp32)."""
    exact = dequantised(folder, dtype)
    small = load_critic(str(folder), dtype, quant="nf4")
    small.set_checkpointing(checkpointing)
    frames, asked = clips(2, dtype=dtype), [questions(5), questions(2)]
    got, logits = gradient(small, frames, asked)
    wanted, wanted_logits = gradient(exact, frames, asked)
    exact.model.to(torch.promote_types(dtype, torch.float32) if dtype is torch.bfloat16 else torch.float64)
    finer = exact.model.dtype
    truth, true_logits = gradient(exact, frames.detach().to(finer).requires_grad_(), asked)
    assert got.isfinite().all() and (got.abs().amax(dim=(0, 2, 3, 4)) > 0).all()
    for ours, theirs, true in ((logits, wanted_logits, true_logits), (got, wanted, truth)):
        budget = 2 * (theirs.to(finer) - true).norm() + torch.finfo(dtype).eps * true.norm()
        assert (ours.to(finer) - true).norm() <= budget


def test_it_is_not_the_unquantised_critic(folder) -> None:
    """Its gradient differs, but is closer to the unquantised one than to that of another clip."""
    frames, asked = clips(2, dtype=torch.float32), [questions(5)] * 2
    got, _ = gradient(load_critic(str(folder), quant="nf4"), frames, asked)
    wanted, _ = gradient(load_critic(str(folder)), frames, asked)
    cosines = nn.functional.normalize(got.flatten(1), dim=1) @ nn.functional.normalize(wanted.flatten(1), dim=1).T
    assert not torch.equal(got, wanted)
    assert (cosines.diagonal() > cosines.fliplr().diagonal().abs()).all()


def test_its_weights_cost_no_activation_memory(folder) -> None:
    """A frozen 4-bit layer saves its packed weight for the backward, where a plain one saves the full weight."""
    frames, asked = clips(1, dtype=torch.float32), [questions(5)]
    kept = {}
    for name in ("none", "nf4"):
        critic = load_critic(str(folder), quant=name)
        with SavedBytes(critic.model) as saved:
            critic(frames, asked)
        kept[name] = saved.total
    assert 0 < kept["nf4"] <= kept["none"]


def test_a_forward_without_gradient_changes_nothing_for_the_next_one_with_it(folder) -> None:
    """On processors with AVX512-BF16 bitsandbytes' own module would repack the weights then, and the gradient would
    silently be cut."""
    critic, frames, asked = load_critic(str(folder), quant="nf4"), clips(1, dtype=torch.float32), [questions(3)]
    before, _ = gradient(critic, frames, asked)
    said = critic.generate("red?", frames[0], 3)
    after, _ = gradient(critic, frames, asked)
    assert said == critic.generate("red?", frames[0], 3)
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (lambda patch: patch.setattr(quant, "KEPT", ["visual", "lm_head"]), "model.visual.blocks.0"),
        (lambda patch: patch.setattr(quant, "KEPT", ["model.visual"]), "lm_head is quantised"),
        (
            lambda patch: patch.setattr(quant, "KEPT", [*quant.KEPT, "mlp.up_proj"]),
            "layers.0.mlp.up_proj is torch.float32, and should be NF4",
        ),
    ],
    ids=["the spelling that skips nothing", "head", "a layer left out"],
)
def test_what_is_not_as_it_should_be_is_named(spoil, name: str, folder, monkeypatch) -> None:
    spoil(monkeypatch)
    with pytest.raises(LowmemError, match=name) as caught:
        load_critic(str(folder), quant="nf4")
    assert not isinstance(caught.value, BadInputError)


@pytest.mark.parametrize(
    "settings", [{"bnb_4bit_quant_type": "fp4"}, {"bnb_4bit_use_double_quant": False}], ids=["fp4", "one quantisation"]
)
def test_other_4_bit_settings_are_not_taken_for_nf4(folder, settings, monkeypatch) -> None:
    usual = quant.loading_arguments

    def other(*arguments):
        made = usual(*arguments)
        return made | {"quantization_config": BitsAndBytesConfig(**made["quantization_config"].to_dict() | settings)}

    monkeypatch.setattr(quant, "loading_arguments", other)
    with pytest.raises(LowmemError, match=r"layers.0.self_attn.q_proj is not NF4 with double quantisation"):
        load_critic(str(folder), quant="nf4")


def test_8_bit_layers_are_not_taken_for_nf4(folder) -> None:
    critic = load_critic(str(folder), quant="nf4")
    layer = critic.model.model.language_model.layers[1].mlp
    layer.down_proj = PackedLinear(layer.down_proj.in_features, layer.down_proj.out_features, False, "int8")
    with pytest.raises(LowmemError, match="layers.1.mlp.down_proj is INT8"):
        check_quantised(critic.model, "nf4", quant.in_critic)


def test_a_checkpoint_that_is_quantised_already(folder, tmp_path) -> None:
    arguments = quant.loading_arguments("nf4", torch.float32, "cpu", already=False)
    cls = type(load_critic(str(folder)).model)
    cls.from_pretrained(folder, dtype=torch.float32, **arguments).save_pretrained(tmp_path)
    for file in folder.iterdir():
        if not (tmp_path / file.name).exists():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(BadInputError, match="quantised already"):
        load_critic(str(tmp_path))
    frames, asked = clips(1, dtype=torch.float32), [questions(3)]
    first, again = (gradient(load_critic(str(place), quant="nf4"), frames, asked)[0] for place in (folder, tmp_path))
    assert torch.equal(first, again)
    again = load_critic(str(tmp_path), torch.bfloat16, quant="nf4")
    assert {p.dtype for p in again.model.parameters()} == {torch.bfloat16, torch.uint8}
    assert again(clips(1, dtype=torch.bfloat16), [questions(1)])[0][0].logits_AV.isfinite().all()


def test_without_bitsandbytes(folder, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(BadInputError, match="critic.quant=none"):
        load_critic(str(folder), quant="nf4")


def test_unknown_quantisation(folder) -> None:
    with pytest.raises(BadInputError, match="'none' or 'nf4'"):
        load_critic(str(folder), quant="int3")
