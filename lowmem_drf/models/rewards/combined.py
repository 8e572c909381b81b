"""A critic and scalar rewards as one ``types.Critic``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lowmem_drf.types import Answer, Critic, Question, Scalar, ScalarReward


class Combined:
    """Scalar questions go to the reward that is their aspect, all others to the critic, which is not called without
    any.

    The scalar rewards come first: of their graphs hardly anything is kept (``ClipReward``) while the critic's grows.
    """

    def __init__(self, critic: Critic | None, rewards: Mapping[str, ScalarReward]) -> None:
        self._critic, self._rewards = critic, rewards

    def __call__(
        self, frames_BTCHW: Tensor, questions: Sequence[Sequence[Question]]
    ) -> Sequence[Sequence[Answer | Scalar]]:
        values = {name: self._values(name, frames_BTCHW, questions) for name in _scalars(questions)}
        spoken = [[question for question in asked if question.kind != "scalar"] for asked in questions]
        said: Sequence[Sequence[Answer | Scalar]] = [[] for _ in questions]
        if any(spoken):
            if self._critic is None:
                raise ValueError("questions for a critic, and none was loaded")
            said = self._critic(frames_BTCHW, spoken)
        rows = []
        for asked, answers in zip(questions, said, strict=True):
            rest = iter(answers)
            rows.append([Scalar(next(values[q.aspect])) if q.kind == "scalar" else next(rest) for q in asked])
        return rows

    def _values(self, name: str, frames_BTCHW: Tensor, questions: Sequence[Sequence[Question]]) -> Iterator[Tensor]:
        """Of the clips that are asked for it."""
        asked = [
            (i, q.text)
            for i, of_clip in enumerate(questions)
            for q in of_clip
            if (q.kind, q.aspect) == ("scalar", name)
        ]
        clips, prompts = zip(*asked, strict=True)
        some = frames_BTCHW if clips == tuple(range(len(questions))) else frames_BTCHW[torch.tensor(clips)]
        return iter(self._rewards[name](some, prompts).unbind(0))


def _scalars(questions: Sequence[Sequence[Question]]) -> dict[str, None]:
    return dict.fromkeys(q.aspect for asked in questions for q in asked if q.kind == "scalar")
