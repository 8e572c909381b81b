"""The critic's logits -> a reward per question -> one per clip -> the mean over clips.

Arithmetic is in fp32, or fp64 if the logits are. Nothing is learned or normalised over a batch: a clip's reward depends
on that clip alone, and on ``RewardSpec.scales``, which are constant during an update (``Spread``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from lowmem_drf.errors import BadInputError
from lowmem_drf.types import Scalar

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem_drf.types import Answer, Question

RewardKind = Literal["yes_logprob", "yes_margin"]


@dataclass(frozen=True)
class RewardSpec:
    """Conversion of answers into a reward."""

    kind: RewardKind = "yes_logprob"
    """For yes/no questions. ``yes_logprob``: log-probability of the wanted answer, all casings together.
    ``yes_margin``: log-odds of the wanted answer against the other. Dense questions always give the mean
    log-probability of the reference's tokens, weighted by ``Question.token_weights``: the token-wise reward of
    Diffusion-DRF (arXiv 2601.04153)."""
    hinge: float | None = None
    """Target: a question's reward is min(reward, hinge), so good answers are pushed no further. ``None``: no target."""
    weights: Mapping[str, float] = field(default_factory=lambda: {"TA": 1.0, "Phy": 1.0, "VQ": 1.0})
    """Share of each aspect in the total, however many questions it asks."""
    scales: Mapping[str, float] = field(default_factory=dict)
    """Per-question normalisation: the total divides each reward by its scale, keyed by question name (or aspect, if it
    has none). Default 1. Reported rewards are not scaled."""

    def __post_init__(self) -> None:
        if self.kind not in ("yes_logprob", "yes_margin"):
            raise BadInputError(f"the reward is {self.kind!r}: it must be 'yes_logprob' or 'yes_margin'")
        for aspect, weight in self.weights.items():
            if not weight >= 0:
                raise BadInputError(f"the weight of aspect {aspect} is {weight}: it must be 0 or above")
        for name, scale in self.scales.items():
            if not scale > 0:
                raise BadInputError(f"the scale of question {name} is {scale}: it must be above 0")


def question_reward(answer: Answer | Scalar, question: Question, spec: RewardSpec) -> Tensor:
    """Reward of one answer, a scalar; higher is better; at most 0 for log-probabilities. A ``Scalar`` is one already:
    ``spec.kind`` and ``spec.hinge`` are of what the critic says.

    Raises:
        BadInputError: a yes/no question that wants neither yes nor no; a number of token weights that is not the
            answer's number of tokens.
    """
    if isinstance(answer, Scalar):
        return _at_least_fp32(answer.value)
    logits_AV = _at_least_fp32(answer.logits_AV)
    if question.kind == "dense":
        logp_A = _at_targets(logits_AV.log_softmax(-1), answer)
        reward = logp_A.mean() if not question.token_weights else logp_A @ _shares(question, logp_A)
    else:
        wanted, other = _wanted_and_other(answer, question)
        if spec.kind == "yes_logprob":
            reward = _at(logits_AV[0].log_softmax(-1), wanted).logsumexp(-1)
        else:
            reward = _at(logits_AV[0], wanted).logsumexp(-1) - _at(logits_AV[0], other).logsumexp(-1)
    return reward if spec.hinge is None else reward.clamp(max=spec.hinge)


def token_probabilities(answer: Answer) -> Tensor:
    """(A,) on the CPU, in [0, 1]: the probability of each token of the wanted answer, given those before it."""
    return _at_targets(_at_least_fp32(answer.logits_AV.detach()).softmax(-1), answer).cpu()


def _at_least_fp32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _at_targets(values_AV: Tensor, answer: Answer) -> Tensor:
    return values_AV.gather(-1, _beside(values_AV, answer.target_A)[:, None])[:, 0]


def _at(values_V: Tensor, tokens: Sequence[int]) -> Tensor:
    return values_V[_beside(values_V, torch.tensor(tokens))]


def _beside(x: Tensor, small: Tensor) -> Tensor:
    """``small`` on the device of ``x``, sent without waiting for what the card still computes."""
    return small.to(x.device, non_blocking=True)


def _shares(question: Question, like_A: Tensor) -> Tensor:
    """The token weights, scaled to sum to 1."""
    weights = torch.tensor(question.token_weights, dtype=like_A.dtype)
    if len(weights) != len(like_A) or not weights.sum() > 0:
        raise BadInputError(
            f"the dense question {question.text!r} has {len(weights)} token weights that sum to {weights.sum():g}, and "
            f"its answer has {len(like_A)} tokens: give one weight a token, not all of them 0"
        )
    return _beside(like_A, weights / weights.sum())


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
    answers: Sequence[Answer | Scalar], questions: Sequence[Question], spec: RewardSpec
) -> tuple[Tensor, dict[str, float], dict[str, float]]:
    """Reward of one clip.

    Returns:
        The total, a scalar with gradient: the weighted mean over aspects of the weighted mean over an aspect's
        questions, each reward divided by its question's scale, plus weight * value of every scalar reward, divided by
        its scale too. Aspects without a question do not count.
        The rewards by aspect, weighted by question weight alone, and the values of the scalar rewards by their names.
        The rewards by question name (or aspect, if it has none; plain mean if several share it).

    Raises:
        BadInputError: no question, or none with a weight above 0.
    """
    rewards = [question_reward(answer, question, spec) for answer, question in zip(answers, questions, strict=True)]
    # all at once: each copy waits for the card
    values = torch.stack([reward.detach() for reward in rewards]).tolist() if rewards else []
    of_aspect: dict[str, list[tuple[float, Tensor, float, float]]] = defaultdict(list)
    added: dict[str, tuple[float, Tensor, float, float]] = {}
    by_question: dict[str, list[float]] = defaultdict(list)
    for question, reward, value in zip(questions, rewards, values, strict=True):
        name = question.name or question.aspect
        by_question[name].append(value)
        if question.weight > 0 and question.kind == "scalar":
            added[question.aspect] = question.weight, reward, spec.scales.get(name, 1.0), value
        elif question.weight > 0:
            of_aspect[question.aspect].append((question.weight, reward, spec.scales.get(name, 1.0), value))
    weights = {aspect: spec.weights.get(aspect, 1.0) for aspect in of_aspect}
    if not sum(weights.values()) > 0 and not added:
        raise BadInputError("no question has a weight above 0: ask at least one, and give one of its aspects a weight")
    total, whole = rewards[0].new_zeros(()), sum(weights.values()) or 1.0
    for aspect, rows in of_aspect.items():
        share = weights[aspect] / whole / sum(w for w, *_ in rows)
        total = total + share * torch.stack([w / scale * r for w, r, scale, _ in rows]).sum()
    for weight, reward, scale, _ in added.values():
        total = total + weight / scale * reward
    by_aspect = {
        aspect: sum(w * value for w, *_, value in rows) / sum(w for w, *_ in rows) for aspect, rows in of_aspect.items()
    } | {name: value for name, (*_, value) in added.items()}
    return total, by_aspect, _means(by_question)


def mean_reward(
    answers: Sequence[Sequence[Answer | Scalar]], questions: Sequence[Sequence[Question]], spec: RewardSpec
) -> tuple[Tensor, dict[str, float], dict[str, float]]:
    """``total_reward`` averaged over clips; an aspect or question name over the clips that have it."""
    clips = [total_reward(a, q, spec) for a, q in zip(answers, questions, strict=True)]
    total = torch.stack([clip[0] for clip in clips]).mean()
    return total, _mean_by_key([clip[1] for clip in clips]), _mean_by_key([clip[2] for clip in clips])


def _mean_by_key(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    columns: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for key, value in row.items():
            columns[key].append(value)
    return _means(columns)


def _means(columns: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {key: sum(values) / len(values) for key, values in columns.items()}


@dataclass
class Spread:
    """Per-question normalisation: the spread of each question's reward over updates, as scales of mean 1.

    Rewards of different questions live on different scales (a nearly certain yes, an explanation of ten tokens); the
    one that varies most would drown the rest. Mean and variance are exponential. An answered question hardly varies any
    more: the floor keeps its scale from vanishing and its gradient from exploding.
    """

    decay: float = 0.95
    floor: float = 0.1
    """Added to each question's standard deviation, as a share of the mean over questions."""
    warmup: int = 3
    """Updates before any scale is given."""
    seen: dict[str, tuple[int, float, float]] = field(default_factory=dict)
    """Name -> number of updates, running mean, running variance."""

    def add(self, rewards: Mapping[str, float]) -> None:
        """Adds the mean rewards of one update, by question name."""
        for name, reward in rewards.items():
            count, mean, variance = self.seen.get(name, (0, 0.0, 0.0))
            share = max(1 - self.decay, 1 / (count + 1))  # a plain average until the window is full
            delta = reward - mean
            self.seen[name] = count + 1, mean + share * delta, (1 - share) * (variance + share * delta * delta)

    def scales(self) -> dict[str, float]:
        """``RewardSpec.scales``: empty until a question was seen ``warmup`` times and varied."""
        deviations = {name: variance**0.5 for name, (count, _, variance) in self.seen.items() if count >= self.warmup}
        mean = sum(deviations.values()) / len(deviations) if deviations else 0.0
        if not mean > 0:
            return {}
        return {name: (deviation / mean + self.floor) / (1 + self.floor) for name, deviation in deviations.items()}
