"""Saliency: |d reward / d pixel| of the frames that a critic sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem_drf.errors import NonFiniteError
from lowmem_drf.method.reward import RewardSpec, question_reward, total_reward
from lowmem_drf.types import Answer, Critic, Question


@dataclass(frozen=True)
class Saliency:
    """Maps of |gradient| summed over color channels, fp32 on the host."""

    answers: list[Answer]
    """Detached."""
    total_THW: Tensor
    """Of the reward."""
    by_question_QTHW: Tensor
    """Of each question's reward."""


def saliency(critic: Critic, frames_TCHW: Tensor, questions: Sequence[Question], spec: RewardSpec) -> Saliency:
    """One forward pass, then a backward pass for the reward and one for every question.

    ``frames_TCHW``: floating point in [0, 1], on the critic's device; the maps have the same size.

    Raises:
        NonFiniteError: a gradient is NaN or infinite.
        BadInputError: no question has a weight above 0 (``total_reward``).
    """
    frames_1TCHW = frames_TCHW[None].detach().requires_grad_()
    with torch.enable_grad():
        answers = critic(frames_1TCHW, [questions])[0]
        total, _, _ = total_reward(answers, questions, spec)
        rewards = [total, *(question_reward(a, q, spec) for a, q in zip(answers, questions, strict=True))]
    maps = []
    for i, reward in enumerate(rewards):
        (gradient_1TCHW,) = torch.autograd.grad(reward, frames_1TCHW, retain_graph=i + 1 < len(rewards))
        maps.append(gradient_1TCHW[0].float().abs().sum(1).cpu())
    if not all(bool(one.isfinite().all()) for one in maps):
        raise NonFiniteError(
            "the critic's gradient is NaN or infinite on this clip. Try another precision: -s dtype=fp32"
        )
    detached = [Answer(a.logits_AV.detach(), a.target_A, a.yes, a.no) for a in answers if isinstance(a, Answer)]
    return Saliency(detached, maps[0], torch.stack(maps[1:]))
