"""The report on a LoRA file: norms without the product, the model from the shapes, facts from the header."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from lowmem_drf.commands.inspect_lora import inspect_command
from lowmem_drf.models.generators import KNOWN_GENERATORS, generator_config
from lowmem_drf.models.lora.changes import Difference, Dora, Factors, LoraChanges, Pair
from lowmem_drf.models.lora.report import change_norm, make_report, training_facts, written_by
from lowmem_drf.models.wan import family as wan
from lowmem_drf.models.wan.random_generator import empty_transformer
from lowmem_drf.models.weights.reader import parameter_shapes


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.mark.parametrize(
    "change",
    [
        Pair(random(3, 20), random(12, 3), 6.0),
        Pair(random(3, 20) * 1e-30, random(12, 3) * 1e-30, 6.0),  # their squares are 0 in fp32
        Pair(random(30, 20), random(12, 30), 6.0),
        Pair(random(2, 5, 1, 2, 2), random(12, 2), 1.0),
        Difference(random(12, 20), 0.5),
        Factors((random(3, 4),), (random(4, 2), random(2, 5)), 2.0, "LoKr"),
        Factors((random(12, 2), random(2, 20)), (random(12, 2, seed=1), random(2, 20, seed=1)), 0.25, "LoHa"),
    ],
    ids=["pair", "tiny pair", "large rank", "convolution", "difference", "LoKr", "LoHa"],
)
def test_the_norm_of_a_change_is_that_of_its_product(change) -> None:
    whole = change(torch.zeros(12, 20, dtype=torch.float64))
    assert change_norm(change) == pytest.approx(whole.norm().item(), rel=1e-6)


def test_the_norm_of_dora_is_not_known_without_the_model() -> None:
    assert change_norm(Dora(Pair(random(3, 20), random(12, 3), 3.0), torch.ones(12))) is None


@pytest.mark.parametrize("model", ["toyworld", "Wan-AI/Wan2.2-TI2V-5B-Diffusers"])
def test_shapes_without_a_model_are_those_of_the_model(model: str) -> None:
    config = generator_config(model).transformer
    assert wan.parameter_shapes(config) == parameter_shapes(empty_transformer(config))


def lora_of(model: str, names: tuple[str, ...], rank: int = 1) -> LoraChanges:
    """A LoRA on some modules of a published model; no numbers are held."""
    shapes = wan.parameter_shapes(generator_config(model).transformer)
    nothing = torch.zeros(1)
    sizes = {name: shapes[f"{name}.weight"] for name in names}
    return LoraChanges(
        {n: Pair(nothing.expand(rank, into), nothing.expand(out, rank), 1.0) for n, (out, into) in sizes.items()}
    )


@pytest.mark.parametrize(
    ("model", "fits"),
    [
        ("toyworld", ["toyworld"]),
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", ["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"]),
        ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", ["Wan-AI/Wan2.2-TI2V-5B-Diffusers"]),
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", [name for name in KNOWN_GENERATORS if "14B" in name]),
    ],
)
def test_the_model_is_told_from_the_shapes(model: str, fits: list[str], tmp_path) -> None:
    save_file({"any": torch.zeros(1)}, tmp_path / "any.safetensors")
    report = make_report(tmp_path / "any.safetensors", lora_of(model, ("blocks.0.ffn.net.2", "blocks.2.attn2.to_k")))
    assert (list(report.models), report.blocks) == (fits, (0, 2))
    assert report.total_blocks == generator_config(model).transformer["num_layers"]


def test_the_header_tells_the_training_without_prompts_and_in_short_lines() -> None:
    header = {
        "ss_base_model_version": "wan2.1",
        "ss_network_module": "networks.lora_wan",
        "ss_sample_prompts": "a secret",
        "ss_learning_rate": "None",
        "modelspec.title": "style\n\n " * 100,
    }
    facts = training_facts(header)
    assert facts.keys() == {"title", "base_model"} and facts["base_model"] == "wan2.1"
    assert len(facts["title"]) == 100 and "\n" not in facts["title"]
    assert written_by(header, "kohya") == "musubi-tuner"
    assert written_by({"software": '{"name": "ai-toolkit", "version": "0.3"}', "ss_x": "1"}, "") == "ai-toolkit 0.3"
    assert written_by({"software": "[[["}, "") == "[[[" and written_by({}, "ComfyUI") == ""


@pytest.fixture
def uneven(tmp_path):
    """A file for ToyWorld: two ranks, an alpha, one module unchanged, a bias, a text encoder."""
    stem, made = "diffusion_model.blocks", dict[str, torch.Tensor]()
    for i, rank in ((0, 2), (1, 4)):
        for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o"):
            made[f"{stem}.{i}.{name}.lora_down.weight"] = torch.ones(rank, 128)
            made[f"{stem}.{i}.{name}.lora_up.weight"] = torch.full((128, rank), float(name != "self_attn.o"))
            made[f"{stem}.{i}.{name}.alpha"] = torch.tensor(2.0)
    made[f"{stem}.3.ffn.0.diff_b"] = torch.ones(512)
    made["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"] = torch.ones(4, 2)
    path = tmp_path / "uneven.safetensors"
    save_file(made, path, metadata={"modelspec.license": "\x1b[31mme"})
    return path


def test_the_table_says_what_is_odd(uneven, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    inspect_command(uneven, as_json=False)
    said = capsys.readouterr().out
    for part in (
        "LoRA with 1 plain difference,",
        "ToyWorld (width 128, 4 blocks)",
        "2 to 4, alpha 2, scale 0.5 to 1",
        "self-attention of 2 of 4 blocks (0-1); in the blocks also: biases (1)",
        "text encoder: 1 tensor (lora_te",
        "2 of 9 changes are zero (blocks.0.attn1.to_out.0",
        "blocks.0.attn1.to_k, by 256",  # 128 x 128 numbers of 2
    ):
        assert part in " ".join(said.split()), said
    assert "\x1b" not in said and "?[31mme" in said


def test_json_is_the_contract(uneven, capsys) -> None:
    inspect_command(uneven, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert set(told) == {
        *("file", "bytes", "kinds", "layout", "written_by", "model", "ranks", "alphas", "scales", "layers", "norms"),
        *("unchanged", "dtypes", "parameters", "left_out", "programs", "training"),
    }
    assert told["model"] == {"fits": ["toyworld"], "width": 128, "blocks": 4, "changed_blocks": [0, 1, 3]}
    assert (told["ranks"], told["scales"], told["kinds"]) == (
        {"2": 4, "4": 4},
        [0.5, 1.0],
        {"LoRA": 8, "difference": 1},
    )
    assert told["norms"]["blocks.0.attn1.to_q.weight"] == 256.0 and told["norms"]["blocks.3.ffn.net.0.proj.bias"] > 22
    assert {row["program"] for row in told["programs"]} == {
        *("sample --lora", "model.base_lora", "train --init-lora", "ComfyUI", "diffusers", "musubi-tuner")
    }
