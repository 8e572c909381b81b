"""Exported LoRAs: every format, read back by diffusers, is the tuned model. Failed exports leave nothing behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from _tiny import randomise_lora, save_tiny_generator, tiny_condition, tiny_latents, tiny_transformer
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from bench.allocated import Allocated
from lowmem_drf.assembly.loading import load_transformer
from lowmem_drf.commands import export_lora as command
from lowmem_drf.commands.export_lora import DTYPES, export_run
from lowmem_drf.config import change, load_config, to_toml
from lowmem_drf.errors import BadInputError, LowmemError
from lowmem_drf.export import export, verify
from lowmem_drf.export.export import export_lora, file_metadata, merge_lora
from lowmem_drf.export.verify import verify_export
from lowmem_drf.models.generators import generator_config
from lowmem_drf.models.lora.adapter import add_lora, attach_lora, lora_layers, lora_state
from lowmem_drf.models.lora.changes import LoraChanges
from lowmem_drf.models.lora.formats import (
    diffusers_reads_kohya,
    model_hash,
    to_format,
)
from lowmem_drf.models.lora.reading import read_lora
from lowmem_drf.models.lora.report import training_facts
from lowmem_drf.models.wan import family as wan
from lowmem_drf.models.wan.denoiser import as_velocity, load_denoiser
from lowmem_drf.prompts import Cursor
from lowmem_drf.training.checkpoint import Checkpoint, save_checkpoint
from lowmem_drf.training.run_folder import run_config

ALPHA, RANK = 3.0, 2  # alpha / rank is no power of two: folding really rounds
TARGETS = {
    "all": ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"],
    "self-attention": ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"],
    "one block": ["blocks.1.ffn.net.2", "blocks.1.attn2.to_q"],
}


RANKS = {"self-attention": {"to_q": 1, "blocks.1.attn1.to_(k|v)": 3}}
"""Of layers that have another one."""


def trained(targets: str = "all", dtype: torch.dtype = torch.float32) -> tuple[LoraChanges, object]:
    transformer = tiny_transformer(dtype)
    add_lora(transformer, rank=RANK, alpha=ALPHA, targets=TARGETS[targets], ranks=RANKS.get(targets))
    randomise_lora(transformer)
    return LoraChanges.from_state(lora_state(transformer), ALPHA), transformer


def allowed(dtype: str, effect: float) -> float:
    """16 bits: A and B are rounded at most twice each, by eps / 2. fp32: what a user is promised."""
    return 1e-4 if dtype == "fp32" else 2 * torch.finfo(DTYPES[dtype]).eps * effect


def velocity(transformer) -> torch.Tensor:
    with torch.no_grad():
        return as_velocity(transformer)(tiny_latents(1, dtype=torch.float32), 0.6, tiny_condition(1, torch.float32))


def by_diffusers(path: Path) -> torch.Tensor:
    """As a user does it: a new pipeline loads the file and runs."""
    from diffusers import WanPipeline

    pipe = WanPipeline(None, None, None, None, transformer=tiny_transformer())
    pipe.load_lora_weights(str(path))
    return velocity(pipe.transformer)


FORMS = ("comfyui", "diffusers", "kohya")
PAIRS = [(form, dtype, list(TARGETS)[(i + j) % 3]) for i, form in enumerate(FORMS) for j, dtype in enumerate(DTYPES)]
"""Every pair of format, dtype and targets occurs once."""


@pytest.mark.parametrize(("form", "dtype", "targets"), PAIRS)
def test_round_trip(form: str, dtype: str, targets: str, tmp_path) -> None:
    lora, tuned = trained(targets)
    wanted, base = velocity(tuned), velocity(tiny_transformer())
    path, verified = export_lora(lora, form, DTYPES[dtype], tmp_path / "lora.safetensors", tiny_transformer(), {})
    assert [p.name for p in tmp_path.iterdir()] == ["lora.safetensors"]
    assert {v.dtype for k, v in load_file(path).items() if not k.endswith(".alpha")} == {DTYPES[dtype]}
    assert verified.effect > 0.05 and verified.difference < allowed(dtype, verified.effect)

    back = read_lora(path)
    attached = tiny_transformer()
    attach_lora(attached, back)
    outputs = [velocity(attached)]
    whole = form != "kohya" or targets == "all"
    assert verified.by == ("diffusers" if whole else "lowmem-drf")
    if whole:
        outputs.append(by_diffusers(path))
    for output in outputs:
        assert (output - wanted).abs().max() < allowed(dtype, float((wanted - base).abs().max()))


def test_keys_are_those_the_tools_read() -> None:
    lora, _ = trained()
    keys = {form: to_format(lora, form, torch.float32, wan).keys() for form in FORMS}
    assert "diffusion_model.blocks.0.self_attn.q.lora_A.weight" in keys["comfyui"]
    assert "diffusion_model.blocks.1.cross_attn.o.lora_B.weight" in keys["comfyui"]
    assert "diffusion_model.blocks.1.ffn.0.lora_A.weight" in keys["comfyui"]
    assert not any("alpha" in key or "default" in key or "to_q" in key for key in keys["comfyui"])
    assert keys["diffusers"] == {f"transformer.{name}" for name in lora.state()}
    assert {
        "lora_unet_blocks_0_self_attn_q.lora_down.weight",
        "lora_unet_blocks_1_ffn_2.lora_up.weight",
        "lora_unet_blocks_0_cross_attn_k.alpha",
    } <= keys["kohya"]
    assert len(keys["kohya"]) == 3 * len(keys["comfyui"]) // 2


def test_diffusers_reads_kohya_predicts_the_converter() -> None:
    from diffusers import WanPipeline

    lora, _ = trained()
    some = {name: pair for name, pair in lora.pairs.items() if "blocks.1.ffn" not in name}
    last = {name: pair for name, pair in lora.pairs.items() if "blocks.1" in name}
    for part, whole in [(lora, True), (LoraChanges(some), False), (LoraChanges(last), False)]:
        assert diffusers_reads_kohya(part, wan) is whole
        tensors = to_format(part, "kohya", torch.float32, wan)
        if whole:
            assert WanPipeline.lora_state_dict(tensors).keys() == {f"transformer.{name}" for name in part.state()}
        else:
            with pytest.raises(KeyError):
                WanPipeline.lora_state_dict(tensors)


def test_the_header_names_what_a_run_was_made_of_without_the_users_folders() -> None:
    files = "'/home/me/a.safetensors', 'owner/repo/b.safetensors'"
    config = load_config(
        "toy",
        [f"model.base_lora=[{files}]", "lora.init=/home/me/c.safetensors", "model.transformer=/home/me/d.safetensors"],
    )
    made = file_metadata(config, "step-000001", generator_config("toyworld"), "")
    assert made["lowmem_drf.base_lora"] == "a.safetensors x 1, owner/repo/b.safetensors x 1"
    assert (made["lowmem_drf.init_lora"], made["lowmem_drf.transformer"]) == ("c.safetensors", "d.safetensors")
    late = file_metadata(change(config, ["lora.max_sigma=0.9"]), "step-000001", generator_config("toyworld"), "")
    assert "max_sigma" not in training_facts(made) and training_facts(late)["max_sigma"] == "0.9"


def test_metadata(tmp_path) -> None:
    lora, _ = trained()
    for form, alpha in [("comfyui", str(float(RANK))), ("diffusers", str(ALPHA)), ("kohya", str(ALPHA))]:
        output, title = tmp_path / f"{form}.safetensors", {"modelspec.title": "a title"}
        path, _ = export_lora(lora, form, torch.bfloat16, output, tiny_transformer(), title)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        assert metadata["modelspec.title"] == "a title"
        assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == (str(RANK), alpha)
        assert (metadata["lowmem_drf.rank"], metadata["lowmem_drf.alpha"]) == (str(RANK), str(ALPHA))
        other = model_hash(save(load_file(path), {"other": "header"}))
        assert metadata["sshs_model_hash"] == model_hash(path.read_bytes()) == other
        assert ("lora_adapter_metadata" in metadata) == (form == "diffusers"), "in a folded file it would scale twice"


def test_verification_catches_a_wrong_file(tmp_path) -> None:
    lora, _ = trained()
    good = to_format(lora, "comfyui", torch.float32, wan)
    first, last = next(iter(good)), next(reversed(good))
    one_value = good[first] + 1e-4 * (torch.arange(good[first].numel()) == 0).view_as(good[first])
    wrong = {
        "scaled twice": {k: v * (ALPHA / RANK) if "lora_A" in k else v for k, v in good.items()},
        "one value": {**good, first: one_value},
        "a module less": {k: v for k, v in good.items() if not k.startswith(last.rsplit(".lora_", 1)[0])},
        "unreadable": {**good, "diffusion_model.strange.lora_A.weight": good[first].clone()},
    }
    for name, tensors in wrong.items():
        path = tmp_path / "x.safetensors"
        save_file(tensors, path)
        base = tiny_transformer()
        with pytest.raises(LowmemError, match="exported file") as error:
            verify_export(path, lora, "comfyui", torch.float32, base)
        assert error.value.exit_code == 1, name
        assert torch.equal(velocity(base), velocity(tiny_transformer())) and not lora_layers(base)


def test_an_untrained_lora_exports(tmp_path) -> None:
    transformer = tiny_transformer()
    add_lora(transformer, rank=RANK, alpha=ALPHA)
    lora = LoraChanges.from_state(lora_state(transformer), ALPHA)
    _, verified = export_lora(lora, "comfyui", torch.float16, tmp_path / "l.safetensors", tiny_transformer(), {})
    assert verified.effect == 0 and verified.difference == 0


def test_tiny_values_survive_fp16(tmp_path) -> None:
    """After the first updates B is near 1e-5, where fp16 has few digits; the bound allows for it."""
    lora, _ = trained()
    small = LoraChanges.from_state({k: v * 1e-5 if "lora_B" in k else v for k, v in lora.state().items()}, ALPHA)
    _, verified = export_lora(small, "comfyui", torch.float16, tmp_path / "l.safetensors", tiny_transformer(), {})
    assert 0 < verified.difference < verified.effect


def test_values_beyond_fp16_are_refused(tmp_path) -> None:
    lora, _ = trained()
    large = LoraChanges.from_state({k: v * 1e6 if "lora_B" in k else v for k, v in lora.state().items()}, ALPHA)
    with pytest.raises(BadInputError, match="--dtype bf16"):
        export_lora(large, "comfyui", torch.float16, tmp_path / "l.safetensors", tiny_transformer(), {})
    assert not list(tmp_path.iterdir())


def test_modules_outside_the_blocks_go_to_diffusers_only(tmp_path) -> None:
    transformer = tiny_transformer()
    add_lora(transformer, rank=RANK, alpha=ALPHA, targets=["proj_out", "to_q"])
    randomise_lora(transformer)
    lora = LoraChanges.from_state(lora_state(transformer), ALPHA)
    for form in ("comfyui", "kohya"):
        with pytest.raises(BadInputError, match="proj_out.*--format diffusers"):
            export_lora(lora, form, torch.float32, tmp_path / "l.safetensors", tiny_transformer(), {})
    export_lora(lora, "diffusers", torch.float32, tmp_path / "l.safetensors", tiny_transformer(), {})


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge(dtype: str, tmp_path) -> None:
    lora, tuned = trained()
    verified = merge_lora(lora, DTYPES[dtype], tmp_path / "merged", tiny_transformer())
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]
    merged = load_denoiser(str(tmp_path / "merged"))
    wanted = velocity(tuned)
    # in 16 bits every weight of the model is rounded, not only the LoRA's
    largest = float(wanted.abs().max()) * 6 * len(merged.blocks)
    assert (velocity(merged) - wanted).abs().max() < allowed(dtype, largest)
    assert verified.difference < allowed(dtype, largest)
    stored = load_file(tmp_path / "merged/transformer/diffusion_pytorch_model.safetensors")
    assert stored["blocks.0.attn1.to_q.weight"].dtype == DTYPES[dtype]
    assert stored["blocks.0.norm2.weight"].dtype == torch.float32


@pytest.mark.parametrize("wrong", ["file", "reader"])
def test_a_wrong_merge_is_found_and_deleted(wrong: str, tmp_path, monkeypatch) -> None:
    base = tiny_transformer()
    save_pretrained, load_as_diffusers = base.save_pretrained, verify.load_as_diffusers

    def other_file(folder: Path) -> None:
        save_pretrained(folder)
        file = folder / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        save_file(tensors | {"proj_out.bias": tensors["proj_out.bias"] + 1}, file, metadata={"format": "pt"})

    def other_reader(*arguments):
        model = load_as_diffusers(*arguments)
        model.proj_out.bias.data = model.proj_out.bias.data + 1
        return model

    if wrong == "file":
        base.save_pretrained = other_file
    else:
        monkeypatch.setattr(verify, "load_as_diffusers", other_reader)
    with pytest.raises(LowmemError, match="not written correctly: proj_out.bias differs"):
        merge_lora(trained()[0], torch.bfloat16, tmp_path / "merged", base)
    assert not list(tmp_path.iterdir())


def test_a_model_in_16_bits_computes_in_fp32_block_by_block(tmp_path) -> None:
    from diffusers import WanTransformer3DModel

    tiny_transformer().bfloat16().save_pretrained(tmp_path)
    whole, stored = (
        verify.load_as_diffusers(WanTransformer3DModel, tmp_path, "", dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    with verify.computing_in_fp32(stored):
        assert torch.equal(velocity(stored), velocity(whole))
        assert torch.equal(velocity(stored), velocity(whole)), "the blocks have their weights again"
    assert stored.blocks[1].ffn.net[2].weight.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A folder with a tiny generator and the run ``my-run`` on it, with checkpoints of steps 5 and 10."""
    place = tmp_path_factory.mktemp("written")
    generator = save_tiny_generator(place / "generator")
    folder = place / "my-run"
    (place / "preset.toml").write_text(
        f'model.id = "{generator}"\nlora = {{rank = {RANK}, alpha = {ALPHA}}}\n'
        "video = {width = 32, height = 32, frames = 9}\n"
    )
    config = load_config(place / "preset.toml")
    for step in (5, 10):
        lora, _ = trained()
        state = {k: v * step / 10 for k, v in lora.state().items()}
        save_checkpoint(folder, Checkpoint(step, state, {}, Cursor(), ""), ALPHA, keep=2)
    (folder / "config.toml").write_text(to_toml(config))
    return place


@pytest.fixture
def run(written: Path, tmp_path) -> Path:
    """A copy of the run's folder."""
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    config = tmp_path / "my-run/config.toml"
    config.write_text(config.read_text().replace(str(written), str(tmp_path)))
    return tmp_path / "my-run"


def contents(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def test_export_run_defaults(run: Path) -> None:
    exported = export_run(run)
    assert exported.paths == (run / "my-run-step-000010.comfyui.safetensors",)
    assert "loads in ComfyUI" in str(exported) and "Verified: read back by diffusers" in str(exported)
    lora, tuned = trained()
    effect = float((velocity(tuned) - velocity(tiny_transformer())).abs().max())
    assert (by_diffusers(exported.paths[0]) - velocity(tuned)).abs().max() < allowed("bf16", effect)
    with safe_open(exported.paths[0], "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.architecture"] == "wan2.1/lora" and metadata["modelspec.resolution"] == "32x32"
    assert metadata["ss_steps"] == metadata["lowmem_drf.steps"] == "10"
    ours = {f"lowmem_drf.{key}" for key in ("critic", "graded_steps", "config_sha256")}
    assert ours | {"ss_base_model_version"} <= metadata.keys()


def test_the_default_dtype_is_the_runs(run: Path) -> None:
    config = run / "config.toml"
    config.write_text(config.read_text().replace('dtype = "bf16"', 'dtype = "fp32"'))
    exported = export_run(run)
    assert {tensor.dtype for tensor in load_file(exported.paths[0]).values()} == {torch.float32}
    assert ", fp32, rank 2)" in str(exported)
    assert (by_diffusers(exported.paths[0]) - velocity(trained()[1])).abs().max() < 1e-4


def test_export_run_reproduces_the_tuned_model_in_fp32(run: Path, tmp_path) -> None:
    for form in ("comfyui", "diffusers"):
        exported = export_run(run, form=form, dtype="fp32", output=tmp_path / f"new/{form}.safetensors")
        assert (by_diffusers(exported.paths[0]) - velocity(trained()[1])).abs().max() < 1e-4


def test_export_run_step_folder_and_merge(run: Path, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    early = export_run(run, step=5, form="kohya", output=tmp_path / "out")
    assert early.paths == (tmp_path / "out/my-run-step-000005.kohya.safetensors",)
    merged = export_run(run, dtype="fp32", merge=tmp_path / "merged")
    assert merged.paths == (tmp_path / "merged",) and not list(run.glob("*.safetensors"))
    assert (velocity(load_denoiser(str(tmp_path / "merged"))) - velocity(trained()[1])).abs().max() < 1e-4
    both = export_run(run, dtype="fp32", output=tmp_path / "l.safetensors", merge=tmp_path / "merged2")
    assert [p.exists() for p in both.paths] == [True, True]


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_run_on_packed_weights_is_exported_from_full_ones(quant: str, run: Path, tmp_path) -> None:
    config = run / "config.toml"
    config.write_text(config.read_text().replace('quant = "none"', f'quant = "{quant}"', 1))
    assert run_config(run).model.quant == quant
    exported = export_run(run, dtype="fp32", output=tmp_path / "l.safetensors", merge=tmp_path / "merged")
    assert f"sampled on {quant} ones" in str(exported)
    for said in (by_diffusers(exported.paths[0]), velocity(load_denoiser(str(tmp_path / "merged")))):
        assert (said - velocity(trained()[1])).abs().max() < 1e-4
    with safe_open(exported.paths[0], "pt") as file:
        assert file.metadata()["lowmem_drf.quant"] == quant


def test_a_base_that_the_host_has_no_room_for(run: Path, tmp_path, monkeypatch) -> None:
    """Only the first blocks are loaded. The file is the same, wrong weights are found in all blocks, a merge is
    refused."""
    whole = export_run(run, output=tmp_path / "whole.safetensors")
    monkeypatch.setattr(command, "available_host_bytes", lambda: command.HOST_MARGIN + 1000)
    monkeypatch.setattr(command, "FEW", 1)
    part = export_run(run, output=tmp_path / "part.safetensors")
    assert "first 1 blocks (of 2; the weights of all were compared)" in str(part) and "blocks" not in str(whole)
    files = [load_file(made.paths[0]) for made in (whole, part)]
    assert files[0].keys() == files[1].keys() and all(
        torch.equal(tensor, files[1][name]) for name, tensor in files[0].items()
    )
    with pytest.raises(LowmemError, match="--merge needs the whole transformer in fp32"):
        export_run(run, merge=tmp_path / "merged")

    def wrong(*arguments):
        tensors = to_format(*arguments)
        last = max(name for name in tensors if "blocks.1." in name)
        return tensors | {last: tensors[last] * 1.1}

    monkeypatch.setattr(export, "to_format", wrong)
    with pytest.raises(LowmemError, match="differs from the LoRA by more than"):
        export_run(run, output=tmp_path / "wrong.safetensors")


@pytest.mark.parametrize(("made", "products"), [("file", 8), ("merged", 1)])
def test_few_products_are_alive_at_once(made: str, products: int, tmp_path) -> None:
    """All products in fp64 would take more memory than the model. For one module, an export holds B A as read and as
    wanted, their difference and its size, two products and their difference for the bound, and the slack; a merge
    holds only B A. The low-rank factors together are smaller than one product."""
    layers = 8
    transformer = tiny_transformer(layers=layers)
    add_lora(transformer, rank=RANK, alpha=ALPHA)
    randomise_lora(transformer)
    lora = LoraChanges.from_state(lora_state(transformer), ALPHA)
    sizes = [8 * len(b) * a.shape[1] for a, b in ((pair.a, pair.b) for pair in lora.pairs.values())]
    base = tiny_transformer(layers=layers)
    with Allocated(torch.float64) as counted:
        if made == "file":
            export_lora(lora, "comfyui", torch.bfloat16, tmp_path / "l.safetensors", base, {})
        else:
            merge_lora(lora, torch.bfloat16, tmp_path / "merged", base)
    assert max(sizes) <= counted.peak <= (products + 1) * max(sizes) < sum(sizes) / 2
    with Allocated(torch.float64) as counted:
        kept = [lora.delta(module) for module in lora.pairs]
    assert counted.peak >= sum(product.nbytes for product in kept) == sum(sizes), "it sees what is held"


def test_the_check_of_memory_counts_what_an_export_takes(run: Path, monkeypatch) -> None:
    """With one byte less than needed, only the first blocks are loaded."""
    needed = export.host_bytes(tiny_transformer(), trained()[0])
    for free, part in ((needed, False), (needed - 1, True)):
        monkeypatch.setattr(command, "available_host_bytes", lambda free=free: command.HOST_MARGIN + free)
        monkeypatch.setattr(command, "FEW", 1)
        assert ("first 1 blocks" in str(export_run(run))) is part


def test_blocks_that_are_not_read_take_no_memory(run: Path) -> None:
    config = run_config(run)
    transformer = load_transformer(config, Path(config.model.id), torch.float32, torch.device("cpu"), blocks=1)
    first, second = (sum(p.untyped_storage().nbytes() for p in block.parameters()) for block in transformer.blocks)
    assert first > 10_000 and second == 4 * len(list(transformer.blocks[1].parameters()))


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (dict(form="comfy"), "comfyui, diffusers, kohya"),
        (dict(dtype="int8"), "bf16, fp16, fp32"),
        (dict(step=7), "no checkpoint of step 7"),
        (dict(output=Path("lora.pt")), ".safetensors"),
        (dict(merge=Path(__file__)), "exists already"),
        (dict(output=Path("/proc/none/l.safetensors")), "cannot be written"),
        (dict(merge=Path("/proc/none/merged")), "cannot be written"),
    ],
    ids=["format", "dtype", "step", "suffix", "merge exists", "output unwritable", "merge unwritable"],
)
def test_bad_input_leaves_nothing_behind(call: dict, reason: str, run: Path) -> None:
    before = contents(run)
    with pytest.raises(BadInputError, match=reason):
        export_run(run, **call)
    assert contents(run) == before


def test_an_export_replaces_an_export_and_nothing_else(run: Path, tmp_path) -> None:
    checkpoint = run / "checkpoints/step-000010/lora.safetensors"
    theirs, own, link = (tmp_path / f"{name}.safetensors" for name in ("theirs", "own", "link"))
    shutil.copy(checkpoint, theirs)
    link.symlink_to(own)
    for step in (5, 10):
        export_run(run, step=step, output=link)
        with safe_open(own, "pt") as file:
            assert link.is_symlink() and file.metadata()["ss_steps"] == str(step)
    before = theirs.read_bytes()
    for output, force, reason in (
        (theirs, False, "replace it with --force"),
        (checkpoint, True, "belongs to the run"),
        (run / "checkpoints/step-000010", True, "belongs to the run"),
    ):
        with pytest.raises(BadInputError, match=reason):
            export_run(run, output=output, force=force)
    with pytest.raises(BadInputError, match="belongs to the run"):
        export_run(run, merge=checkpoint.parent / "merged", force=True)
    assert theirs.read_bytes() == checkpoint.read_bytes() == before
    export_run(run, output=theirs, force=True)
    assert theirs.read_bytes() != before
    (tmp_path / "merged").mkdir()
    (tmp_path / "to merged").symlink_to("merged")
    export_run(run, merge=tmp_path / "to merged")
    assert (tmp_path / "to merged").is_symlink() and (tmp_path / "merged/transformer/config.json").is_file()


def test_a_run_whose_base_is_gone_or_another(run: Path, tmp_path) -> None:
    before = contents(run)
    config = tmp_path / "generator/transformer/config.json"
    tiny_transformer(layers=1).save_pretrained(tmp_path / "generator/transformer")
    with pytest.raises(BadInputError, match="does not fit this model"):
        export_run(run)
    config.unlink()
    with pytest.raises(BadInputError, match="transformer/config.json is missing"):
        export_run(run)
    assert contents(run) == before


def test_files_that_are_no_safetensors_are_refused(tmp_path) -> None:
    with pytest.raises(BadInputError, match="no file"):
        read_lora(tmp_path / "none.safetensors")
    (tmp_path / "x.safetensors").write_text("a pickle, perhaps")
    with pytest.raises(BadInputError, match="header of a safetensors file"):
        read_lora(tmp_path / "x.safetensors")
    lora, _ = trained("one block")
    damaged = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": "many"})}
    save_file(lora.state(), tmp_path / "y.safetensors", metadata=damaged)
    with pytest.raises(BadInputError, match="header is damaged"):
        read_lora(tmp_path / "y.safetensors")
