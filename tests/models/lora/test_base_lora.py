"""A published LoRA merged into the base: our own exports, and files as other tools write them."""

from __future__ import annotations

import shutil

import huggingface_hub
import pytest
import torch
from _tiny import randomise_lora, tiny_condition, tiny_latents, tiny_transformer
from huggingface_hub import DryRunFileInfo
from safetensors.torch import save_file

from lowmem_drf.errors import BadInputError
from lowmem_drf.models.lora.adapter import add_lora, lora_state
from lowmem_drf.models.lora.base import base_changes
from lowmem_drf.models.lora.changes import LoraChanges
from lowmem_drf.models.lora.formats import FORMATS, adapter_metadata, to_format
from lowmem_drf.models.wan import family as wan
from lowmem_drf.models.wan.denoiser import as_velocity, load_denoiser
from lowmem_drf.models.weights.packed_linear import PackedLinear

RANK, ALPHA = 3, 7.0
SHAPES = {name: tuple(parameter.shape) for name, parameter in tiny_transformer().named_parameters()}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A folder with ``tiny_transformer`` in fp32."""
    folder = tmp_path_factory.mktemp("base")
    tiny_transformer().save_pretrained(folder / "transformer")
    return str(folder)


def merged_into(base: str, file, scale: float = 1.0, dtype: torch.dtype = torch.float32, **arguments):
    """The transformer loaded with the file's changes, and their number."""
    count, said = [], []

    def changes(shapes):
        found = base_changes([(str(file), scale)], shapes, said.append)
        count.append(len(found))
        return found

    return load_denoiser(base, dtype, changes=changes, **arguments), *count


def quiet(text: str) -> None:
    raise AssertionError(text)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.fixture
def file(tmp_path):
    return tmp_path / "lora.safetensors"


@pytest.fixture(scope="module")
def trained():
    """A tiny transformer in fp64 with a LoRA that changes its output, and the LoRA."""
    transformer = tiny_transformer(torch.float64)
    add_lora(transformer, RANK, ALPHA)
    randomise_lora(transformer)
    return transformer, {name: value.float() for name, value in lora_state(transformer).items()}


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("form", FORMATS)
def test_our_own_exports_merge_to_the_tuned_weights(trained, form: str, scale: float, file, base: str) -> None:
    _, state = trained
    lora = LoraChanges.from_state(state, ALPHA)
    save_file(
        to_format(lora, form, torch.float32, wan),
        file,
        metadata=adapter_metadata(lora) if form == "diffusers" else None,
    )
    merged, count = merged_into(base, file, scale)
    assert count == len(state) / 2
    weights, before = dict(merged.named_parameters()), dict(tiny_transformer().named_parameters())
    for name, value in weights.items():
        module = name.removesuffix(".weight")
        delta = lora.delta(module) if module in lora.pairs else None
        if delta is None:
            assert torch.equal(value, before[name])
        else:
            # comfyui's file has alpha / rank multiplied into A; a sum of 3 products, two factors, and the sum with the
            # weight: 8 roundings of 2^-24
            b, a = (state[name.replace(".weight", f".lora_{side}.weight")].abs() for side in "BA")
            bound = scale * ALPHA / RANK * (b @ a) + before[name].abs()
            assert (
                ((value.double() - before[name].double()) - scale * delta.double()).abs()
                <= 8 * 2.0**-24 * bound.double()
            ).all()


def test_the_merged_model_says_what_the_tuned_one_says(trained, file, base: str) -> None:
    tuned, state = trained
    save_file(to_format(LoraChanges.from_state(state, ALPHA), "kohya", torch.float32, wan), file)
    merged, _ = merged_into(base, file)
    x, cond = tiny_latents(1), tiny_condition(1)
    said, wanted, before = (as_velocity(model.double())(x, 0.5, cond) for model in (merged, tuned, tiny_transformer()))
    # fp32 rounds the LoRA and the sum; what the LoRA does is far larger
    assert (said - wanted).abs().max() < 1e-4 * (wanted - before).abs().max()


def lightx2v(prefix: str = "diffusion_model.") -> dict[str, torch.Tensor]:
    """Like lightx2v's step-distillation files: all modules, different ranks, full differences of biases, norms and
    modulations."""
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


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_packed_weights_are_changed_before_they_are_packed(quant: str, file, base: str) -> None:
    """Changes to unpacked weights apply too."""
    save_file(lightx2v(), file)
    plain, packed = merged_into(base, file)[0], merged_into(base, file, quant=quant)[0]
    others = dict(packed.named_parameters())
    for name, value in plain.named_parameters():
        module = packed.get_submodule(name.rpartition(".")[0])
        if isinstance(module, PackedLinear) and name.endswith(".weight"):
            wanted = PackedLinear(module.in_features, module.out_features, False, quant)
            wanted.pack(value)
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(module.packed(), wanted.packed(), strict=True))
        else:
            assert torch.equal(others[name], value), name


def test_16_bit_weights_are_rounded_once(file, base: str) -> None:
    """The sum is computed in fp32: a bf16 weight would absorb a small bf16 product."""
    tensors = lightx2v()
    save_file({name: value.bfloat16() for name, value in tensors.items()}, file)
    merged, _ = merged_into(base, file, dtype=torch.bfloat16)
    rounded = {name: value.bfloat16().float() for name, value in tensors.items()}
    wanted = (tiny_transformer().blocks[1].ffn.net[2].weight + product(rounded, "blocks.1.ffn.2")).bfloat16()
    assert merged.blocks[1].ffn.net[2].weight.dtype == torch.bfloat16 and torch.equal(
        merged.blocks[1].ffn.net[2].weight, wanted
    )


def test_what_does_not_fit_is_named(file, base: str) -> None:
    """With the setting and the file; all other reasons: ``test_layouts``."""
    save_file(lightx2v() | {"diffusion_model.blocks.9.self_attn.q.diff_b": noise(24)}, file)
    with pytest.raises(BadInputError, match=r"this model has no blocks\.9\.attn1\.to_q\.bias") as caught:
        merged_into(base, file)
    assert str(caught.value).startswith(f"model.base_lora, {file}")


@pytest.mark.parametrize("source", ["someone/loras/sub/distill.safetensors", "someone/loras:sub/distill.safetensors"])
def test_from_the_hub(source: str, file, tmp_path, monkeypatch) -> None:
    save_file(lightx2v(), file)
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))

    def download(repository: str, name: str, dry_run: bool = False) -> str | DryRunFileInfo:
        assert (repository, name) == ("someone/loras", "sub/distill.safetensors")
        if dry_run:
            return DryRunFileInfo("1" * 40, 738_000_000, name, "", is_cached=False, will_download=True)
        cache.mkdir()
        return shutil.copy(file, cache / "distill.safetensors")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repository: ["sub/distill.safetensors"])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    said = []
    assert len(base_changes([(source, 1.0)], SHAPES, said.append)) == 15
    assert said[0].startswith("someone/loras: 0.7 GB to download")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("no/such/file.pt", "neither a file nor owner/repo/file"),
        ("toyworld-fewsteps", "Did you mean toyworld-fewstep?"),
        ("nothing", "neither a file nor owner/repo/file"),
        ("/no/such/lora.safetensors", "no such file. Put it back, or give its new place"),
    ],
)
def test_what_there_is_not(source: str, said: str) -> None:
    with pytest.raises(BadInputError, match=said):
        base_changes([(source, 1.0)], SHAPES, quiet)
