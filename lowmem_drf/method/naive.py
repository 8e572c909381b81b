"""One step of Diffusion-DRF as a single autograd graph: the oracle that ``step.drf_step`` must equal.

Only ungraded steps run without gradient. Memory grows with the number of graded steps and of frames. Not for training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from lowmem_drf.method.reward import mean_reward
from lowmem_drf.method.schedule import advance, guided, renoise
from lowmem_drf.types import StepStats

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from lowmem_drf.method.step import StepSpec
    from lowmem_drf.types import Parts, Question


def naive_step(
    parts: Parts,
    spec: StepSpec,
    noise_BCFhw: Tensor,
    cond: Any,
    uncond: Any,
    questions: Sequence[Sequence[Question]],
    generators: Sequence[Generator] = (),
    share: float = 1.0,
) -> StepStats:
    """Adds the gradient of -share * (reward - anchor's term), a mean over clips, to the ``.grad`` of ``parts.lora``.
    Arguments as in ``drf_step``.

    Raises:
        ValueError: ``spec.vae_window`` is set; one graph has no truncation.
    """
    if spec.vae_window is not None:
        raise ValueError("naive_step is one exact graph: it has no vae_window")
    sigmas = spec.sigmas.tolist()

    def step(x: Tensor, k: int) -> Tensor:
        graded = k in spec.graded
        with torch.set_grad_enabled(graded):
            x_in = x if graded and spec.chain == "full" else x.detach()
            v = guided(parts.velocity, x_in, sigmas[k], cond, uncond, spec.guidance, spec.guidance_grad)
        return advance(spec.update, x, v, sigmas[k], sigmas[k + 1], generators)

    def departure(x: Tensor, k: int) -> Tensor:
        assert parts.base is not None
        with torch.no_grad():
            base = parts.base(x.detach(), sigmas[k], cond)
        square = (parts.velocity(x.detach(), sigmas[k], cond) - base).pow(2)
        if (h := spec.anchor_huber) is not None:
            square = 2 * h * ((square + h * h).sqrt() - h)
        return square.mean() / len(spec.anchored)

    def reward(x_0: Tensor) -> tuple[Tensor, StepStats]:
        frames = parts.decoder.decode(x_0)[:, list(spec.seen(x_0, parts.decoder.temporal_factor))]
        mean, by_aspect, by_question = mean_reward(parts.critic(frames, questions), questions, spec.reward)
        return mean, StepStats(mean.item(), by_aspect, by_question, x_0.detach(), frames.detach())

    with torch.enable_grad():
        x, away = noise_BCFhw, torch.zeros((), dtype=noise_BCFhw.dtype)
        for k in range(spec.steps):
            if spec.anchor and k in spec.anchored:
                away = away + departure(x, k)
            x = step(x, k)
        total, stats = reward(x)
        last = spec.steps - 1
        for _ in range(spec.lv_samples):
            total = total + reward(step(renoise(x.detach(), sigmas[last], generators), last))[0]
        objective = total / (1 + spec.lv_samples) - spec.anchor * away
        (-share * objective).backward(inputs=list(parts.lora))
    return stats
