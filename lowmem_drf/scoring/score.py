"""The critic's scores of a clip, question by question."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lowmem_drf.errors import NonFiniteError
from lowmem_drf.method.reward import RewardSpec, question_reward, token_probabilities, total_reward
from lowmem_drf.types import Answer, Question

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem_drf.models.qwen_vl.critic import VLMCritic

SPOKEN_TOKENS = 96
"""Maximum length of the critic's own answer to a dense question."""


@dataclass(frozen=True)
class QuestionScore:
    """The critic's score of one question."""

    question: Question
    reward: float
    p_answer: float
    """Probability of the wanted answer. ``yesno``: all its casings, among all tokens. ``dense``: geometric mean over
    the reference's tokens."""
    said: str
    """The critic's own answer: the likelier of ``yes`` and ``no``, or its explanation."""
    p_said: float | None
    """``yesno``: probability of ``said``, given that the answer is yes or no. ``dense``: ``None``."""

    @property
    def disagrees(self) -> bool:
        """True for the wrong one of yes and no. Explanations never disagree."""
        return self.question.kind == "yesno" and self.said != self.question.answer.strip().lower()


@dataclass(frozen=True)
class ClipScore:
    """The critic's score of one clip."""

    reward: float
    by_aspect: Mapping[str, float]
    verdicts: tuple[QuestionScore, ...]

    def as_json(self) -> dict[str, object]:
        """``{"reward", "questions": [{…}]}`` with the keys below."""
        asked, scored = ("aspect", "kind", "text", "answer"), ("p_answer", "reward", "said", "p_said")
        rows = [
            {name: getattr(v.question, name) for name in asked} | {name: getattr(v, name) for name in scored}
            for v in self.verdicts
        ]
        return {"reward": self.reward, "questions": rows}


def score_clip(
    critic: VLMCritic, frames_TCHW: Tensor, questions: Sequence[Question], answers: Sequence[Answer], spec: RewardSpec
) -> ClipScore:
    """Turns answers about these frames into a score, and generates the critic's own answers to dense questions.

    Raises NonFiniteError: the reward is NaN or infinite.
    """
    total, by_aspect, _ = total_reward(answers, questions, spec)
    if not math.isfinite(total.item()):
        raise NonFiniteError(
            "the critic's reward is NaN or infinite on this clip. Try another precision: -s dtype=fp32"
        )
    pairs = zip(questions, answers, strict=True)
    return ClipScore(total.item(), by_aspect, tuple(_verdict(critic, frames_TCHW, q, a, spec) for q, a in pairs))


def _verdict(
    critic: VLMCritic, frames_TCHW: Tensor, question: Question, answer: Answer, spec: RewardSpec
) -> QuestionScore:
    reward = question_reward(answer, question, spec).item()
    if question.kind == "dense":
        p_answer = token_probabilities(answer).log().mean().exp().item()
        said = critic.generate(question.text, frames_TCHW, SPOKEN_TOKENS)
        return QuestionScore(question, reward, p_answer, said, None)
    probabilities_V = answer.logits_AV[0].softmax(-1)
    p = {"yes": probabilities_V[list(answer.yes)].sum().item(), "no": probabilities_V[list(answer.no)].sum().item()}
    said = max(p, key=lambda word: p[word])
    # from the logits, because both probabilities may underflow
    yes, no = (answer.logits_AV[0, list(ids)].logsumexp(-1) for ids in (answer.yes, answer.no))
    p_said = torch.sigmoid((yes - no).abs()).item()
    return QuestionScore(question, reward, p[question.answer.strip().lower()], said, p_said)
