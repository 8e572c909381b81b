"""The transformer read tensor by tensor: bit-equal to diffusers', packed while it is read, never in memory twice."""

from __future__ import annotations

import json
import sys
import weakref
from pathlib import Path

import huggingface_hub
import pytest
import torch
from _tiny import save_tiny_generator, tiny_condition, tiny_latents, tiny_transformer
from safetensors.torch import load_file, save_file

from lowmem_drf.assembly.loading import load_transformer
from lowmem_drf.config import load_config
from lowmem_drf.errors import BadInputError
from lowmem_drf.models.generators import generator_config
from lowmem_drf.models.lora.base import base_changes
from lowmem_drf.models.wan.denoiser import as_velocity, load_denoiser
from lowmem_drf.models.wan.names import wan_name
from lowmem_drf.models.wan.random_generator import empty_transformer
from lowmem_drf.models.wan.single_file import load_single_file
from lowmem_drf.models.weights import reader as weight_reader
from lowmem_drf.models.weights.packed_linear import PackedLinear, unpack
from lowmem_drf.planner.ledger import Ledger

WEIGHTS = "diffusion_pytorch_model.safetensors"
QUANTS = ["nf4", "int8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_generator(tmp_path_factory.mktemp("generator"))


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """A copy of the transformer that a test may spoil."""
    target = tmp_path / "transformer"
    target.mkdir()
    for file in (folder / "transformer").iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def same(one, other) -> bool:
    """Names, dtypes and bits of parameters and buffers."""
    mine, theirs = (
        {name: tensor for tensors in (m.named_parameters(), m.named_buffers()) for name, tensor in tensors}
        for m in (one, other)
    )
    return mine.keys() == theirs.keys() and all(
        mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name]) for name in mine
    )


@pytest.mark.parametrize(
    "stored", [torch.float32, torch.bfloat16, torch.float16], ids=["in fp32", "in bf16", "in fp16"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shards", [1, 2])
def test_it_is_what_diffusers_loads(own: Path, stored: torch.dtype, dtype: torch.dtype, shards: int) -> None:
    from diffusers import WanTransformer3DModel

    state = {name: value.to(stored) for name, value in load_file(own / WEIGHTS).items()}
    (own / WEIGHTS).unlink()
    if shards == 1:
        save_file(state, own / WEIGHTS, metadata={"format": "pt"})
    else:
        where = {
            name: f"diffusion_pytorch_model-0000{1 + place % 2}-of-00002.safetensors"
            for place, name in enumerate(sorted(state))
        }
        for shard in set(where.values()):
            save_file(
                {name: value for name, value in state.items() if where[name] == shard},
                own / shard,
                metadata={"format": "pt"},
            )
        (own / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    theirs = WanTransformer3DModel.from_pretrained(own.parent, subfolder="transformer", torch_dtype=dtype)
    ours = load_denoiser(str(own.parent), dtype)
    assert same(ours, theirs) and ours.__class__ is theirs.__class__
    assert dict(ours.config) | {"_name_or_path": ""} == dict(theirs.config) | {"_name_or_path": ""}
    assert not ours.training and not any(parameter.requires_grad for parameter in ours.parameters())


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_packed_weights_are_those_of_the_file_and_the_rest_is_as_it_was(
    folder: Path, quant: str, dtype: torch.dtype
) -> None:
    state = load_file(folder / "transformer" / WEIGHTS)
    plain, packed = load_denoiser(str(folder), dtype), load_denoiser(str(folder), dtype, quant=quant)
    modules = {name: module for name, module in packed.named_modules() if isinstance(module, PackedLinear)}
    assert len(modules) == 2 * 10 and {module.quant for module in modules.values()} == {quant}
    for name, module in modules.items():
        wanted = PackedLinear(module.in_features, module.out_features, False, quant)
        wanted.pack(state[f"{name}.weight"])
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(module.packed(), wanted.packed(), strict=True))
    others = dict(packed.named_parameters())
    rest = {name: value for name, value in plain.named_parameters() if name.removesuffix(".weight") not in modules}
    assert all(others[name].dtype == value.dtype and torch.equal(others[name], value) for name, value in rest.items())
    v = as_velocity(packed)(tiny_latents(1, dtype=torch.float32), 0.5, tiny_condition(1, torch.float32))
    exact_v = as_velocity(plain)(tiny_latents(1, dtype=torch.float32), 0.5, tiny_condition(1, torch.float32))
    for name, module in modules.items():  # as if the checkpoint had held the rounded weights
        weight = plain.get_submodule(name).weight
        weight.data = unpack(quant, module.shape, module.packed(), weight.dtype)
    wanted_v = as_velocity(plain)(tiny_latents(1, dtype=torch.float32), 0.5, tiny_condition(1, torch.float32))
    assert torch.equal(v, wanted_v) and not torch.equal(v, exact_v)


@pytest.mark.parametrize("quant", ["none", *QUANTS])
def test_a_tensor_is_gone_before_the_next_is_read(folder: Path, quant: str, monkeypatch) -> None:
    """Each tensor is converted or packed at once; unquantised and in the file's dtype, it is kept without a copy."""
    read, before = weight_reader.TensorFiles.read, []

    def watched(files, name):
        if quant != "none":
            assert not any(ref() is not None and packed for ref, packed in before)
        made = read(files, name)
        before.append((weakref.ref(made), name.endswith(("to_q.weight", "net.0.proj.weight", "net.2.weight"))))
        return made

    monkeypatch.setattr(weight_reader.TensorFiles, "read", watched)
    load_denoiser(str(folder), torch.bfloat16, quant=quant)
    assert sum(packed for _, packed in before) == 2 * 4


@pytest.mark.parametrize("quant", ["none", *QUANTS])
def test_bytes_while_it_is_read(tmp_path: Path, quant: str) -> None:
    """At most the final bytes and the packing of one tensor, which takes several times its fp32 size on the CPU."""
    transformer = tiny_transformer(num_attention_heads=8, attention_head_dim=12, layers=12, ffn_dim=192)
    transformer.save_pretrained(tmp_path / "transformer")
    files = weight_reader.TensorFiles([tmp_path / "transformer" / WEIGHTS])
    model = empty_transformer(transformer.config, quant=quant)  # outside the ledger, which would count shapes on meta
    with Ledger() as ledger:
        weight_reader.fill_from_files(model, files, {name: name for name in files.entries}, torch.bfloat16, "cpu")
        stays = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        assert ledger.card_bytes == pytest.approx(stays, rel=0.02)
        assert ledger.peak_card_bytes < stays + 6 * 4 * 96 * 192
    whole = 2 * sum(value.numel() for value in load_file(tmp_path / "transformer" / WEIGHTS).values())
    assert whole > 2.5e6 and (quant == "none" or ledger.peak_card_bytes < 0.9 * whole)


@pytest.mark.parametrize("quant", ["none", *QUANTS])
def test_it_may_stay_elsewhere_than_where_it_is_packed(folder: Path, quant: str, monkeypatch) -> None:
    pack, packed_on = PackedLinear.pack, []

    def watched(layer, weight, home):
        packed_on.append((weight.device.type, torch.device(home).type))
        pack(layer, weight, home)

    monkeypatch.setattr(PackedLinear, "pack", watched)
    model = load_denoiser(str(folder), torch.bfloat16, "cpu", quant, home="meta")
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    assert set(packed_on) == (set() if quant == "none" else {("cpu", "meta")})


@pytest.mark.parametrize("quant", QUANTS)
def test_a_single_file_is_packed_the_same(folder: Path, quant: str, tmp_path: Path) -> None:
    config = generator_config(str(folder)).transformer
    save_file(
        {wan_name(name): value for name, value in load_file(folder / "transformer" / WEIGHTS).items()},
        tmp_path / "wan.safetensors",
    )
    assert same(
        load_single_file(tmp_path / "wan.safetensors", config, str(folder), torch.bfloat16, quant=quant),
        load_denoiser(str(folder), torch.bfloat16, quant=quant),
    )


@pytest.mark.parametrize("single", [False, True], ids=["folder", "single file"])
def test_a_run_loads_what_its_configuration_says(folder: Path, single: bool, tmp_path: Path, capsys) -> None:
    lora, file = tmp_path / "lora.safetensors", folder / "transformer" / WEIGHTS
    save_file(
        {
            "diffusion_model.head.head.diff_b": torch.ones(16),
            "diffusion_model.blocks.0.self_attn.q.diff": torch.ones(24, 24),
        },
        lora,
    )
    overrides = [f"model.id={folder}", "model.quant=int8", f"model.base_lora={lora}", "model.base_lora_scale=0.5"]
    config = load_config("toy", overrides + ([f"model.transformer={file}"] if single else []))
    cpu = torch.device("cpu")
    model = load_transformer(config, folder, torch.float32, cpu)
    wanted = load_denoiser(
        str(folder), quant="int8", changes=lambda shapes: base_changes([(str(lora), 0.5)], shapes, print)
    )
    assert same(model, wanted) and "merged into 2 tensors" in capsys.readouterr().err
    assert torch.equal(model.proj_out.bias, load_denoiser(str(folder)).proj_out.bias + 0.5)
    exported = load_transformer(config, folder, torch.float32, cpu, quant="none")
    assert not any(isinstance(module, PackedLinear) for module in exported.modules())
    assert torch.equal(exported.blocks[0].attn1.to_q.weight, load_file(file)["blocks.0.attn1.to_q.weight"] + 0.5)


def test_another_subfolder(folder: Path, tmp_path: Path) -> None:
    tiny_transformer(seed=5).save_pretrained(tmp_path / "transformer_2")
    assert torch.equal(
        load_denoiser(str(tmp_path), subfolder="transformer_2").proj_out.weight,
        tiny_transformer(seed=5).proj_out.weight,
    )


def test_a_repository_of_the_hub(folder: Path, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, allow_patterns: asked.append((name, allow_patterns)) or str(folder),
    )
    assert same(load_denoiser("someone/wan"), load_denoiser(str(folder)))
    assert asked == [("someone/wan", ["transformer/*.json", "transformer/*.safetensors"])]


def spoil(folder: Path, **new: torch.Tensor | None) -> None:
    state = load_file(folder / WEIGHTS) | {name.replace("__", "."): value for name, value in new.items()}
    save_file(
        {name: value for name, value in state.items() if value is not None}, folder / WEIGHTS, metadata={"format": "pt"}
    )


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (
            {"proj_out__bias": None},
            r"lack 1 tensors of the model its config.json describes \(the first: proj_out.bias\)",
        ),
        ({"proj_out__bias": torch.zeros(3)}, r"describes proj_out.bias as \[16\], and its weights have it as \[3\]"),
        ({"proj_out__bias": torch.zeros(16, dtype=torch.uint8)}, r"quantised already \(proj_out.bias is U8\)"),
    ],
    ids=["missing", "shape", "quantised"],
)
def test_weights_that_do_not_fit_are_named(own: Path, new, message: str) -> None:
    spoil(own, **new)
    with pytest.raises(BadInputError, match=message):
        load_denoiser(str(own.parent))


def test_tensors_that_are_not_used_are_said(own: Path, recwarn) -> None:
    # as in published image-to-video files; diffusers says nothing of it either
    spoil(own, blocks__0__attn2__norm_added_q__weight=torch.zeros(3))
    load_denoiser(str(own.parent))
    assert not [warning for warning in recwarn if "not used" in str(warning.message)]
    spoil(own, blocks__7__ffn__net__2__bias=torch.zeros(3))
    with pytest.warns(UserWarning, match=r"1 tensors of .* are not used \(the first: blocks.7.ffn.net.2.bias\)"):
        load_denoiser(str(own.parent))


def test_files_that_are_damaged_or_not_there(own: Path) -> None:
    content = (own / WEIGHTS).read_bytes()
    (own / WEIGHTS).write_bytes(content[:-100])
    with pytest.raises(BadInputError, match="is cut off"):
        load_denoiser(str(own.parent))
    (own / WEIGHTS).unlink()
    with pytest.raises(BadInputError, match="no safetensors files"):
        load_denoiser(str(own.parent))
    (own / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"x": "gone.safetensors"}}))
    with pytest.raises(BadInputError, match="gone.safetensors"):
        load_denoiser(str(own.parent))


def test_without_bitsandbytes(folder: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(BadInputError, match="model.quant = nf4 needs bitsandbytes"):
        load_denoiser(str(folder), quant="nf4")
    assert isinstance(load_denoiser(str(folder), quant="int8").blocks[0].attn1.to_q, PackedLinear)


def test_unknown_quantisation(folder: Path) -> None:
    with pytest.raises(BadInputError, match="model.quant is 'int3': it must be 'none', 'nf4' or 'int8'"):
        load_denoiser(str(folder), quant="int3")
