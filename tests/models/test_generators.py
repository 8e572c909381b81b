"""The configurations that are known without files, and where the configuration of any other generator comes from."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from _tiny import save_tiny_generator
from transformers import CLIPVisionConfig, CLIPVisionModel

from lowmem_drf.config import load_config
from lowmem_drf.errors import BadInputError
from lowmem_drf.models.generators import KNOWN_GENERATORS, SUBFOLDERS, family_of, generator_config, image_use
from lowmem_drf.planner.cards import card_named
from lowmem_drf.planner.plan import make_plan
from lowmem_drf.preset_files import presets


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty cache of the hub. Returns a function that puts a model folder into it under an id."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))

    def put(hub_id: str, folder) -> None:
        repository = cache / f"models--{hub_id.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        shutil.copytree(folder, repository / "snapshots" / ("0" * 40))

    return put


@pytest.mark.parametrize("name", KNOWN_GENERATORS)
def test_sizes_are_those_written_down(name: str) -> None:
    known, family = KNOWN_GENERATORS[name], family_of(KNOWN_GENERATORS[name].config)
    models = {
        "transformer": family.empty_transformer(known.config.transformer),
        "vae": family.empty_vae(known.config.vae),
        "text": family.empty_text(known.config.text),
    }
    models |= {name: family.empty_text(config) for name, config in known.config.more_text.items()}
    if known.config.transformer_2:
        models["transformer_2"] = family.empty_transformer(known.config.transformer_2)
    if known.config.image:
        with torch.device("meta"):
            models["image"] = CLIPVisionModel(CLIPVisionConfig.from_dict(known.config.image))
    assert models.keys() == known.parameters.keys()
    for field, model in models.items():
        assert sum(parameter.numel() for parameter in model.parameters()) == known.parameters[field], field
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    transformer, vae = models["transformer"].config, models["vae"].config
    sizes = family.sizes(known.config.transformer, known.config.vae)
    taken = () if image_use(known.config) == "must" else (transformer.in_channels,)
    channels = {*taken, transformer.out_channels, vae.get("z_dim") or vae.latent_channels}
    channels |= {len(vae[key]) for key in ("latents_mean", "latents_std") if vae.get(key)}
    assert channels == {sizes.channels}
    last = models[["text", *known.config.more_text][-1]]  # T5, of several
    assert sizes.text_dim == last.config.d_model


def prompts_with_an_image(folder: Path) -> Path:
    """A file of one. The image is not read for a plan."""
    (folder / "image.png").touch()
    row = {"prompt": "a red circle moves left on a gray background", "image": "image.png"}
    (folder / "prompts.jsonl").write_text(json.dumps(row))
    return folder / "prompts.jsonl"


PLANNED_WHOLE = {load_config(name).model.id for name in presets()}
"""By ``tests/planner/test_preset_plans.py``."""


@pytest.mark.parametrize("name", [name for name in KNOWN_GENERATORS if name not in PLANNED_WHOLE])
def test_every_one_can_be_planned(name: str, monkeypatch, tmp_path) -> None:
    """Two blocks at their true width, on ToyWorld's clips. Of two transformers one is on the card."""
    known = KNOWN_GENERATORS[name].config
    short = {
        field: config | {"num_layers": 2}
        for field in ("transformer", "transformer_2")
        if (config := getattr(known, field))
    }
    monkeypatch.setattr("lowmem_drf.planner.plan.generator_config", lambda place: replace(known, **short))
    settings = (
        "video.width=64",
        "video.height=64",
        "batch=1",
        "micro_batch=1",
        "sampler.graded_steps=1",
        "sampler.shift=3",  # each of two transformers has a step of two
        "sampler.steps=2",
        'memory.park=["transformer"]',
        f"lora.targets={json.dumps([*family_of(known).NAMES.linears])}",
        *([f"prompts={prompts_with_an_image(tmp_path)}"] if image_use(known) == "must" else []),
        f"model.text_tokens={known.transformer.get('max_text_seq_length', 16)}",
    )
    if not family_of(known).sizes(known.transformer, known.vae).temporal:
        settings = (*settings, "video.frames=1", "critic.frames=1")
    plan = make_plan(
        load_config("toy", [f'model.id="{name}"', *settings]), card_named("RTX 4090"), only="denoise_backward"
    )
    transformer = family_of(known).empty_transformer(short["transformer"])
    parameters = sum(tensor.numel() for tensor in (*transformer.parameters(), *transformer.buffers()))
    for stage in ("rollout", "denoise_backward"):
        gone = plan.stages[stage].weights_gib - plan.stages["decode"].weights_gib
        assert gone == pytest.approx(4 * parameters / 1024**3, rel=0.01), stage


def test_what_diffusers_has_as_defaults() -> None:
    """Its own are those of Wan2.1-14B and of Wan2.1's VAE, and of LTX-Video's and CogVideoX-2b's transformer and
    VAE."""
    from diffusers import (
        AutoencoderKLCogVideoX,
        AutoencoderKLLTXVideo,
        AutoencoderKLWan,
        CogVideoXTransformer3DModel,
        LTXVideoTransformer3DModel,
        WanTransformer3DModel,
    )

    known = KNOWN_GENERATORS["Wan-AI/Wan2.1-T2V-14B-Diffusers"].config
    with torch.device("meta"):
        transformer, vae = WanTransformer3DModel(), AutoencoderKLWan()
    assert {**transformer.config} | known.transformer | {"patch_size": (1, 2, 2)} == {**transformer.config} | {
        "_class_name": "WanTransformer3DModel"
    }
    assert {**vae.config} | known.vae == {**vae.config} | {"_class_name": "AutoencoderKLWan"}
    ltx = KNOWN_GENERATORS["Lightricks/LTX-Video"].config
    cogvideox = KNOWN_GENERATORS["zai-org/CogVideoX-2b"].config
    for kind, written in (
        (LTXVideoTransformer3DModel, ltx.transformer),
        (AutoencoderKLLTXVideo, ltx.vae),
        (CogVideoXTransformer3DModel, cogvideox.transformer),
        (AutoencoderKLCogVideoX, cogvideox.vae),
    ):
        with torch.device("meta"):
            own = json.loads(json.dumps({**kind().config}))
        assert own | written == own | {"_class_name": kind.__name__}


def test_a_known_id_needs_nothing_on_the_disk(hub_cache) -> None:
    assert (
        generator_config("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
        is KNOWN_GENERATORS["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"].config
    )


def test_a_folder_says_it_itself(tmp_path) -> None:
    folder = save_tiny_generator(tmp_path)
    config = generator_config(str(folder))
    for field, subfolder in SUBFOLDERS.items():
        assert getattr(config, field) == json.loads((folder / subfolder / "config.json").read_text())
    assert generator_config("toyworld").transformer["num_layers"] == 4


def test_an_id_in_the_hubs_cache(tmp_path, hub_cache) -> None:
    folder = save_tiny_generator(tmp_path / "model")
    hub_cache("someone/wan-tiny", folder)
    assert generator_config("someone/wan-tiny") == generator_config(str(folder))


@pytest.mark.parametrize("name", ["someone/wan-unknown", "/no/such/folder", "one word"])
def test_what_is_not_here(name: str, hub_cache) -> None:
    with pytest.raises(BadInputError, match="hf download"):
        generator_config(name)


def test_a_folder_of_another_model_or_damaged(tmp_path) -> None:
    folder = save_tiny_generator(tmp_path)
    file = folder / "transformer" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"_class_name": "HunyuanVideoTransformer3DModel"}))
    with pytest.raises(BadInputError, match="HunyuanVideoTransformer3DModel in transformer"):
        generator_config(str(folder))
    for text in ("{", "[]"):
        file.write_text(text)
        with pytest.raises(BadInputError, match="cannot be read"):
            generator_config(str(folder))
    file.unlink()
    with pytest.raises(BadInputError, match="lacks transformer/config.json"):
        generator_config(str(folder))
