"""Clips that begin with an image: what diffusers' pipeline makes, and gradients that are those of its transformer."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from _blocks import STORE
from _relay import LIMIT, lora_gradients
from _relay import relative_difference as relative_norm
from _tiny import randomise_lora, relative_difference, tiny_condition, tiny_transformer
from _toys import CHANNELS, QUESTIONS, STEPS, plan_of, toy_parts
from _wan_images import KINDS, MODELS, TOKENS, save_tiny_i2v, tiny_image
from safetensors.torch import load_file, save_file

from lowmem_drf.errors import BadInputError
from lowmem_drf.export.export import export_lora
from lowmem_drf.memory.recorded_rollout import Recorder
from lowmem_drf.memory.streaming import Streamed
from lowmem_drf.method.naive import naive_step
from lowmem_drf.method.schedule import draw_noise, flow_sigmas, timestep_of
from lowmem_drf.method.step import drf_step, rollout
from lowmem_drf.models.blocks import Activations
from lowmem_drf.models.experts import two_experts
from lowmem_drf.models.family import ImageCondition
from lowmem_drf.models.generators import generator_config, image_use
from lowmem_drf.models.lora.adapter import DEFAULT_TARGETS, add_lora, lora_parameters, lora_state
from lowmem_drf.models.lora.changes import LoraChanges
from lowmem_drf.models.lora.reading import read_lora
from lowmem_drf.models.wan import family as wan
from lowmem_drf.models.wan import images
from lowmem_drf.models.wan.denoiser import as_velocity, set_activations
from lowmem_drf.models.wan.names import wan_name
from lowmem_drf.models.wan.single_file import load_single_file
from lowmem_drf.models.weights.downloads import _wanted
from lowmem_drf.models.weights.files import find_problems
from lowmem_drf.models.weights.reader import parameter_shapes

CPU, FP64 = torch.device("cpu"), torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_clips_are_those_of_the_pipeline(kind, tmp_path) -> None:
    """From the folder, an image and a prompt to latents, with guidance."""
    from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline

    folder = str(save_tiny_i2v(tmp_path, kind))
    pipe = WanImageToVideoPipeline.from_pretrained(folder)
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, disable_corrector=[*range(4)])
    pipe.set_progress_bar_config(disable=True)
    generator = generator_config(folder)
    sizes = wan.sizes(generator.transformer, generator.vae)
    image, noise = tiny_image(8 * sizes.spatial, 4 * sizes.spatial), draw_noise((sizes.channels, 3, 4, 8), [0])
    wanted = pipe(
        image, "a red circle", "blue", height=image.height, width=image.width, num_frames=9, num_inference_steps=4,
        guidance_scale=2.0, latents=noise.clone(), output_type="latent", max_sequence_length=512,
    ).frames  # fmt: skip

    encoded = images.encoder(folder, generator, wan.load_vae(folder)).encode(image, 9)
    tokens = None if encoded.tokens_LD is None else encoded.tokens_LD[None]
    texts = wan.load_text(folder).encode(["a red circle", "blue"]).split(1)
    conditions = [ImageCondition(text, encoded.latents_CFhw[None], tokens) for text in texts]
    velocities = []
    for subfolder in ("transformer", "transformer_2")[: 1 if generator.boundary is None else 2]:
        transformer = wan.load_transformer(folder, subfolder=subfolder)
        set_activations(transformer)
        velocities.append(as_velocity(transformer))
    velocity = velocities[0]
    if generator.boundary is not None:
        velocity = two_experts(velocity, velocities[1], "high", generator.boundary, lambda name: None)
    with torch.no_grad():
        x_0 = rollout(velocity, flow_sigmas(4, 3.0), noise, *conditions, 2.0)[0]
    assert relative_difference(x_0, wanted) < 1e-4
    if generator.first_frame:
        assert image_use(generator) == "may"
        assert torch.allclose(x_0[:, :, :1], conditions[0].latents_BCFhw, rtol=0, atol=1e-6)
    else:
        assert image_use(generator) == "must" and sizes.channels * 2 + 4 == generator.transformer["in_channels"]


@pytest.fixture
def fp64_arithmetic(monkeypatch) -> None:
    """Diffusers computes norms and modulations in fp32, even in an fp64 model."""
    to_fp32 = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == FP64 else to_fp32(x))


def tuned(kind: str, **settings: Any) -> Any:
    transformer = tiny_transformer(FP64, **MODELS[kind][0] | {"layers": 2} | settings)
    of_images = wan.NAMES.image_linears if transformer.config.image_dim else ()
    add_lora(transformer, rank=2, alpha=2.0, targets=[*DEFAULT_TARGETS, *of_images])
    randomise_lora(transformer)
    return transformer


def condition(transformer: Any, clips: int, text: int = 512, seed: int = 0) -> ImageCondition:
    config = transformer.config
    first = config.in_channels == config.out_channels
    shape = (config.out_channels, 1, 4, 4) if first else (config.in_channels - config.out_channels, 3, 4, 4)
    tokens = draw_noise((1, 1, TOKENS, config.image_dim), range(clips))[:, 0, 0] if config.image_dim else None
    return ImageCondition(tiny_condition(clips, tokens=text, seed=seed), draw_noise(shape, range(clips)), tokens)


def gradients(velocity: Any, transformer: Any, cond: ImageCondition) -> list[torch.Tensor]:
    x = draw_noise((transformer.config.out_channels, 3, 4, 4), [8, 9]).double().requires_grad_()
    v = velocity(x, 0.7, cond)
    upstream = draw_noise(v.shape[1:], [5, 6]).double()
    return [v.detach(), *torch.autograd.grad(v, [*lora_parameters(transformer), x], upstream)]


@cache
def wanted(kind: str) -> list[torch.Tensor]:
    """By diffusers' own transformer and blocks, as the pipeline calls it: a timestep for every token."""
    transformer = tuned(kind)

    def velocity(x: torch.Tensor, sigma: float, cond: ImageCondition) -> torch.Tensor:
        t, given = torch.full((2,), float(timestep_of(sigma))), cond.latents_BCFhw.double()
        tokens = None if cond.tokens_BLD is None else cond.tokens_BLD.double()
        if given.shape[2] > 1:
            return transformer(torch.cat([x, given], 1), t, cond.text_BLD, tokens, return_dict=False)[0]
        every = torch.cat([torch.zeros(2, 4), t[:, None].expand(2, 8)], 1)
        x, noise = torch.cat([given, x[:, :, 1:]], 2), x[:, :, :1]
        v = transformer(x, every, cond.text_BLD, return_dict=False)[0]
        return torch.cat([(noise - given) / sigma, v[:, :, 1:]], 2)

    return gradients(velocity, transformer, condition(transformer, 2))


SETTINGS: dict[str, dict[str, Any]] = {
    "whole": {"checkpoint": False},
    "kept": {"slices": 3, "checkpoint": "host", "keep_attention": "host"},
    "streamed": {"slices": 5},  # of 12 tokens: the first frame's 4 end within one
    "recorded": {"keep_attention": "card"},
}


@pytest.mark.parametrize("how", SETTINGS)
@pytest.mark.parametrize("kind", ["wan2.1-i2v", "wan2.2-ti2v"])
def test_gradients_are_those_of_a_timestep_for_each_token(kind, how: str, fp64_arithmetic) -> None:
    transformer, settings = tuned(kind), dict(SETTINGS[how])
    cond = condition(transformer, 2)
    recorder = Recorder(STORE, attentions=True) if how == "recorded" else None
    if how == "streamed":
        settings["streamed"] = Streamed(list(transformer.blocks), CPU, STORE)
    set_activations(transformer, Activations(store=STORE, recorder=recorder, **settings))
    velocity = as_velocity(transformer, recorder)
    if recorder is None:
        got = gradients(velocity, transformer, cond)
    else:

        def replayed(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
            with torch.no_grad(), recorder.record(0, [cond]):
                velocity(x, *arguments)
            with recorder.replay(0, cond):
                return velocity(x, *arguments)

        got = gradients(replayed, transformer, cond)
    assert len(got) == len(wanted(kind)) and all(tensor.any() for tensor in got)
    assert max(map(relative_difference, got, wanted(kind))) < 1e-12


STEPS_OF = {"wan2.1-i2v": (1, 3, STEPS), "wan2.2-i2v": (3,), "wan2.2-ti2v": (1, 3, STEPS)}


@pytest.mark.parametrize(("kind", "k"), [(kind, k) for kind, counts in STEPS_OF.items() for k in counts])
def test_relay_is_naive_with_an_image(kind, k: int, fp64_arithmetic) -> None:
    """The real transformer before a decoder and a critic of a few lines."""
    taken = CHANNELS if kind == "wan2.2-ti2v" else 2 * CHANNELS + 4
    transformer = tuned(kind, in_channels=taken, out_channels=CHANNELS, layers=1)
    set_activations(transformer, Activations(slices=2))
    parts = replace(toy_parts(), velocity=as_velocity(transformer), lora=lora_parameters(transformer))
    noise = draw_noise((CHANNELS, 3, 4, 4), [0]).double()
    batch = (noise, condition(transformer, 1, 6), condition(transformer, 1, 6, seed=1), [QUESTIONS])
    plan = plan_of(range(STEPS - k, STEPS), guidance=2.0)
    expected, naive = lora_gradients(naive_step, parts, plan, *batch)
    actual, stats = lora_gradients(drf_step, parts, plan, *batch)
    assert relative_norm(actual, expected) < LIMIT
    assert stats.reward == pytest.approx(naive.reward, abs=1e-12)


@pytest.mark.parametrize("of_images", [True, False])
def test_exports_are_the_tuned_model(of_images: bool, tmp_path) -> None:
    """Loaded by diffusers, which adds pairs of zeros for an image where a file has none."""
    settings = MODELS["wan2.1-i2v"][0] | {"layers": 1}
    targets = [*DEFAULT_TARGETS, *(wan.NAMES.image_linears if of_images else ())]
    transformer = tiny_transformer(**settings)
    add_lora(transformer, rank=2, alpha=3.0, targets=targets)
    randomise_lora(transformer)
    lora = LoraChanges.from_state(lora_state(transformer), 3.0)
    assert wan.pipeline(transformer).__class__.__name__ == "WanImageToVideoPipeline"
    for form in ("comfyui", "diffusers", "kohya") if of_images else ("comfyui",):
        path, made = export_lora(lora, form, torch.float32, tmp_path / form, tiny_transformer(**settings), {})
        assert made.by == "diffusers" and made.effect > 0.05 and made.difference < 1e-4
        read = read_lora(path)
        assert read.pairs.keys() == lora.pairs.keys()
        header = {name: {"shape": tensor.shape, "dtype": "F32"} for name, tensor in load_file(path).items()}
        said = {verdict.program: verdict.takes for verdict in wan.verdicts(read, header)}
        assert said["diffusers"] == "yes" and said["ComfyUI"] == ("no" if form == "diffusers" else "yes")
        text_to_video = tiny_transformer()
        if of_images:
            with pytest.raises(BadInputError, match=r"this model has no blocks\.0\.attn2\.add_k_proj"):
                read.require_fit(parameter_shapes(text_to_video))


def test_the_probe_uses_every_weight() -> None:
    for kind in KINDS:
        transformer = tiny_transformer(**MODELS[kind][0]).requires_grad_(True)
        x, text, *image = (torch.randn(shape) for shape in wan.probe(transformer.config, 2))
        v = as_velocity(transformer)(x, 0.5, ImageCondition(text, *image) if image else text)
        v.square().sum().backward()
        assert v.shape == x.shape and all(p.grad is not None and p.grad.any() for p in transformer.parameters())
        assert wan.parameter_shapes(transformer.config) == parameter_shapes(transformer)


def test_single_files_fit_their_own_kind(tmp_path) -> None:
    weights = {kind: tiny_transformer(**MODELS[kind][0]).state_dict() for kind in ("wan2.1-i2v", "wan2.2-i2v")}
    weights["t2v"] = tiny_transformer().state_dict()
    for kind, state in weights.items():
        save_file({wan_name(name): value for name, value in state.items()}, tmp_path / f"{kind}.safetensors")
    configs = {kind: {**tiny_transformer(**MODELS.get(kind, ({}, {}))[0]).config} for kind in weights}
    problems = {
        "wan2.1-i2v": {"wan2.2-i2v": r"lacks \d+ tensors", "t2v": "a text-to-video transformer.*takes 4 channels"},
        "wan2.2-i2v": {"wan2.1-i2v": "an image-to-video transformer", "t2v": "a text-to-video transformer"},
        "t2v": {"wan2.1-i2v": "an image-to-video transformer", "wan2.2-i2v": "image-to-video .*takes 12 channels"},
    }
    for model, config in configs.items():
        loaded = load_single_file(tmp_path / f"{model}.safetensors", config, model).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in weights[model].items())
        for file, message in problems[model].items():
            with pytest.raises(BadInputError, match=message):
                load_single_file(tmp_path / f"{file}.safetensors", config, model)


def test_other_kinds_of_models_are_refused(tmp_path) -> None:
    known = generator_config(str(save_tiny_i2v(tmp_path, "wan2.1-i2v")))
    for change, message in (
        ({"pos_embed_seq_len": 514}, "a first and a last image"),
        ({"in_channels": 16}, "takes 16 channels, and its VAE's latents have 4: it is a control model"),
    ):
        with pytest.raises(BadInputError, match=message):
            wan.refuse(replace(known, transformer=known.transformer | change), "a model")
    with pytest.raises(BadInputError, match="lacks image_encoder"):
        wan.refuse(replace(known, image=None), "a model")
    names = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")]
    assert {*_wanted("some/model", "generator", names, ())} >= {name for name in names if "image" in name}
    shutil.rmtree(tmp_path / "image_processor")
    assert [str(problem.file) for problem in find_problems(tmp_path, "generator")] == ["image_processor/"]
