"""What the critic says of a clip, question by question."""

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

    from lowmem_drf.models.qwen_vl.critic import QwenCritic

SPOKEN_TOKENS = 96
"""The critic's own answer to a dense question is cut here."""


@dataclass(frozen=True)
class QuestionScore:
    """The critic's view of one question."""

    question: Question
    reward: float
    p_answer: float
    """Probability of the answer wanted. ``yesno``: among all tokens, all its casings together. ``dense``: of a token of
    the reference, the geometric mean."""
    said: str
    """What the critic says itself: ``yes`` or ``no``, whichever is likelier; its own explanation."""
    p_said: float | None
    """``yesno``: of what it said, against the other of the two. ``dense``: ``None``."""

    @property
    def disagrees(self) -> bool:
        """The critic says no where yes is wanted, or the other way round. An explanation in other words is no
        disagreement."""
        return self.question.kind == "yesno" and self.said != self.question.answer.strip().lower()


@dataclass(frozen=True)
class ClipScore:
    """The critic's view of one clip."""

    reward: float
    by_aspect: Mapping[str, float]
    verdicts: tuple[QuestionScore, ...]

    def as_json(self) -> dict[str, object]:
        """``{"reward", "questions": [{"aspect", "kind", "text", "answer", "p_answer", "reward", "said",
        "p_said"}]}``."""
        rows = [
            {
                **{name: getattr(v.question, name) for name in ("aspect", "kind", "text", "answer")},
                **{name: getattr(v, name) for name in ("p_answer", "reward", "said", "p_said")},
            }
            for v in self.verdicts
        ]
        return {"reward": self.reward, "questions": rows}


def score_clip(
    critic: QwenCritic, frames_TCHW: Tensor, questions: Sequence[Question], answers: Sequence[Answer], spec: RewardSpec
) -> ClipScore:
    """The critic's answers to these questions about these frames as a score; its own words to the dense ones are
    generated here.

    Raises:
        NonFiniteError: the reward is NaN or infinite.
    """
    total, by_aspect, _ = total_reward(answers, questions, spec)
    if not math.isfinite(total.item()):
        raise NonFiniteError(
            "the critic's reward is NaN or infinite on this clip. Try another precision: -s dtype=fp32"
        )
    return ClipScore(
        total.item(),
        by_aspect,
        tuple(_verdict(critic, frames_TCHW, q, a, spec) for q, a in zip(questions, answers, strict=True)),
    )


def _verdict(
    critic: QwenCritic, frames_TCHW: Tensor, question: Question, answer: Answer, spec: RewardSpec
) -> QuestionScore:
    reward = question_reward(answer, question, spec).item()
    if question.kind == "dense":
        p_answer = token_probabilities(answer).log().mean().exp().item()
        return QuestionScore(
            question, reward, p_answer, critic.generate(question.text, frames_TCHW, SPOKEN_TOKENS), None
        )
    probabilities_V = answer.logits_AV[0].softmax(-1)
    p = {"yes": probabilities_V[list(answer.yes)].sum().item(), "no": probabilities_V[list(answer.no)].sum().item()}
    said = max(p, key=lambda word: p[word])
    # the share of two probabilities that may both vanish: from the logits
    yes, no = (answer.logits_AV[0, list(ids)].logsumexp(-1) for ids in (answer.yes, answer.no))
    p_said = torch.sigmoid((yes - no).abs()).item()
    return QuestionScore(question, reward, p[question.answer.strip().lower()], said, p_said)
