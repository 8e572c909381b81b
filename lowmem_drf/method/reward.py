"""The critic's logits -> a reward per question -> one number per clip -> the mean over clips.

All arithmetic is in fp32, or fp64 where the logits are. Nothing is learned and nothing is normalised over a batch: the reward of a
clip depends on that clip alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from lowmem_drf.errors import BadInputError

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem_drf.types import Answer, Question

RewardKind = Literal["yes_logprob", "yes_margin"]


@dataclass(frozen=True)
class RewardSpec:
    """How answers become a reward."""

    kind: RewardKind = "yes_logprob"
    """Of yes/no questions. ``yes_logprob``: log-probability of the wanted answer, all casings together. ``yes_margin``: log-odds
    of the wanted answer against the other one. Dense questions always give the mean log-probability of the reference's tokens."""
    hinge: float | None = None
    """Target: a question's reward is min(reward, hinge), so what is good enough is pushed no further. ``None``: no target."""
    weights: Mapping[str, float] = field(default_factory=lambda: {"TA": 1.0, "Phy": 1.0, "VQ": 1.0})
    """Per aspect; multiplied with the question's own weight."""

    def __post_init__(self) -> None:
        if self.kind not in ("yes_logprob", "yes_margin"):
            raise BadInputError(f"the reward is {self.kind!r}: it must be 'yes_logprob' or 'yes_margin'")
        for aspect, weight in self.weights.items():
            if not weight >= 0:
                raise BadInputError(f"the weight of aspect {aspect} is {weight}: it must be 0 or above")


def question_reward(answer: Answer, question: Question, spec: RewardSpec) -> Tensor:
    """Reward of one answer, a scalar; higher is better; at most 0 for log-probabilities.

    Raises:
        BadInputError: a yes/no question that wants neither yes nor no.
    """
    logits_AV = answer.logits_AV.to(torch.promote_types(answer.logits_AV.dtype, torch.float32))
    if question.kind == "dense":
        reward = logits_AV.log_softmax(-1).gather(-1, answer.target_A[:, None].to(logits_AV.device)).mean()
    else:
        wanted, other = _wanted_and_other(answer, question)
        if spec.kind == "yes_logprob":
            reward = logits_AV[0].log_softmax(-1)[wanted].logsumexp(-1)
        else:
            reward = logits_AV[0, wanted].logsumexp(-1) - logits_AV[0, other].logsumexp(-1)
    return reward if spec.hinge is None else reward.clamp(max=spec.hinge)


def _wanted_and_other(answer: Answer, question: Question) -> tuple[list[int], list[int]]:
    match question.answer.strip().lower():
        case "yes":
            return list(answer.yes), list(answer.no)
        case "no":
            return list(answer.no), list(answer.yes)
    raise BadInputError(f"the yes/no question {question.text!r} wants {question.answer!r}: give yes or no, or make its kind dense")


def total_reward(answers: Sequence[Answer], questions: Sequence[Question], spec: RewardSpec) -> tuple[Tensor, dict[str, float], dict[str, float]]:
    """Reward of one clip.

    Returns:
        The weighted mean over questions, a scalar with gradient (weight = question weight x aspect weight);
        the rewards by aspect (weighted by question weight alone);
        the rewards by question name (or aspect, where it has no name; plain mean where several share it).

    Raises:
        BadInputError: no question, or none with a weight above 0.
    """
    weights = [question.weight * spec.weights.get(question.aspect, 1.0) for question in questions]
    if not sum(weights) > 0:
        raise BadInputError("no question has a weight above 0: ask at least one, and give one of its aspects a weight")
    rewards = [question_reward(answer, question, spec) for answer, question in zip(answers, questions, strict=True)]
    total = sum((w * r for w, r in zip(weights, rewards, strict=True)), rewards[0].new_zeros(())) / sum(weights)
    by_aspect: dict[str, list[tuple[float, float]]] = defaultdict(list)
    by_question: dict[str, list[float]] = defaultdict(list)
    for question, value in zip(questions, torch.stack(rewards).tolist(), strict=True):
        by_aspect[question.aspect].append((question.weight, value))
        by_question[question.name or question.aspect].append(value)
    heavy = {name: pairs for name, pairs in by_aspect.items() if any(weight for weight, _ in pairs)}
    aspects = {name: sum(w * v for w, v in pairs) / sum(w for w, _ in pairs) for name, pairs in heavy.items()}
    return total, aspects, {name: sum(values) / len(values) for name, values in by_question.items()}


def mean_reward(
    answers: Sequence[Sequence[Answer]], questions: Sequence[Sequence[Question]], spec: RewardSpec
) -> tuple[Tensor, dict[str, float], dict[str, float]]:
    """``total_reward`` averaged over clips; an aspect or question name over the clips that have it."""
    clips = [total_reward(a, q, spec) for a, q in zip(answers, questions, strict=True)]
    return torch.stack([clip[0] for clip in clips]).mean(), _mean_by_key([c[1] for c in clips]), _mean_by_key([c[2] for c in clips])


def _mean_by_key(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    columns: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for key, value in row.items():
            columns[key].append(value)
    return {key: sum(values) / len(values) for key, values in columns.items()}
