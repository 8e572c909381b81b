"""A transformer from one safetensors file: the same weights as from a folder, under every naming; anything else is
refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from _tiny import save_tiny_generator, tiny_transformer
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file, save_file

from lowmem_drf.errors import BadInputError
from lowmem_drf.models.generators import KNOWN_GENERATORS
from lowmem_drf.models.wan.denoiser import load_denoiser
from lowmem_drf.models.wan.names import wan_name
from lowmem_drf.models.wan.random_generator import empty_transformer
from lowmem_drf.models.wan.single_file import load_single_file


@pytest.fixture(scope="module")
def generator(tmp_path_factory) -> Path:
    return save_tiny_generator(tmp_path_factory.mktemp("generator"))


@pytest.fixture(scope="module")
def original(generator) -> dict[str, torch.Tensor]:
    """The folder's transformer under Wan's own names."""
    return {
        wan_name(name): value
        for name, value in load_file(generator / "transformer" / "diffusion_pytorch_model.safetensors").items()
    }


@pytest.mark.parametrize("name", KNOWN_GENERATORS)
def test_names_are_those_that_diffusers_converts(name: str) -> None:
    ours = [
        parameter for parameter, _ in empty_transformer(KNOWN_GENERATORS[name].config.transformer).named_parameters()
    ]
    converted = convert_wan_transformer_to_diffusers({wan_name(parameter): parameter for parameter in ours})
    assert len(converted) == len(ours) and all(theirs == parameter for theirs, parameter in converted.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
def test_it_is_the_folders_transformer(generator, original, prefix: str, dtype, tmp_path) -> None:
    save_file({prefix + name: value for name, value in original.items()}, tmp_path / "wan.safetensors")
    ours, theirs = (
        load_single_file(tmp_path / "wan.safetensors", str(generator), dtype),
        load_denoiser(str(generator), dtype),
    )
    assert dict(ours.config) | {"_name_or_path": ""} == dict(theirs.config) | {"_name_or_path": ""}
    state, wanted = ours.state_dict(), theirs.state_dict()
    assert state.keys() == wanted.keys() and all(
        state[name].dtype == wanted[name].dtype and torch.equal(state[name], wanted[name]) for name in wanted
    )
    assert all(torch.equal(buffer, dict(theirs.named_buffers())[name]) for name, buffer in ours.named_buffers())
    assert not ours.training and not any(parameter.requires_grad for parameter in ours.parameters())


def test_a_file_with_diffusers_names(generator) -> None:
    file = generator / "transformer" / "diffusion_pytorch_model.safetensors"
    state, wanted = load_single_file(file, str(generator)).state_dict(), load_file(file)
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def test_half_precision_becomes_the_runs(generator, original, tmp_path) -> None:
    save_file({name: value.half() for name, value in original.items()}, tmp_path / "wan.safetensors")
    model = load_single_file(str(tmp_path / "wan.safetensors"), str(generator), torch.bfloat16)
    assert torch.equal(model.proj_out.weight, original["head.head.weight"].half().bfloat16())
    assert torch.equal(model.scale_shift_table, original["head.modulation"].half().float())


def test_the_file_may_change_afterwards(generator, original, tmp_path) -> None:
    file = tmp_path / "wan.safetensors"
    save_file(original, file)
    model = load_single_file(file, str(generator))
    with file.open("r+b") as stream:
        stream.seek(-1000, 2)
        stream.write(b"\xff" * 1000)
    assert all(torch.equal(value, original[wan_name(name)]) for name, value in model.state_dict().items())


def changed(original, **new: torch.Tensor | None) -> dict[str, torch.Tensor]:
    both = original | {name.replace("__", "."): value for name, value in new.items()}
    return {name: value for name, value in both.items() if value is not None}


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ({"head__head__bias": None}, r"lacks 1 tensors of it \(head\.head\.bias\)"),
        ({"blocks__7__ffn__0__bias": torch.zeros(3)}, r"has 1 that it has not \(blocks\.7\.ffn\.0\.bias\)"),
        ({"head__head__bias": torch.zeros(3)}, r"head\.head\.bias is \[3\], wanted is \[16\]"),
        ({"img_emb__proj__0__weight": torch.zeros(3)}, "image-to-video"),
        ({"vace_blocks__0__after_proj__bias": torch.zeros(3)}, "VACE"),
        (
            {"head__head__weight": torch.zeros(16, 24).to(torch.float8_e4m3fn)},
            r"quantised \(head\.head\.weight is F8_E4M3\)",
        ),
        ({"head__head__scale_weight": torch.ones(1)}, "quantised"),
        ({"scaled_fp8": torch.ones(1)}, "quantised"),
    ],
    ids=["missing", "unexpected", "shape", "image-to-video", "vace", "fp8", "scaled", "marked"],
)
def test_what_does_not_fit_is_named(generator, original, new, message: str, tmp_path) -> None:
    save_file(changed(original, **new), tmp_path / "wan.safetensors")
    with pytest.raises(BadInputError, match=message):
        load_single_file(tmp_path / "wan.safetensors", str(generator))


def test_another_size_of_the_model(generator, tmp_path) -> None:
    save_file(
        {wan_name(name): value for name, value in tiny_transformer(layers=3).state_dict().items()},
        tmp_path / "wan.safetensors",
    )
    with pytest.raises(BadInputError, match="Let model.id name the model"):
        load_single_file(tmp_path / "wan.safetensors", str(generator))


def test_files_of_another_kind(generator, original, tmp_path) -> None:
    for name, message in (("x.gguf", "GGUF"), ("x.pth", "pickles"), ("x.safetensors", "there is no file")):
        with pytest.raises(BadInputError, match=message):
            load_single_file(tmp_path / name, str(generator))
    file = tmp_path / "cut.safetensors"
    save_file(original, file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BadInputError, match="is cut off"):
        load_single_file(file, str(generator))
