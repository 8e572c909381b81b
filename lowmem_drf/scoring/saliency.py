"""Where a critic's gradient points: |d reward / d pixel| of the frames it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lowmem_drf.errors import NonFiniteError
from lowmem_drf.method.reward import RewardSpec, question_reward, total_reward
from lowmem_drf.types import Answer, Critic, Question

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Saliency:
    """What moves a clip's reward. Maps are fp32 on the host, sums over the color channels of the gradient's absolute
    value."""

    answers: list[Answer]
    """No gradient."""
    total_THW: Tensor
    """Of the reward."""
    by_question_QTHW: Tensor
    """Of each question's own reward."""


def saliency(critic: Critic, frames_TCHW: Tensor, questions: Sequence[Question], spec: RewardSpec) -> Saliency:
    """One forward pass and one backward pass for the reward and for every question.

    Args:
        frames_TCHW: [0, 1], floating point, on the critic's device. The maps have their size.

    Raises:
        NonFiniteError: a gradient is NaN or infinite.
        BadInputError: no question has a weight above 0 (``total_reward``).
    """
    frames_1TCHW = frames_TCHW[None].detach().requires_grad_()
    with torch.enable_grad():
        answers = critic(frames_1TCHW, [questions])[0]
        total, _, _ = total_reward(answers, questions, spec)
        rewards = [
            total,
            *(question_reward(answer, question, spec) for answer, question in zip(answers, questions, strict=True)),
        ]
    maps = []
    for i, reward in enumerate(rewards):
        (gradient_1TCHW,) = torch.autograd.grad(reward, frames_1TCHW, retain_graph=i + 1 < len(rewards))
        maps.append(gradient_1TCHW[0].float().abs().sum(1).cpu())
    if not all(bool(one.isfinite().all()) for one in maps):
        raise NonFiniteError(
            "the critic's gradient is NaN or infinite on this clip. Try another precision: -s dtype=fp32"
        )
    detached = [Answer(a.logits_AV.detach(), a.target_A, a.yes, a.no) for a in answers]
    return Saliency(detached, maps[0], torch.stack(maps[1:]))
