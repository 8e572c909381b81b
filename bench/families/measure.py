"""What is measured of one family: that the method is exact on it, and that its reward rises."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import torch

import lowmem_drf
from bench.families.tiny import clip_of, name_of, tokens_of
from lowmem_drf.assembly.sizes import latent_shape
from lowmem_drf.config import load_config
from lowmem_drf.method.naive import naive_step
from lowmem_drf.method.schedule import draw_noise, flow_sigmas
from lowmem_drf.method.step import StepSpec, drf_step
from lowmem_drf.method.vae_stream import decode
from lowmem_drf.models.family import Family
from lowmem_drf.models.generators import generator_config
from lowmem_drf.models.lora.adapter import add_lora, lora_parameters
from lowmem_drf.toy.captions import train_prompts
from lowmem_drf.types import Parts, Question

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem_drf.api import Run

UPDATES, PROMPTS, NOISES = 20, 8, 16
"""Of a training; its prompts, all of them in every update; and clips of each that it is judged on, of other noise."""
TEXTS = train_prompts()[:: len(train_prompts()) // PROMPTS][:PROMPTS]
SAMPLED = 4
"""Denoising steps, all of them graded."""
RELAY, DECODE, EXPORT, ERRORS = 1e-10, 1e-5, 1e-4, 2.0
"""The most that may differ: LoRA gradients in fp64, relative to their norm; frames in [0, 1]; velocities of an export.
The least rise of the reward, in standard errors."""


def measure(family: Family, folder: Path, work: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """The row of a family.

    Args:
        folder: its tiny generator.
        work: where runs go.
        seeds: of trainings.
    """
    began, clip = time.process_time(), clip_of(name_of(family))
    runs = {seed: trained(family, folder, clip, work / str(seed), seed) for seed in seeds}
    row: dict[str, Any] = {"clip": clip, "relay": relay(family, folder, clip), "decode": decoded(family, folder, clip)}
    row |= {"export": exported(runs[seeds[-1]]), "trainings": {str(seed): rise(run) for seed, run in runs.items()}}
    return row | {"cpu_s": round(time.process_time() - began, 1)}


def passes(row: dict[str, Any]) -> bool:
    """Whether all figures of a row are within their limits."""
    exact = max(row["relay"].values()) < RELAY and row["decode"] < DECODE and row["export"] < EXPORT
    return exact and all(one["rise"] > ERRORS * one["error"] for one in row["trainings"].values())


def noise_of(family: Family, folder: Path, clip: tuple[int, int, int]) -> Tensor:
    """Latents of two clips, fp32."""
    generator = generator_config(str(folder))
    settings = (f"video.{name}={size}" for name, size in zip(("width", "height", "frames"), clip, strict=True))
    config = load_config("toy", [*settings, f"critic.frames={min(clip[2], 9)}"])
    return draw_noise(latent_shape(config, family.sizes(generator.transformer, generator.vae)), range(2))


def relay(family: Family, folder: Path, clip: tuple[int, int, int]) -> dict[str, float]:
    """Relative difference of the LoRA's gradients between the relay and one graph, in fp64, by graded steps."""
    from _tiny import randomise_lora, tiny_critic

    transformer = family.load_transformer(str(folder), torch.float64)
    add_lora(transformer, rank=2, alpha=2.0, targets=list(family.NAMES.linears))
    randomise_lora(transformer)
    family.set_activations(transformer)
    decoder = family.decoder(family.load_vae(str(folder), torch.float64))
    parts = Parts(family.as_velocity(transformer), decoder, tiny_critic(torch.float64), lora_parameters(transformer))
    cond, uncond = embedded(family, folder, [*TEXTS[:2], ""]).double().split([2, 1])
    asked = [(Question("TA", "is the circle red ?", "yes"), Question("VQ", "does it jump ?", "no"))] * 2
    noise, kept = noise_of(family, folder, clip).double(), range(0, clip[2], 2)

    def gradient(step: Any, k: int) -> Tensor:
        for parameter in parts.lora:
            parameter.grad = None
        spec = StepSpec(flow_sigmas(SAMPLED, 3.0), tuple(range(SAMPLED - k, SAMPLED)), guidance=2.0, kept=tuple(kept))
        step(parts, spec, noise, cond, uncond.expand_as(cond), asked)
        return torch.cat([parameter.grad.flatten() for parameter in parts.lora if parameter.grad is not None])

    found = {}
    for k in (1, 3, SAMPLED):
        one = gradient(naive_step, k)
        found[str(k)] = float((gradient(drf_step, k) - one).norm() / one.norm())
    return found


def embedded(family: Family, folder: Path, texts: Sequence[str]) -> Tensor:
    """Of all text encoders: each has zeros where another one has values."""
    names, tokens = generator_config(str(folder)).text_encoders, tokens_of(name_of(family))
    rows = [family.load_text(str(folder), subfolder=name).encode(texts, tokens) for name in names]
    return torch.stack(rows).sum(0)


def decoded(family: Family, folder: Path, clip: tuple[int, int, int]) -> float:
    """Largest difference between frames in chunks and those of the library's decode."""
    vae, latents = family.load_vae(str(folder)), noise_of(family, folder, clip)
    frames, _ = decode(family.decoder(vae), latents, range(clip[2]))
    return float((frames - library_frames(vae, latents)).abs().max())


@torch.no_grad()
def library_frames(vae: Any, latents_BCFhw: Tensor) -> Tensor:
    """diffusers' own decode, (B, T, 3, H, W) in [0, 1]. The normalisation of latents that it leaves to pipelines is
    undone by what the VAE says of it."""

    def said(name: str, default: float) -> Tensor:
        value = vars(vae)["_buffers"].get(name, vae.config.get(name))
        return torch.as_tensor(default if value is None else value, dtype=latents_BCFhw.dtype).view(-1, 1, 1, 1)

    mean, std, scale = said("latents_mean", 0.0), said("latents_std", 1.0), said("scaling_factor", 1.0)
    z = latents_BCFhw * std / scale + mean + said("shift_factor", 0.0)
    images = getattr(vae.decoder.conv_in, "weight", z).ndim == 4  # else (B, C, F, h, w)
    frames = vae.decode(z[:, :, 0]).sample[:, :, None] if images else vae.decode(z).sample
    made: Tensor = (frames * 0.5 + 0.5).clamp(0, 1).transpose(1, 2)
    return made


def trained(family: Family, folder: Path, clip: tuple[int, int, int], run: Path, seed: int) -> Run:
    """A run of ``UPDATES`` updates, by the method of preset ``toy``."""
    width, height, frames = clip
    settings: dict[str, Any] = {
        "model.id": str(folder),
        "model.text_tokens": tokens_of(name_of(family)),
        "video": {"width": width, "height": height, "frames": frames},
        "batch": PROMPTS,
        "sampler": {"steps": SAMPLED, "graded_steps": SAMPLED},
        "critic.frames": min(frames, 9),
        "lora.targets": list(family.NAMES.linears),
        "optim.lr": 2e-2,
        "optim.schedule": "constant",
        "optim.warmup_steps": 0,
        "log": {"watch_every": 0, "eval_prompts": 0, "sample_every": 0},
    }
    return lowmem_drf.train("toy", prompts=TEXTS, output=run, steps=UPDATES, seed=seed, settings=settings)


def exported(run: Run) -> float:
    """Largest difference of the velocity, once diffusers' pipeline has loaded the file."""
    said = "\n".join(lowmem_drf.export_lora(run, format="diffusers").lines)
    found = re.search(r"read back by diffusers; maximum difference from .*? ([\d.e+-]+) ", said)
    assert found, said
    return float(found[1])


def rise(run: Run) -> dict[str, float]:
    """The reward of the base and of the tuned model at the same prompts and noise, and the standard error of the mean
    rise over clips."""
    result = lowmem_drf.evaluate(run, prompts=TEXTS * NOISES, seeds=1)
    base = [row.base["reward"] for row in result.by_prompt]
    tuned = [row.tuned["reward"] for row in result.by_prompt]
    rises = [b - a for a, b in zip(base, tuned, strict=True)]
    return {"base": fmean(base), "tuned": fmean(tuned), "rise": fmean(rises), "error": stdev(rises) / len(rises) ** 0.5}
