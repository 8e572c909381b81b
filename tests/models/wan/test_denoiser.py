"""The Wan transformer as a velocity: WanPipeline's own call, and checkpointing that really recomputes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _tiny import (
    GENERATORS,
    SavedBytes,
    relative_difference,
    save_tiny_generator,
    tiny_condition,
    tiny_latents,
    tiny_text,
    tiny_transformer,
    tiny_vae,
)
from torch.utils.flop_counter import FlopCounterMode

from lowmem_drf.errors import BadInputError
from lowmem_drf.method.schedule import flow_sigmas, timestep_of
from lowmem_drf.method.step import rollout
from lowmem_drf.models.blocks import Activations
from lowmem_drf.models.lora.adapter import add_lora, lora_parameters
from lowmem_drf.models.wan.denoiser import as_velocity, load_denoiser, set_activations


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_timesteps_are_those_of_the_scheduler(shift: float) -> None:
    from diffusers import UniPCMultistepScheduler

    for steps in range(1, 51):
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
        scheduler.set_timesteps(steps)
        sigmas = np.linspace(1, 1e-3, steps + 1)[:-1]
        sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
        sigmas[0] -= 1e-6
        assert [timestep_of(sigma) for sigma in sigmas.tolist()] == scheduler.timesteps.tolist()


def test_euler_with_the_velocity_is_wan_pipeline() -> None:
    """The whole chain, text to latents, against WanPipeline with a first-order solver."""
    from diffusers import UniPCMultistepScheduler, WanPipeline

    from lowmem_drf.models.wan.text import TextEncoder

    model, tokenizer = tiny_text()
    transformer, prompt, noise = tiny_transformer(), "a red circle moves left", tiny_latents(1, dtype=torch.float32)
    settings = dict(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
        solver_order=1,
        disable_corrector=list(range(5)),
    )
    pipe = WanPipeline(tokenizer, model, tiny_vae(), UniPCMultistepScheduler(**settings), transformer)
    pipe.set_progress_bar_config(disable=True)
    call = dict(height=16, width=16, num_frames=9, num_inference_steps=5, max_sequence_length=12, output_type="latent")
    wanted = pipe(prompt, latents=noise.clone(), guidance_scale=1.0, **call).frames

    velocity, condition, x = as_velocity(transformer), TextEncoder(model, tokenizer).encode([prompt], 12), noise
    sigmas = pipe.scheduler.sigmas.tolist()
    with torch.no_grad():
        for sigma, following in zip(sigmas, sigmas[1:], strict=False):
            x = x + (following - sigma) * velocity(x, sigma, condition)
    # UniPC works in half-log-SNR: each step costs it a few more roundings than ours
    assert (x - wanted).abs().max() < 5 * 16 * torch.finfo(torch.float32).eps * wanted.abs().max()


def test_a_timestep_for_each_token_is_one_for_the_clip(monkeypatch) -> None:
    """Wan2.2-TI2V-5B's pipeline expands the timestep to every token (``expand_timesteps``), for videos that begin with
    an image. Without one all are the same, and a timestep per clip is the same computation: to rounding in fp64."""
    to_fp32 = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else to_fp32(x))
    transformer, x, text = (
        tiny_transformer(torch.float64, **GENERATORS["wan2.2-5b"][0]),
        torch.randn(2, 6, 3, 4, 2, dtype=torch.float64),
        tiny_condition(2),
    )
    for sigma in (0.999999, 0.857, 0.25):
        expanded = torch.full((2, 3 * 2 * 1), float(timestep_of(sigma)))
        wanted = transformer(x, expanded, text, return_dict=False)[0]
        assert relative_difference(as_velocity(transformer)(x, sigma, text), wanted) < 1e-12


@pytest.mark.parametrize("name", ["wan2.1-1.3b", "wan2.2-5b"])
def test_the_frames_are_those_of_the_pipeline(name: str) -> None:
    """From noise to pixels, with the pipeline's own settings: for Wan2.2-TI2V-5B ``expand_timesteps`` and a VAE of 16 x
    16 pixels."""
    from diffusers import UniPCMultistepScheduler, WanPipeline

    from lowmem_drf.models.wan.text import TextEncoder
    from lowmem_drf.models.wan.vae.decoder import WanDecoder

    (of_transformer, of_vae), (model, tokenizer) = GENERATORS[name], tiny_text()
    transformer, vae = tiny_transformer(**of_transformer), tiny_vae(**of_vae)
    factor = vae.config.scale_factor_spatial
    noise = torch.randn(1, transformer.config.in_channels, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
        solver_order=1,
        disable_corrector=[*range(3)],
    )
    pipe = WanPipeline(tokenizer, model, vae, scheduler, transformer, expand_timesteps=name == "wan2.2-5b")
    pipe.set_progress_bar_config(disable=True)
    call = dict(
        height=4 * factor,
        width=4 * factor,
        num_frames=9,
        num_inference_steps=3,
        max_sequence_length=12,
        output_type="pt",
    )
    wanted = pipe("a red circle", "blue", latents=noise.clone(), guidance_scale=2.0, **call).frames
    encoder = TextEncoder(model, tokenizer)
    x_0, _ = rollout(
        as_velocity(transformer),
        flow_sigmas(3, 3.0),
        noise,
        encoder.encode(["a red circle"], 12),
        encoder.encode(["blue"], 12),
        2.0,
    )
    with torch.no_grad():
        frames = WanDecoder(vae).decode(x_0)
    assert frames.shape == wanted.shape
    assert (frames - wanted).abs().max() < 1e-4  # a fortieth of what 8 bits of a pixel show


def test_a_clip_does_not_depend_on_its_batch() -> None:
    velocity, x, condition = as_velocity(tiny_transformer(torch.float64)), tiny_latents(3), tiny_condition(3)
    together = velocity(x, 0.5, condition)
    alone = torch.cat([velocity(x[i : i + 1], 0.5, condition[i : i + 1]) for i in range(3)])
    assert (together - alone).abs().max() / alone.abs().max() < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtype_of_the_latents_comes_back_whatever_the_model_computes_in(dtype: torch.dtype, tmp_path) -> None:
    transformer = load_denoiser(str(save_tiny_generator(tmp_path)), dtype)
    add_lora(transformer, rank=2, alpha=2.0)
    v = as_velocity(transformer)(tiny_latents(1, dtype=torch.float32), 0.7, tiny_condition(1, torch.float32))
    assert v.dtype == torch.float32 and torch.isfinite(v).all()


def test_checkpointing_fires_and_changes_no_gradient() -> None:
    transformer = tiny_transformer(torch.float64, layers=4)
    add_lora(transformer, rank=2, alpha=2.0)
    velocity, x, condition = as_velocity(transformer), tiny_latents(2), tiny_condition(2)
    saved, flops, gradients = {}, {}, {}
    for on in (False, True):
        set_activations(transformer, Activations(on))
        transformer.zero_grad()
        with SavedBytes(transformer) as bytes_kept:
            out = velocity(x, 0.5, condition)
        counter = FlopCounterMode(display=False)
        with counter:
            out.square().sum().backward()
        saved[on], flops[on] = bytes_kept.total, counter.get_total_flops()
        gradients[on] = [p.grad.clone() for p in lora_parameters(transformer)]
    assert saved[True] < saved[False] / 4  # one hidden state per block instead of the block
    assert flops[True] > 1.3 * flops[False]  # the forward again, inside the backward
    assert all(torch.equal(a, b) for a, b in zip(gradients[False], gradients[True], strict=True))


def test_no_gradient_keeps_nothing() -> None:
    transformer = tiny_transformer()
    add_lora(transformer, rank=2, alpha=2.0)
    with SavedBytes(transformer) as kept, torch.no_grad():
        as_velocity(transformer)(tiny_latents(1, dtype=torch.float32), 0.5, tiny_condition(1, torch.float32))
    assert kept.total == 0


def test_a_folder_that_is_no_model_is_refused(tmp_path) -> None:
    with pytest.raises(BadInputError, match="Cannot load the transformer from"):
        load_denoiser(str(tmp_path))
