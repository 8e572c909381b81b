"""A transformer from one file: the same weights as from a folder, under every naming and however they are stored;
anything else is refused by name."""

from __future__ import annotations

import importlib.util
import json
import pickle
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from _tiny import save_tiny_generator, tiny_text, tiny_transformer, tiny_vae
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file, save_file

from lowmem_drf.errors import BadInputError
from lowmem_drf.models.generators import generator_config
from lowmem_drf.models.wan.denoiser import load_denoiser
from lowmem_drf.models.wan.names import wan_name
from lowmem_drf.models.wan.published import KNOWN
from lowmem_drf.models.wan.random_generator import empty_transformer
from lowmem_drf.models.wan.single_file import load_single_file
from lowmem_drf.models.weights import gguf_files
from lowmem_drf.models.weights.files import is_pickle
from lowmem_drf.models.weights.fp8_files import Fp8Files
from lowmem_drf.models.weights.gguf_files import GgufFiles

FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs the package gguf")
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def generator(tmp_path_factory) -> Path:
    return save_tiny_generator(tmp_path_factory.mktemp("generator"))


@pytest.fixture(scope="module")
def folders(generator) -> Weights:
    """The folder's transformer under diffusers' names."""
    return load_file(generator / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def original(folders) -> Weights:
    """The same under Wan's own names."""
    return {wan_name(name): value for name, value in folders.items()}


@pytest.fixture(scope="module")
def beside() -> Weights:
    """The other models of an all-in-one checkpoint, the text encoder quantised in a way that is not read."""
    text = {f"text_encoders.umt5xxl.transformer.{name}": value for name, value in tiny_text()[0].state_dict().items()}
    vae = {f"vae.{name}": value for name, value in tiny_vae().state_dict().items()}
    odd = {"text_encoders.umt5xxl.transformer.x.weight": torch.ones(2, 2).to(torch.int8)}
    return {name: value.clone() for name, value in (text | vae | odd).items()}


def single_file(file: str | Path, folder: str, *arguments: Any, **options: Any) -> Any:
    return load_single_file(file, generator_config(folder).transformer, folder, *arguments, **options)


def loaded(weights: Weights, generator: Path, folder: Path, said: list[str] | None = None, **options) -> Weights:
    """The state of the transformer in a file of these weights, under Wan's names."""
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "wan.safetensors")
    model = single_file(
        folder / "wan.safetensors", str(generator), say=([] if said is None else said).append, **options
    )
    return {wan_name(name): value for name, value in model.state_dict().items()}


def same(got: Weights, wanted: Weights) -> bool:
    return got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("name", KNOWN)
def test_names_are_those_that_diffusers_converts(name: str) -> None:
    ours = [parameter for parameter, _ in empty_transformer(KNOWN[name].config.transformer).named_parameters()]
    converted = convert_wan_transformer_to_diffusers({wan_name(parameter): parameter for parameter in ours})
    assert len(converted) == len(ours) and all(theirs == parameter for theirs, parameter in converted.items())


def test_it_is_the_folders_transformer(generator, original, tmp_path) -> None:
    save_file(original, tmp_path / "wan.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        ours = single_file(str(tmp_path / "wan.safetensors"), str(generator), dtype)
        theirs = load_denoiser(str(generator), dtype)
        assert dict(ours.config) | {"_name_or_path": ""} == dict(theirs.config) | {"_name_or_path": ""}
        state, wanted = ours.state_dict(), theirs.state_dict()
        assert same(state, wanted) and all(state[name].dtype == wanted[name].dtype for name in wanted)
        assert all(torch.equal(buffer, dict(theirs.named_buffers())[name]) for name, buffer in ours.named_buffers())
        assert not ours.training and not any(parameter.requires_grad for parameter in ours.parameters())


@pytest.mark.parametrize("prefix", ["", "model.", "transformer.", "diffusion_model.", "model.diffusion_model."])
def test_every_prefix_and_both_namings(generator, folders, original, prefix: str, tmp_path) -> None:
    said: list[str] = []
    for names in (original, folders):
        assert same(loaded({prefix + key: value for key, value in names.items()}, generator, tmp_path, said), original)
    assert not said
    stray = {prefix + key: value for key, value in original.items()} | {prefix + "freqs": torch.ones(4, 5).cfloat()}
    assert same(loaded(stray, generator, tmp_path, said), original) and "left out: 1 table of frequencies" in said[0]


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_an_all_in_one_checkpoint(generator, original, beside, prefix: str, tmp_path) -> None:
    said: list[str] = []
    whole = {prefix + key: value for key, value in original.items()} | beside
    assert same(loaded(whole, generator, tmp_path, said), original)
    text, vae = (sum(name.startswith(kind) for name in beside) for kind in ("text_encoders.", "vae."))
    assert len(said) == 1 and f"left out: {text} tensors of the text encoder, {vae} tensors of the VAE" in said[0]


def test_half_precision_becomes_the_runs(generator, original, tmp_path) -> None:
    half = {name: value.half() for name, value in original.items()}
    state = loaded(half, generator, tmp_path, dtype=torch.bfloat16)
    assert torch.equal(state["head.head.weight"], half["head.head.weight"].bfloat16())
    assert torch.equal(state["head.modulation"], half["head.modulation"].float())


def test_the_file_may_change_afterwards(generator, original, tmp_path) -> None:
    file = tmp_path / "wan.safetensors"
    save_file(original, file)
    model = single_file(file, str(generator))
    with file.open("r+b") as stream:
        stream.seek(-1000, 2)
        stream.write(b"\xff" * 1000)
    assert all(torch.equal(value, original[wan_name(name)]) for name, value in model.state_dict().items())


# weights in fp8


def matrices(weights: Weights) -> list[str]:
    return [name for name, value in weights.items() if value.ndim == 2 and name.startswith("blocks.")]


@pytest.mark.parametrize("kind", FP8)
def test_plain_fp8_is_read_exactly(generator, original, kind: str, tmp_path) -> None:
    said: list[str] = []
    low = {name: value.to(FP8[kind]) for name, value in original.items()}
    assert same(loaded(low, generator, tmp_path, said), {name: value.float() for name, value in low.items()})
    assert f"{len(low)} of {len(low)} tensors are fp8, dequantised" in said[0] and "left out" not in said[0]


MARKER = torch.tensor(list(json.dumps({"format": "float8_e4m3fn", "full_precision_matrix_mult": True}).encode()))
SCALED = {
    "ComfyUI": ("scale_weight", "scale_input", {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}, (1,)),
    "newer": ("weight_scale", "input_scale", {"{}.comfy_quant": MARKER.to(torch.uint8)}, ()),
    "one a row": ("scale_weight", "scale_input", {"scaled_fp8": torch.zeros(0)}, (-1, 1)),
}


def scaled(original: Weights, layout: str) -> tuple[Weights, Weights]:
    """(weights in fp8 with scales, what they stand for)."""
    scale_name, input_name, markers, shape = SCALED[layout]
    made, wanted = dict(original), dict(original)
    for name in matrices(original):
        module, weight = name.removesuffix(".weight"), original[name]
        scale = (weight.abs().amax(1, keepdim=True) if shape == (-1, 1) else weight.abs().max()).reshape(shape) / 448
        made[name] = (weight / scale).to(torch.float8_e4m3fn)
        made[f"{module}.{scale_name}"], made[f"{module}.{input_name}"] = scale, torch.ones(())
        made |= {marker.format(module): value.clone() for marker, value in markers.items()}
        wanted[name] = made[name].float() * scale
    return made, wanted


@pytest.mark.parametrize("layout", SCALED)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_scaled_fp8_is_weight_times_scale(generator, original, layout: str, prefix: str, tmp_path) -> None:
    said: list[str] = []
    made, wanted = scaled(original, layout)
    for dtype in (torch.float32, torch.bfloat16):
        state = loaded({prefix + key: value for key, value in made.items()}, generator, tmp_path, said, dtype=dtype)
        assert same(state, {name: value.to(state[name].dtype) for name, value in wanted.items()})
    count = len(matrices(original))
    assert f"{count} of {len(original)} tensors are fp8, {count} have a scale" in said[0]
    assert f"left out: {count} scales of activations" in said[0] and len(said) == 2


def spoilt(original: Weights, **new: torch.Tensor) -> Weights:
    """With one layer's tensors replaced: ``{}`` is the layer's name."""
    made, _ = scaled(original, "newer")
    return made | {f"blocks.0.self_attn.q.{key}": value for key, value in new.items()}


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ({"weight": torch.ones(24, 24).to(torch.int8)}, "q.weight is int8"),
        ({"weight": torch.ones(24, 12).to(torch.uint8), "weight_scale_2": torch.ones(())}, "q.weight"),
        ({"weight_scale": torch.ones(24, 1).to(torch.uint8)}, "q.weight is mxfp8"),
        ({"weight_scale": torch.ones(24, 2)}, r"quantised in blocks: .* scales of shape \[24, 2\]"),
        ({"comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}')).to(torch.uint8)}, "q.weight is nvfp4"),
        (
            {"comfy_quant": torch.tensor(list(b'{"format": "float8_e4m3fn", "convrot": true}')).to(torch.uint8)},
            "convrot",
        ),
        ({"comfy_quant": torch.tensor(list(b"{")).to(torch.uint8)}, "unknown format"),
        ({"scale_weight": torch.ones(1)}, "two scales"),
        ({"wscales": torch.ones(24, 2)}, "Nunchaku"),
        ({"weight_scale": torch.tensor(float("nan"))}, "NaN or infinity"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_is_quantised_otherwise_is_named(generator, original, new, message: str, tmp_path) -> None:
    with pytest.raises(BadInputError, match=message):
        loaded(spoilt(original, **new), generator, tmp_path)


# GGUF


def write_gguf(path: Path, weights: Weights, kinds: dict[str, str], shapes: dict[str, tuple[int, ...]] | None = None):
    """A GGUF file as ComfyUI-GGUF writes it. Returns what its tensors stand for, by the package's own arithmetic.

    kinds: name -> type; default F32. shapes: name -> shape in which it is stored.
    """
    import gguf
    from gguf.quants import dequantize, quantize

    writer, stands = gguf.GGUFWriter(path, "wan"), {}
    writer.add_array("tokenizer.ggml.tokens", ["a", "b" * 300])
    for name, value in weights.items():
        stored = value.float().numpy().reshape((shapes or {}).get(name, tuple(value.shape)))
        kind = gguf.GGMLQuantizationType[kinds.get(name, "F32")]
        raw = quantize(stored, kind)
        writer.add_tensor(name, raw, raw_dtype=kind)
        stands[name] = torch.from_numpy(dequantize(raw, kind).copy()).reshape(value.shape)
        if stored.ndim == 2 != value.ndim:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(value.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stands


@pytest.fixture(scope="module")
def kinds(original) -> dict[str, str]:
    """Types of a file: those that fit the tiny model's widths."""
    found = {name: "F16" for name in matrices(original)} | {"head.head.weight": "BF16"}
    return found | {f"blocks.{i}.ffn.2.weight": kind for i, kind in enumerate(("Q8_0", "Q4_0"))}


@needs_gguf
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_gguf_is_what_its_blocks_stand_for(generator, original, kinds, prefix: str, tmp_path, monkeypatch) -> None:
    file, said, sizes = tmp_path / "wan.gguf", [], []
    named = {prefix + name: value for name, value in original.items()}
    wanted = write_gguf(file, named, {prefix + name: kind for name, kind in kinds.items()})
    dequantised = GgufFiles._dequantised

    def watched(files, raw, kind):
        part = dequantised(files, raw, kind)
        sizes.append(part.numel())
        return part

    monkeypatch.setattr(GgufFiles, "_dequantised", watched)
    monkeypatch.setattr(gguf_files, "_AT_ONCE", 100)
    state = single_file(file, str(generator), say=said.append).state_dict()
    assert same({prefix + wan_name(name): value for name, value in state.items()}, wanted) and max(sizes) == 100
    assert not torch.equal(wanted[f"{prefix}blocks.0.ffn.2.weight"], named[f"{prefix}blocks.0.ffn.2.weight"])
    assert len(said) == 1 and f"{len(wanted)} tensors are GGUF (" in said[0] and "1 Q4_0" in said[0]


@needs_gguf
def test_gguf_may_have_fewer_dimensions(generator, original, tmp_path) -> None:
    """As GGUF has at most four, and its writers drop those of size 1."""
    file, name = tmp_path / "wan.gguf", "patch_embedding.weight"
    for shape in ((24, 16), (96, 1, 2, 2), (24, 4, 2, 2)):
        wanted = write_gguf(file, original, {}, {name: shape, "head.modulation": (1, 1, 2, 24)})
        state = single_file(file, str(generator)).state_dict()
        assert same({wan_name(key): value for key, value in state.items()}, wanted)
    write_gguf(file, original | {name: original[name].reshape(16, 24)}, {})
    with pytest.raises(BadInputError, match=r"patch_embedding\.weight is \[16, 24\]"):
        single_file(file, str(generator))


@needs_gguf
def test_every_format_of_gguf_that_diffusers_has(tmp_path) -> None:
    import gguf
    from diffusers.quantizers.gguf.utils import dequantize_functions

    file, raw = tmp_path / "x.gguf", {}
    writer, drawn = gguf.GGUFWriter(file, "wan"), torch.Generator().manual_seed(0)
    for kind in dequantize_functions:
        length = gguf.GGML_QUANT_SIZES[kind][1]
        raw[kind.name] = torch.randint(0, 256, (3, 512 // gguf.GGML_QUANT_SIZES[kind][0] * length), generator=drawn)
        writer.add_tensor(kind.name, raw[kind.name].to(torch.uint8).numpy(), raw_dtype=kind)
    writer.add_tensor("whole", torch.ones(3, dtype=torch.int32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    files = GgufFiles(file)
    files.check(raw)
    with pytest.raises(ValueError, match="whole is I32"):
        files.check(files.entries)
    for kind, function in dequantize_functions.items():
        block, length = gguf.GGML_QUANT_SIZES[kind]
        wanted = function(raw[kind.name].to(torch.uint8).view(-1, length), block, length, torch.float32)
        torch.testing.assert_close(files.read(kind.name), wanted.reshape(3, 512), rtol=0, atol=0, equal_nan=True)


@needs_gguf
def test_damaged_gguf_files(generator, original, kinds, tmp_path) -> None:
    file = tmp_path / "wan.gguf"
    write_gguf(file, original, kinds)
    whole = file.read_bytes()
    end = min(entry.start for entry in GgufFiles(file).entries.values())
    for damaged in (
        *(whole[:length] for length in (*range(0, end, 97), end, len(whole) - 1)),
        *(whole[:at] + b"\xff" * 8 + whole[at + 8 :] for at in range(0, end, 41)),
    ):
        file.write_bytes(damaged)
        try:
            GgufFiles(file)
        except ValueError as error:
            assert "is cut off" in str(error) or "is damaged" in str(error)
    file.write_bytes(whole[: len(whole) - 1])
    with pytest.raises(BadInputError, match=r"is cut off: .*Get it anew"):
        single_file(file, str(generator))
    file.write_bytes(b"no tensors")
    with pytest.raises(BadInputError, match="does not begin with the header of a GGUF file"):
        single_file(file, str(generator))


def test_gguf_without_its_package(generator, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "wan.gguf").write_bytes(b"GGUF")
    with pytest.raises(BadInputError, match='pip install .*"gguf'):
        single_file(tmp_path / "wan.gguf", str(generator))


@pytest.mark.parametrize("kind", ["fp8", pytest.param("gguf", marks=needs_gguf)])
def test_a_tensor_is_gone_before_the_next_is_read(generator, original, kinds, kind: str, tmp_path, monkeypatch) -> None:
    file = tmp_path / f"wan.{kind}"
    if kind == "gguf":
        write_gguf(file, original, kinds)
    else:
        save_file(scaled(original, "newer")[0], file)
    source, before = GgufFiles if kind == "gguf" else Fp8Files, []
    read = source.read

    def watched(files, name):
        assert all(alive() is None for alive in before)
        made = read(files, name)
        if name in matrices(original):  # the others stay in fp32, as they are
            before.append(weakref.ref(made))
        return made

    monkeypatch.setattr(source, "read", watched)
    single_file(file, str(generator), torch.bfloat16)
    assert len(before) == len(matrices(original))


# other files


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ({"head__head__bias": None}, r"lacks 1 tensors of it \(head\.head\.bias\)"),
        ({"blocks__7__ffn__0__bias": torch.zeros(3)}, r"has 1 that it has not \(blocks\.7\.ffn\.0\.bias\)"),
        ({"transformer_2__head__head__bias": torch.zeros(3)}, r"has 1 that it has not \(transformer_2\."),
        ({"clip_l__text_model__x": torch.zeros(3)}, r"has 1 that it has not \(clip_l\."),
        ({"head__head__bias": torch.zeros(3)}, r"head\.head\.bias is \[3\], wanted is \[16\]"),
        ({"patch_embedding__weight": torch.zeros(24, 9, 1, 2, 2)}, "image-to-video or control .* takes 9 channels"),
        ({"img_emb__proj__0__weight": torch.zeros(3)}, "image-to-video"),
        ({"blocks__0__cross_attn__k_img__weight": torch.zeros(3)}, "image-to-video"),
        ({"vace_blocks__0__after_proj__bias": torch.zeros(3)}, "VACE"),
        ({"face_adapter__fuser_blocks__0__k_norm__weight": torch.zeros(3)}, "Animate"),
        ({"ref_conv__weight": torch.zeros(3)}, "Fun-control"),
        ({"head__head__bias": torch.full((16,), float("inf"))}, "NaN or infinity"),
    ],
)
def test_what_does_not_fit_is_named(generator, original, new, message: str, tmp_path) -> None:
    both = original | {name.replace("__", "."): value for name, value in new.items()}
    with pytest.raises(BadInputError, match=message):
        loaded({name: value for name, value in both.items() if value is not None}, generator, tmp_path)


def test_half_a_prefix(generator, original, tmp_path) -> None:
    """A tensor under two names, or outside the prefix of the others, is not taken silently."""
    named = {f"diffusion_model.{name}": value for name, value in original.items()}
    with pytest.raises(BadInputError, match=r"has 1 that it has not \(head\.head\.bias\)"):
        loaded(named | {"head.head.bias": torch.ones(16)}, generator, tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["blocks.0.self_attn.q.lora_A.weight", "blocks.0.cross_attn.k_img.lora_A.weight"], "is a LoRA.*base_lora"),
        (["diffusion_model.blocks.0.self_attn.q.lora_down.weight", "x.diff_b"], "is a LoRA.*base_lora"),
        (["lora_unet_blocks_0_self_attn_q.alpha"], "is a LoRA.*base_lora"),
        (["encoder.conv1.weight", "decoder.conv1.weight"], "is a VAE.*model.id"),
        (["first_stage_model.decoder.conv_in.weight"], "is a VAE.*model.id"),
        (["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"], "is a text encoder.*model.id"),
        (["token_embedding.weight", "blocks.0.attn.q.weight"], "is a text encoder.*model.id"),
        (["model.double_blocks.0.img_attn.qkv.weight", "model.txt_in.individual_token_refiner.x"], "HunyuanVideo"),
        (["double_blocks.0.img_attn.qkv.weight"], "is a Flux"),
        (["transformer_blocks.0.attn1.to_q.weight", "adaln_single.linear.weight"], "LTX"),
        (["x"], "does not fit"),
    ],
)
def test_files_of_other_models(generator, names, message: str, tmp_path) -> None:
    with pytest.raises(BadInputError, match=message):
        loaded({name: torch.ones(2) for name in names}, generator, tmp_path)


def test_another_size_of_the_model(generator, tmp_path) -> None:
    larger = {wan_name(name): value for name, value in tiny_transformer(layers=3).state_dict().items()}
    with pytest.raises(BadInputError, match="Let model.id name the model"):
        loaded(larger, generator, tmp_path)


def test_files_of_another_kind(generator, original, tmp_path) -> None:
    for name, message in (("x.pth", "pickles"), ("x.safetensors", "there is no file"), ("x.gguf", "there is no file")):
        with pytest.raises(BadInputError, match=message):
            single_file(tmp_path / name, str(generator))
    with pytest.raises(BadInputError, match=r"is a folder.*model\.id"):
        single_file(tmp_path, str(generator))
    torch.save(original, tmp_path / "pickle.safetensors")
    with pytest.raises(BadInputError, match="pickles"):
        single_file(tmp_path / "pickle.safetensors", str(generator))
    file = tmp_path / "diffusion_pytorch_model-00001-of-00002.safetensors"
    save_file({name: value for name, value in original.items() if "blocks.1" not in name}, file)
    with pytest.raises(BadInputError, match="name the folder that it is a part of"):
        single_file(file, str(generator))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BadInputError, match="is cut off"):
        single_file(file, str(generator))


def test_a_header_of_640_bytes_is_no_pickle(tmp_path) -> None:
    """Its length begins with the bytes of a pickle."""
    file, tensor = tmp_path / "x.safetensors", {"x": torch.zeros(1)}
    for filling in range(540, 580):
        save_file(tensor, file, {"a": "b" * filling})
        if file.read_bytes().startswith(b"\x80\x02"):
            break
    assert file.read_bytes().startswith(b"\x80\x02") and not is_pickle(file)
    torch.save(tensor, file)
    assert is_pickle(file)
    file.write_bytes(pickle.dumps({}, 2))
    assert is_pickle(file)
