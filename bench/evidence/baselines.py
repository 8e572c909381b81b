"""Other ways to tune a generator by the same reward, in the harness of the study: each replaces one function of the
training, everything else (prompts, questions, optimizer, checkpoints) is the run's own.

- ``draft``, ``draft_lv``, ``drtune`` are settings of ``sampler`` (``variants.py``).
- ``refl`` (ImageReward, arXiv 2304.05977): the clip predicted at a random step is judged, and that step alone learns.
- ``best_of_n``: reward-weighted fine-tuning on own samples: no gradient of the critic or the VAE; the better of several
  clips of a prompt are targets of flow matching (weights: softmax of the rewards).
- ``awm`` (Advantage Weighted Matching, arXiv 2509.25050; DiffusionNFT, arXiv 2509.16117, with the policy itself as its
  old one has the same gradient): a policy gradient; the weights are advantages, so worse clips push away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from lowmem_drf.assembly.assemble import derive_seed, step_spec
from lowmem_drf.method.reward import total_reward
from lowmem_drf.method.step import StepSpec, rollout
from lowmem_drf.schema import Config
from lowmem_drf.training import update
from lowmem_drf.types import Parts, Question, StepStats

GROUP = 4
"""Clips of a prompt whose rewards are compared."""
DRAWS = 4
"""Noise levels of each clip on which flow matching learns."""
TEMPERATURE = 0.1
"""Of ``best_of_n``'s softmax, in units of the reward."""


def refl_spec(config: Config, step: int, scales: Any = None) -> StepSpec:
    """Denoising goes to a random step, and that step predicts the clip at once."""
    spec = step_spec(config, step, scales)
    last = derive_seed(config.seed, "refl", step) % spec.steps
    sigmas = torch.cat((spec.sigmas[: last + 1], spec.sigmas.new_zeros(1)))
    return replace(spec, sigmas=sigmas, graded=(last,))


def matching_step(
    weigh: Callable[[Tensor], Tensor],
    parts: Parts,
    spec: StepSpec,
    noise_BCFhw: Tensor,
    cond: Tensor,
    uncond: Tensor,
    questions: Sequence[Sequence[Question]],
    generators: Sequence[torch.Generator] = (),
    share: float = 1.0,
    found: Any = None,
) -> StepStats:
    """``drf_step`` without its gradients: samples, judges, and learns by flow matching on the samples, each with its
    weight. ``GROUP`` clips of a prompt are made; the batch's other prompts are not used."""
    count = len(noise_BCFhw)
    of = [i // GROUP * GROUP for i in range(count)]
    cond, asked = cond[of], [questions[i] for i in of]
    with parts.stage("rollout"):
        x_0, _ = rollout(parts.velocity, spec.sigmas, noise_BCFhw, cond, uncond, spec.guidance)
    with parts.stage("decode"), torch.no_grad():
        frames = parts.decoder.decode(x_0)[:, list(spec.kept)]
    with parts.stage("critic"), torch.no_grad():
        answers = parts.critic(frames, asked)
        judged = [total_reward(answer, some, spec.reward) for answer, some in zip(answers, asked, strict=True)]
    rewards = torch.stack([total for total, *_ in judged]).view(-1, GROUP)
    weights = weigh(rewards).flatten() / count
    with parts.stage("denoise_backward"):
        for _ in range(DRAWS):
            noise = torch.stack([torch.randn(x_0.shape[1:], generator=one) for one in generators]).to(x_0)
            # a level of the sampler for the whole batch: a transformer pass has one level
            sigma = spec.sigmas[int(torch.randint(spec.steps, (), generator=generators[0]))].item()
            with torch.enable_grad():
                v = parts.velocity((1 - sigma) * x_0 + sigma * noise, sigma, cond)
                error = (v - (noise - x_0)).pow(2).flatten(1).mean(1)
                (share * (weights * error).sum() / DRAWS).backward(inputs=list(parts.lora))
    by_aspect = {name: _mean(row[1].get(name) for row in judged) for name in judged[0][1]}
    by_question = {name: _mean(row[2].get(name) for row in judged) for name in judged[0][2]}
    return StepStats(rewards.mean().item(), by_aspect, by_question, x_0, frames)


def better(rewards: Tensor) -> Tensor:
    """(prompts, GROUP) rewards -> weights of mean 1."""
    return (rewards / TEMPERATURE).softmax(-1) * rewards.shape[-1]


def advantages(rewards: Tensor) -> Tensor:
    """(prompts, GROUP) rewards -> their distance from the prompt's mean, in standard deviations over all."""
    away = rewards - rewards.mean(-1, keepdim=True)
    return away / away.pow(2).mean().sqrt().clamp(min=1e-6)


@contextmanager
def method(name: str) -> Iterator[None]:
    """Trains by this method within the block."""
    if name == "drf":
        yield
    elif name == "refl":
        with patch.object(update, "step_spec", refl_spec):
            yield
    else:
        weigh = {"best_of_n": better, "awm": advantages}[name]

        def step(*given: Any) -> StepStats:
            return matching_step(weigh, *given)

        with patch.object(update, "drf_step", step):
            yield


def _mean(values: Any) -> float:
    given = [value for value in values if value is not None]
    return sum(given) / len(given)
