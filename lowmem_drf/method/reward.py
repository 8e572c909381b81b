"""The critic's logits -> a reward per question -> one number per clip -> the mean over clips.

All arithmetic is in fp32, or fp64 where the logits are. Nothing is learned and nothing is normalised over a batch: the
reward of a clip depends on that clip alone, and on the scales of ``RewardSpec``, which an update does not change while
it runs (``Spread``).
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
    """Of yes/no questions. ``yes_logprob``: log-probability of the wanted answer, all casings together. ``yes_margin``:
    log-odds of the wanted answer against the other one. Dense questions always give the mean log-probability of the
    reference's tokens, weighted by ``Question.token_weights``: the token-wise reward of Diffusion-DRF (arXiv
    2601.04153)."""
    hinge: float | None = None
    """Target: a question's reward is min(reward, hinge), so what is good enough is pushed no further. ``None``: no
    target."""
    weights: Mapping[str, float] = field(default_factory=lambda: {"TA": 1.0, "Phy": 1.0, "VQ": 1.0})
    """Per aspect: its share in the total, however many questions it asks."""
    scales: Mapping[str, float] = field(default_factory=dict)
    """Per-question normalisation: by question name (or aspect, where it has none), what its reward is divided by in the
    total. Rewards are reported as they are. A name that is not here counts as 1."""

    def __post_init__(self) -> None:
        if self.kind not in ("yes_logprob", "yes_margin"):
            raise BadInputError(f"the reward is {self.kind!r}: it must be 'yes_logprob' or 'yes_margin'")
        for aspect, weight in self.weights.items():
            if not weight >= 0:
                raise BadInputError(f"the weight of aspect {aspect} is {weight}: it must be 0 or above")
        for name, scale in self.scales.items():
            if not scale > 0:
                raise BadInputError(f"the scale of question {name} is {scale}: it must be above 0")


def question_reward(answer: Answer, question: Question, spec: RewardSpec) -> Tensor:
    """Reward of one answer, a scalar; higher is better; at most 0 for log-probabilities.

    Raises: BadInputError: a yes/no question that wants neither yes nor no; token weights of another number than the
        answer's tokens.
    """
    logits_AV = answer.logits_AV.to(torch.promote_types(answer.logits_AV.dtype, torch.float32))
    if question.kind == "dense":
        logp_A = logits_AV.log_softmax(-1).gather(-1, answer.target_A[:, None].to(logits_AV.device))[:, 0]
        reward = logp_A.mean() if not question.token_weights else logp_A @ _shares(question, logp_A)
    else:
        wanted, other = _wanted_and_other(answer, question)
        if spec.kind == "yes_logprob":
            reward = logits_AV[0].log_softmax(-1)[wanted].logsumexp(-1)
        else:
            reward = logits_AV[0, wanted].logsumexp(-1) - logits_AV[0, other].logsumexp(-1)
    return reward if spec.hinge is None else reward.clamp(max=spec.hinge)


def token_probabilities(answer: Answer) -> Tensor:
    """(A,) on the CPU, in [0, 1]: the probability of each token of the wanted answer after those before it."""
    logits_AV = answer.logits_AV.detach().to(torch.promote_types(answer.logits_AV.dtype, torch.float32))
    return logits_AV.softmax(-1).gather(-1, answer.target_A[:, None].to(logits_AV.device))[:, 0].cpu()


def _shares(question: Question, like_A: Tensor) -> Tensor:
    """The token weights as shares of 1."""
    weights = like_A.new_tensor(question.token_weights)
    if len(weights) != len(like_A) or not weights.sum() > 0:
        raise BadInputError(
            f"the dense question {question.text!r} has {len(weights)} token weights that sum to {weights.sum():g}, and its answer has "
            f"{len(like_A)} tokens: give one weight a token, not all of them 0"
        )
    return weights / weights.sum()


def _wanted_and_other(answer: Answer, question: Question) -> tuple[list[int], list[int]]:
    match question.answer.strip().lower():
        case "yes":
            return list(answer.yes), list(answer.no)
        case "no":
            return list(answer.no), list(answer.yes)
    raise BadInputError(
        f"the yes/no question {question.text!r} wants {question.answer!r}: give yes or no, or make its kind dense"
    )


def total_reward(
    answers: Sequence[Answer], questions: Sequence[Question], spec: RewardSpec
) -> tuple[Tensor, dict[str, float], dict[str, float]]:
    """Reward of one clip.

    Returns: The weighted mean over aspects of the weighted mean over each one's questions, a scalar with gradient (each
        reward divided by its question's scale): an aspect's say depends on its weight, not on how many questions it
        asks. Aspects that are not asked count nothing; the rewards by aspect (weighted by question weight alone); the
        rewards by question name (or aspect, where it has no name; plain mean where several share it).

    Raises:
        BadInputError: no question, or none with a weight above 0.
    """
    rewards = [question_reward(answer, question, spec) for answer, question in zip(answers, questions, strict=True)]
    of_aspect: dict[str, list[tuple[float, Tensor, float]]] = defaultdict(list)
    by_question: dict[str, list[float]] = defaultdict(list)
    for question, reward in zip(questions, rewards, strict=True):
        name = question.name or question.aspect
        by_question[name].append(reward.item())
        if question.weight > 0:
            of_aspect[question.aspect].append((question.weight, reward, spec.scales.get(name, 1.0)))
    weights = {aspect: spec.weights.get(aspect, 1.0) for aspect in of_aspect}
    if not sum(weights.values()) > 0:
        raise BadInputError("no question has a weight above 0: ask at least one, and give one of its aspects a weight")
    total = rewards[0].new_zeros(())
    for aspect, rows in of_aspect.items():
        share = weights[aspect] / sum(weights.values()) / sum(w for w, _, _ in rows)
        total = total + share * torch.stack([w / scale * r for w, r, scale in rows]).sum()
    by_aspect = {
        aspect: sum(w * r.item() for w, r, _ in rows) / sum(w for w, _, _ in rows) for aspect, rows in of_aspect.items()
    }
    return total, by_aspect, {name: sum(values) / len(values) for name, values in by_question.items()}


def mean_reward(
    answers: Sequence[Sequence[Answer]], questions: Sequence[Sequence[Question]], spec: RewardSpec
) -> tuple[Tensor, dict[str, float], dict[str, float]]:
    """``total_reward`` averaged over clips; an aspect or question name over the clips that have it."""
    clips = [total_reward(a, q, spec) for a, q in zip(answers, questions, strict=True)]
    return (
        torch.stack([clip[0] for clip in clips]).mean(),
        _mean_by_key([c[1] for c in clips]),
        _mean_by_key([c[2] for c in clips]),
    )


def _mean_by_key(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    columns: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for key, value in row.items():
            columns[key].append(value)
    return {key: sum(values) / len(values) for key, values in columns.items()}


@dataclass
class Spread:
    """Per-question normalisation: how much each question's reward has varied from update to update, as scales of mean
    1.

    Rewards of different questions live on different scales (a yes that is nearly certain, an explanation of ten
    tokens), and what varies most would drown the rest. Mean and variance run exponentially. A question that is answered
    hardly varies any more: a floor keeps its scale from vanishing and its gradient from exploding.
    """

    decay: float = 0.95
    floor: float = 0.1
    """Added to each question's standard deviation, as a share of the mean over questions."""
    warmup: int = 3
    """Updates before any scale is given."""
    seen: dict[str, tuple[int, float, float]] = field(default_factory=dict)
    """Name -> number of updates, running mean, running variance."""

    def add(self, rewards: Mapping[str, float]) -> None:
        """The mean rewards of one update, by question name."""
        for name, reward in rewards.items():
            count, mean, variance = self.seen.get(name, (0, 0.0, 0.0))
            share = max(1 - self.decay, 1 / (count + 1))  # a plain average until the window is full
            delta = reward - mean
            self.seen[name] = count + 1, mean + share * delta, (1 - share) * (variance + share * delta * delta)

    def scales(self) -> dict[str, float]:
        """``RewardSpec.scales``: empty until some question was seen ``warmup`` times and varied."""
        deviations = {name: variance**0.5 for name, (count, _, variance) in self.seen.items() if count >= self.warmup}
        mean = sum(deviations.values()) / len(deviations) if deviations else 0.0
        return (
            {name: (deviation / mean + self.floor) / (1 + self.floor) for name, deviation in deviations.items()}
            if mean > 0
            else {}
        )
