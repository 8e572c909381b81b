"""A published LoRA merged into the base: our own exports there and back, and files in the ways that others write them."""

from __future__ import annotations

import copy
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from _tiny import randomise_lora, tiny_condition, tiny_latents, tiny_transformer
from safetensors.torch import save_file

from lowmem_drf.errors import BadInputError
from lowmem_drf.models.base_lora import merge_base_lora
from lowmem_drf.models.denoiser import as_velocity
from lowmem_drf.models.lora import add_lora, lora_state
from lowmem_drf.models.lora_formats import FORMATS, LoraFile, adapter_metadata, to_format

RANK, ALPHA = 3, 7.0


def quiet(text: str) -> None:
    raise AssertionError(text)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.fixture
def file(tmp_path):
    return tmp_path / "lora.safetensors"


@pytest.fixture(scope="module")
def trained():
    """A tiny transformer in fp64 with a LoRA that changes what it says, and the LoRA alone."""
    transformer = tiny_transformer(torch.float64)
    add_lora(transformer, RANK, ALPHA)
    randomise_lora(transformer)
    return transformer, {name: value.float() for name, value in lora_state(transformer).items()}


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("form", FORMATS)
def test_our_own_exports_merge_to_the_tuned_weights(trained, form: str, scale: float, file) -> None:
    _, state = trained
    save_file(to_format(state, ALPHA, RANK, form, torch.float32), file, metadata=adapter_metadata(state, ALPHA, RANK) if form == "diffusers" else None)
    base, merged = tiny_transformer(torch.float64), tiny_transformer(torch.float64)
    assert merge_base_lora(merged, str(file), quiet, scale) == len(state) / 2
    weights, before = dict(merged.named_parameters()), dict(base.named_parameters())
    deltas = LoraFile(state, ALPHA, {}).deltas()
    for name, value in weights.items():
        delta = deltas.get(name.removesuffix(".weight"), None) if name.endswith(".weight") else None
        if delta is None:
            assert torch.equal(value, before[name])
        else:
            # comfyui's file has alpha / rank multiplied into A, in fp32: two roundings of 2^-24 a term
            bound = scale * ALPHA / RANK * (state[name.replace(".weight", ".lora_B.weight")].abs() @ state[name.replace(".weight", ".lora_A.weight")].abs())
            assert (((value - before[name]) - scale * delta).abs() <= 4 * 2.0**-24 * bound.double() + 4 * torch.finfo(torch.float64).eps).all()


def test_the_merged_model_says_what_the_tuned_one_says(trained, file) -> None:
    tuned, state = trained
    save_file(to_format(state, ALPHA, RANK, "kohya", torch.float32), file)
    merged = tiny_transformer(torch.float64)
    merge_base_lora(merged, str(file), quiet)
    base = tiny_transformer(torch.float64)
    x, cond = tiny_latents(1), tiny_condition(1)
    said, wanted, before = (as_velocity(model)(x, 0.5, cond) for model in (merged, tuned, base))
    # the file's fp32 rounds the LoRA; what the LoRA does is far larger
    assert (said - wanted).abs().max() < 1e-4 * (wanted - before).abs().max()


def lightx2v(prefix: str = "diffusion_model.") -> dict[str, torch.Tensor]:
    """As lightx2v's step-distillation files: everywhere, ranks that differ, whole differences of biases, norms and modulations."""
    return {
        prefix + name: value
        for name, value in {
            "blocks.0.self_attn.q.lora_down.weight": noise(2, 24),
            "blocks.0.self_attn.q.lora_up.weight": noise(24, 2),
            "blocks.0.self_attn.q.alpha": torch.tensor(4.0),
            "blocks.0.self_attn.q.diff_b": noise(24),
            "blocks.1.ffn.2.lora_down.weight": noise(5, 32),
            "blocks.1.ffn.2.lora_up.weight": noise(24, 5),
            "blocks.0.norm3.diff": noise(24, seed=1),
            "blocks.0.norm3.diff_b": noise(24, seed=2),
            "blocks.0.self_attn.norm_q.diff": noise(24, seed=3),
            "blocks.0.diff_m": noise(1, 6, 24),
            "head.diff_m": noise(1, 2, 24),
            "head.head.diff": noise(16, 24),
            "head.head.diff_b": noise(16),
            "time_embedding.0.lora_down.weight": noise(2, 16),
            "time_embedding.0.lora_up.weight": noise(24, 2, seed=4),
            "text_embedding.2.diff_b": noise(24, seed=5),
            "time_projection.1.lora_down.weight": noise(2, 24, seed=6),
            "time_projection.1.lora_up.weight": noise(144, 2),
            "patch_embedding.lora_down.weight": noise(3, 4, 1, 2, 2),
            "patch_embedding.lora_up.weight": noise(24, 3, 1, 1, 1),
            "patch_embedding.diff_b": noise(24, seed=7),
        }.items()
    }


def product(tensors, stem: str) -> torch.Tensor:
    down, up = (tensors[f"diffusion_model.{stem}.lora_{side}.weight"].flatten(1) for side in ("down", "up"))
    return up @ down


def test_what_lightx2v_writes(file) -> None:
    tensors = lightx2v()
    save_file(tensors, file)
    base, merged = (dict(tiny_transformer().named_parameters()) for _ in range(2))
    transformer = tiny_transformer()
    merged = dict(transformer.named_parameters())
    of = {name.removeprefix("diffusion_model."): value for name, value in tensors.items()}
    wanted = {
        "blocks.0.attn1.to_q.weight": 2.0 * product(tensors, "blocks.0.self_attn.q"),
        "blocks.0.attn1.to_q.bias": of["blocks.0.self_attn.q.diff_b"],
        "blocks.1.ffn.net.2.weight": product(tensors, "blocks.1.ffn.2"),
        "blocks.0.norm2.weight": of["blocks.0.norm3.diff"],
        "blocks.0.norm2.bias": of["blocks.0.norm3.diff_b"],
        "blocks.0.attn1.norm_q.weight": of["blocks.0.self_attn.norm_q.diff"],
        "blocks.0.scale_shift_table": of["blocks.0.diff_m"],
        "scale_shift_table": of["head.diff_m"],
        "proj_out.weight": of["head.head.diff"],
        "proj_out.bias": of["head.head.diff_b"],
        "condition_embedder.time_embedder.linear_1.weight": product(tensors, "time_embedding.0"),
        "condition_embedder.text_embedder.linear_2.bias": of["text_embedding.2.diff_b"],
        "condition_embedder.time_proj.weight": product(tensors, "time_projection.1"),
        "patch_embedding.weight": product(tensors, "patch_embedding").reshape(24, 4, 1, 2, 2),
        "patch_embedding.bias": of["patch_embedding.diff_b"],
    }
    assert merge_base_lora(transformer, str(file), quiet) == len(wanted)
    for name, value in merged.items():
        assert torch.equal(value, base[name] + wanted[name] if name in wanted else base[name]), name


def test_a_weight_may_change_in_both_ways(file) -> None:
    tensors = {f"diffusion_model.head.head.{key}": value for key, value in {"lora_down.weight": noise(2, 24), "lora_up.weight": noise(16, 2)}.items()}
    save_file(tensors | {"diffusion_model.head.head.diff": noise(16, 24)}, file)
    base, transformer = tiny_transformer().proj_out.weight, tiny_transformer()
    assert merge_base_lora(transformer, str(file), quiet) == 1
    assert torch.equal(transformer.proj_out.weight, base + (product(tensors, "head.head") + noise(16, 24)))


def test_16_bit_weights_are_rounded_once(file) -> None:
    """The sum is made in fp32: a bf16 product would be lost in a bf16 weight."""
    tensors = lightx2v()
    save_file({name: value.bfloat16() for name, value in tensors.items()}, file)
    transformer = tiny_transformer(torch.bfloat16)
    base = copy.deepcopy(transformer)
    merge_base_lora(transformer, str(file), quiet)
    rounded = {name: value.bfloat16().float() for name, value in tensors.items()}
    wanted = (base.blocks[1].ffn.net[2].weight.float() + product(rounded, "blocks.1.ffn.2")).bfloat16()
    assert transformer.blocks[1].ffn.net[2].weight.dtype == torch.bfloat16 and torch.equal(transformer.blocks[1].ffn.net[2].weight, wanted)


def without(tensors: dict, *names: str) -> dict:
    return {name: value for name, value in tensors.items() if not name.endswith(names)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (lightx2v() | {"diffusion_model.blocks.9.self_attn.q.diff_b": noise(24)}, r"1 of its tensors .*blocks\.9\.self_attn\.q\.diff_b"),
        (lightx2v() | {"diffusion_model.blocks.0.self_attn.q.dora_scale": noise(24)}, r"self_attn\.q\.dora_scale"),
        (lightx2v() | {"diffusion_model.blocks.0.cross_attn.k_img.diff_b": noise(24)}, r"cross_attn\.k_img\.diff_b"),
        (lightx2v() | {"lora_te_text_model.lora_up.weight": noise(24, 2)}, "lora_te_text_model"),
        (without(lightx2v(), "blocks.1.ffn.2.lora_up.weight"), r"half a pair for blocks\.1\.ffn\.net\.2"),
        (lightx2v() | {"diffusion_model.blocks.1.ffn.2.lora_up.weight": noise(48, 5)}, r"pair for blocks\.1\.ffn\.net\.2 is \[48, 5\] x \[5, 32\]"),
        (lightx2v() | {"diffusion_model.head.head.diff_b": noise(8)}, r"diff_b is \[8\], and the model's proj_out\.bias is \[16\]"),
        (lightx2v() | {"diffusion_model.blocks.0.self_attn.norm_q.diff_b": noise(24)}, r"norm_q\.bias is not there"),
        (lightx2v() | {"diffusion_model.head.head.diff_b": torch.full((16,), float("nan"))}, "holds NaN"),
        ({}, "it holds nothing"),
    ],
    ids=["block", "dora", "image", "text encoder", "half", "shape", "bias", "no bias", "nan", "empty"],
)
def test_what_cannot_be_used_is_named_and_nothing_is_changed(tensors, message: str, file) -> None:
    save_file(tensors, file)
    transformer, base = tiny_transformer(), tiny_transformer().state_dict()
    with pytest.raises(BadInputError, match=message):
        merge_base_lora(transformer, str(file), quiet)
    assert all(torch.equal(value, base[name]) for name, value in transformer.state_dict().items())


def test_an_alpha_of_single_modules_in_the_header(trained, file) -> None:
    _, state = trained
    header = adapter_metadata(state, ALPHA, RANK)
    ((key, text),) = header.items()
    tensors = to_format(state, ALPHA, RANK, "diffusers", torch.float32)
    save_file(tensors, file, metadata={key: text.replace('"transformer.alpha_pattern": {}', '"transformer.alpha_pattern": {"blocks.0.attn1.to_q": 1}')})
    with pytest.raises(BadInputError, match=r"blocks\.0\.attn1\.to_q"):
        merge_base_lora(tiny_transformer(), str(file), quiet)
    save_file(tensors, file, metadata={key: "{"})
    with pytest.raises(BadInputError, match="header is damaged"):
        merge_base_lora(tiny_transformer(), str(file), quiet)


@pytest.mark.parametrize("source", ["someone/loras/sub/distill.safetensors", "someone/loras:sub/distill.safetensors"])
def test_from_the_hub(source: str, file, tmp_path, monkeypatch) -> None:
    save_file(lightx2v(), file)
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))

    def download(repository: str, name: str) -> str:
        assert (repository, name) == ("someone/loras", "sub/distill.safetensors")
        cache.mkdir()
        return shutil.copy(file, cache / "distill.safetensors")

    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename="sub/distill.safetensors", size=738_000_000)])
    monkeypatch.setattr(huggingface_hub, "model_info", lambda repository, files_metadata: info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    said = []
    assert merge_base_lora(tiny_transformer(), source, said.append) == 15
    assert said[0].startswith("someone/loras: 0.7 GB to download")


@pytest.mark.parametrize("source", ["no/such/file.pt", "nothing", "/no/such/lora.safetensors"])
def test_what_there_is_not(source: str) -> None:
    with pytest.raises(BadInputError, match="neither a file nor owner/repo/file"):
        merge_base_lora(tiny_transformer(), source, quiet)
