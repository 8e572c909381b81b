"""LoRA on the Wan transformer: reproducible start, exact state round trip, refusal of another model's file."""

from __future__ import annotations

import pytest
import torch
from _tiny import randomise_lora, tiny_condition, tiny_latents, tiny_transformer

from lowmem_drf.errors import BadInputError, LowmemError
from lowmem_drf.models.lora.adapter import (
    ADAPTER,
    add_lora,
    attach_lora,
    load_lora_state,
    lora_layers,
    lora_parameters,
    lora_scale,
    lora_state,
    remove_lora,
)
from lowmem_drf.models.lora.changes import LoraChanges
from lowmem_drf.models.wan.denoiser import as_velocity


def run(transformer) -> torch.Tensor:
    dtype = transformer.patch_embedding.weight.dtype
    with torch.no_grad():
        return as_velocity(transformer)(tiny_latents(1, dtype=dtype), 0.5, tiny_condition(1, dtype))


def trained(dtype: torch.dtype = torch.float32, rank: int = 2, alpha: float = 4.0, **kwargs):
    transformer = tiny_transformer(dtype)
    add_lora(transformer, rank=rank, alpha=alpha, **kwargs)
    randomise_lora(transformer)
    return transformer


def test_a_fresh_adapter_changes_nothing_and_only_it_trains() -> None:
    base = run(tiny_transformer())
    transformer = tiny_transformer()
    add_lora(transformer, rank=3, alpha=3.0)
    assert torch.equal(run(transformer), base)
    assert len(lora_layers(transformer)) == 2 * (4 + 4 + 2)
    trainable = {id(p) for p in transformer.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in lora_parameters(transformer)}
    assert {p.dtype for p in lora_parameters(transformer)} == {torch.float32}


def test_start_depends_on_the_seed_alone() -> None:
    states = []
    for seed, disturb in [(1, 0), (1, 99), (2, 0)]:
        torch.manual_seed(disturb)
        transformer = tiny_transformer()
        add_lora(transformer, rank=2, alpha=2.0, seed=seed)
        states.append(lora_state(transformer))
    first, again, other = states
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_master_weights_are_fp32_on_a_bf16_base() -> None:
    transformer = trained(torch.bfloat16)
    assert {p.dtype for p in lora_parameters(transformer)} == {torch.float32}
    assert torch.isfinite(run(transformer)).all()


def test_gradient_reaches_every_adapter_matrix() -> None:
    transformer = trained(torch.float64)
    as_velocity(transformer)(tiny_latents(1), 0.5, tiny_condition(1)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in lora_parameters(transformer))


def test_state_round_trip_is_exact() -> None:
    transformer = trained()
    state = lora_state(transformer)
    assert all(name.startswith("blocks.") and name.endswith((".lora_A.weight", ".lora_B.weight")) for name in state)
    other = tiny_transformer()
    add_lora(other, rank=2, alpha=4.0, seed=5)
    load_lora_state(other, state)
    attached = tiny_transformer()
    attach_lora(attached, LoraChanges.from_state(state, 4.0))
    assert torch.equal(run(other), run(transformer)) and torch.equal(run(attached), run(transformer))
    state["blocks.0.attn1.to_q.lora_A.weight"].zero_()
    assert lora_parameters(transformer)[0].abs().max() > 0, "lora_state must copy"


def test_attach_takes_the_modules_of_the_file() -> None:
    transformer = trained(targets=["attn1.to_q", "ffn.net.2"])
    attached = tiny_transformer()
    attach_lora(attached, LoraChanges.from_state(lora_state(transformer), 4.0))
    assert lora_layers(attached).keys() == lora_layers(transformer).keys() and len(lora_layers(attached)) == 4
    assert torch.equal(run(attached), run(transformer))


def test_scale_is_linear_and_restored() -> None:
    transformer, base = trained(torch.float64), run(tiny_transformer(torch.float64))
    full = run(transformer)
    with lora_scale(transformer, 0):
        assert torch.equal(run(transformer), base)
    with lora_scale(transformer, 0.5):
        half = run(transformer)
        with lora_scale(transformer, 2.0):
            assert torch.equal(run(transformer), full)
    assert not torch.equal(half, full) and not torch.equal(half, base)
    assert torch.equal(run(transformer), full)
    halved = tiny_transformer(torch.float64)
    attach_lora(halved, LoraChanges.from_state(lora_state(transformer), 2.0))
    assert torch.equal(run(halved), half)


def test_scale_is_restored_after_an_error() -> None:
    transformer = trained()
    full = run(transformer)
    with pytest.raises(RuntimeError, match="inside"), lora_scale(transformer, 0):
        raise RuntimeError("inside")
    assert torch.equal(run(transformer), full)


def test_remove_gives_the_base_back() -> None:
    transformer = trained()
    remove_lora(transformer)
    assert torch.equal(run(transformer), run(tiny_transformer()))
    add_lora(transformer, rank=1, alpha=1.0)


def bad_states() -> dict[str, tuple[dict[str, torch.Tensor], str]]:
    good = lora_state(trained())
    first = next(iter(good))
    return {
        "missing": ({k: v for k, v in good.items() if ".attn1." in k and "lora_A" in k}, "missing"),
        "unknown": (
            {
                **good,
                "blocks.7.attn1.to_q.lora_A.weight": good[first],
                "blocks.7.attn1.to_q.lora_B.weight": good[first],
            },
            "no LoRA module of this model",
        ),
        "rank": (lora_state(trained(rank=3)), "another rank"),
        "width": (
            {k: torch.cat([v, v], 1) if k.endswith("to_q.lora_A.weight") else v for k, v in good.items()},
            "another rank or width",
        ),
        "nan": ({**good, first: torch.full_like(good[first], float("nan"))}, "NaN"),
        "empty": ({}, "missing"),
    }


@pytest.mark.parametrize("name", ["missing", "unknown", "rank", "width", "nan", "empty"])
def test_another_models_state_is_refused_untouched(name: str) -> None:
    state, reason = bad_states()[name]
    transformer = trained()
    before = lora_state(transformer)
    with pytest.raises(BadInputError, match=reason) as error:
        load_lora_state(transformer, state)
    assert error.value.exit_code == 2
    assert all(torch.equal(before[k], v) for k, v in lora_state(transformer).items())


@pytest.mark.parametrize("name", ["missing", "unknown", "width"])
def test_attach_refuses_and_leaves_no_adapter(name: str) -> None:
    transformer = tiny_transformer()
    with pytest.raises(BadInputError):
        attach_lora(transformer, LoraChanges.from_state(bad_states()[name][0], 4.0))
    assert not lora_layers(transformer)


@pytest.mark.parametrize(
    "settings",
    [
        dict(rank=0, alpha=1.0),
        dict(rank=2, alpha=0.0),
        dict(rank=2, alpha=1.0, targets=["to_q", "to_qq"]),
        dict(rank=2, alpha=1.0, targets=[]),
        dict(rank=2, alpha=1.0, targets=["to_q"], ranks={"to_v": 3}),
    ],
)
def test_bad_settings_are_refused(settings) -> None:
    with pytest.raises(BadInputError, match="lora"):
        add_lora(tiny_transformer(), **settings)


def test_layers_of_other_ranks_have_the_same_alpha() -> None:
    transformer = tiny_transformer()
    add_lora(transformer, rank=2, alpha=3.0, targets=["to_q", "to_v"], ranks={"attn2.to_q": 1, "blocks.1.*": 5})
    found = {name: (layer.r[ADAPTER], layer.scaling[ADAPTER]) for name, layer in lora_layers(transformer).items()}
    assert found["blocks.0.attn1.to_q"] == found["blocks.0.attn2.to_v"] == (2, 1.5)
    assert found["blocks.0.attn2.to_q"] == found["blocks.1.attn2.to_q"] == (1, 3.0)  # the first pattern that fits
    assert found["blocks.1.attn1.to_v"] == (5, 0.6)


def test_two_adapters_are_refused() -> None:
    with pytest.raises(LowmemError, match="already"):
        add_lora(trained(), rank=2, alpha=2.0)
