"""Generation without gradients, for samples, comparisons and evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem_drf.assembly.assemble import Models
from lowmem_drf.distributed.ranks import Ranks
from lowmem_drf.method.schedule import flow_sigmas
from lowmem_drf.method.step import rollout
from lowmem_drf.models.lora.adapter import lora_scale
from lowmem_drf.models.lora.levels import up_to
from lowmem_drf.schema import Config
from lowmem_drf.schema.generator import Sampler
from lowmem_drf.types import Prompt


@dataclass(frozen=True)
class Generated:
    """One batch of clips."""

    frames_BTCHW: Tensor
    """Float in [0, 1], on the models' device."""
    velocity_norms: tuple[float, ...]
    """RMS of each clip's velocity, mean over steps."""


@torch.no_grad()
def generate(models: Models, sampler: Sampler, prompts: Sequence[Prompt], seeds: Sequence[int]) -> Generated:
    """A clip per prompt and seed, with the LoRA at its present scale in steps up to ``models.max_sigma``. A clip
    depends only on its own prompt and seed."""
    sigmas = flow_sigmas(sampler.steps, sampler.shift, sampler.timesteps)
    cond, uncond = models.condition(prompts), models.no_condition(prompts)
    norms: list[Tensor] = []
    velocity = up_to(models.max_sigma, models.velocity, models.transformer)
    models.residency.need_for("rollout")
    x_0, _ = rollout(
        velocity, sigmas, models.noise(seeds), cond, uncond, sampler.guidance,
        watch=lambda v: norms.append(v.pow(2).flatten(1).mean(1).sqrt()),
        update=sampler.update, generators=models.generators(seeds),
    )  # fmt: skip
    models.awake("vae")
    return Generated(models.decoder.decode(x_0), tuple(torch.stack(norms).mean(0).tolist()))


NAN = "holds NaN or infinity"
BLACK = 1.5 / 255
"""No pixel of a black clip is brighter."""


def flaw(frames: Tensor) -> str:
    """Why a clip with values in [0, 1] is a wreck; empty if it is none."""
    if not bool(frames.sum(dtype=torch.float32).isfinite()):
        return NAN
    return "is black" if frames.amax().item() < BLACK else ""


def batches(
    models: Models,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    size: int,
    ranks: Ranks,
    unit: int = 1,
) -> Iterator[tuple[range, Generated, bool]]:
    """Yields (indices, clips, new) of batches of ``size`` over this rank's share of the prompts.

    All ranks generate equally many batches, because partitioned weights are gathered by all of them together: a rank
    with fewer prompts repeats the first batch, with ``new`` False. ``unit``: consecutive prompts to keep on one rank.
    """
    parts = [range(part.start * unit, part.stop * unit) for part in ranks.parts(len(prompts) // unit)]
    mine = parts[ranks.rank]
    for number in range(max(-(-len(part) // size) for part in parts)):
        new = number * size < len(mine)
        here = mine[number * size : (number + 1) * size] if new else range(min(size, len(prompts)))
        yield here, generate(models, sampler, prompts[here.start : here.stop], seeds[here.start : here.stop]), new


def base_and_tuned(
    config: Config, models: Models, prompts: Sequence[Prompt], seed: int, scale: float = 1.0, with_base: bool = True
) -> Iterator[tuple[Tensor | None, Tensor]]:
    """Yields (base clip, tuned clip) for each prompt, from the same noise; the base is ``None`` unless ``with_base``.

    Clips are (T, 3, H, W), fp32 in [0, 1], on the host, generated ``log.eval_batch`` at a time. ``scale`` multiplies
    the LoRA of the tuned clip.
    """

    def clips(some: Sequence[Prompt], lora: float) -> list[Tensor]:
        with lora_scale(models.transformer, lora):
            return list(generate(models, config.sampler, some, [seed] * len(some)).frames_BTCHW.float().cpu())

    size = config.log.eval_batch
    for first in range(0, len(prompts), size):
        some = prompts[first : first + size]
        tuned = clips(some, scale)
        yield from zip(clips(some, 0.0) if with_base else [None] * len(some), tuned, strict=True)
