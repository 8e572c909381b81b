"""Ideas against drift that are no setting (yet): each changes a function of the training during a run of the study.

- ``ema``: checkpoints hold the moving average of the LoRA, training goes on with its present value.
- ``dropout``: each clip is asked a random half of its questions, anew in every update, but one of each aspect at least.
- ``aspects``: each aspect's gradient at the frames is scaled to its share of their norm, so that none drowns the rest.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from lowmem_drf.assembly.assemble import derive_seed
from lowmem_drf.method import step as relay
from lowmem_drf.models.lora.adapter import named_lora
from lowmem_drf.schema import Config
from lowmem_drf.training import loop
from lowmem_drf.training.checkpoint import Checkpoint
from lowmem_drf.types import Question

DECAY = 0.98
"""Of ``ema``: an average over about 50 updates."""


@contextmanager
def ema() -> Iterator[None]:
    mean: dict[str, Tensor] = {}
    update, save = loop.update, loop.save_checkpoint

    def averaged(config: Config, models: Any, *given: Any) -> Any:
        report = update(config, models, *given)
        share = min(DECAY, report.step / (report.step + 9))  # a plain average at first
        for name, tensor in named_lora(models.transformer).items():
            mean[name] = torch.lerp(tensor.detach(), mean.get(name, tensor.detach()), share)
        return report

    def saved(run: Path, checkpoint: Checkpoint, *given: Any) -> Path:
        return save(run, replace(checkpoint, lora={name: mean[name].clone() for name in checkpoint.lora}), *given)

    with patch.object(loop, "update", averaged), patch.object(loop, "save_checkpoint", saved):
        yield


@contextmanager
def dropout() -> Iterator[None]:
    update = loop.update

    def asked(
        config: Config, models: Any, parts: Any, trainer: Any, step: int, prompts: Any,
        questions: Mapping[str, Sequence[Question]], *given: Any,
    ) -> Any:  # fmt: skip
        some = {prompt.id: _some(questions[prompt.id], derive_seed(prompt.id, step)) for prompt in prompts}
        return update(config, models, parts, trainer, step, prompts, some, *given)

    with patch.object(loop, "update", asked):
        yield


def _some(questions: Sequence[Question], seed: int) -> list[Question]:
    chance = random.Random(seed)
    first = {chance.choice([q for q in questions if q.aspect == aspect]) for aspect in {q.aspect for q in questions}}
    return [question for question in questions if question in first or chance.random() < 0.5]


@contextmanager
def aspects() -> Iterator[None]:
    real = relay.critic_backward

    def balanced(critic: Any, frames: Tensor, questions: Any, spec: Any, share: float = 1.0, found: Any = None) -> Any:
        stats, whole = real(critic, frames, questions, spec, share, found)
        gradients, total = [], sum(spec.weights.values())
        for aspect, weight in spec.weights.items():
            alone = [[question for question in asked if question.aspect == aspect] for asked in questions]
            if weight and all(alone):
                _, gradient = real(critic, frames, alone, spec, share, found)
                gradients.append(weight / total * gradient / gradient.norm().clamp(min=1e-12))
        balance = torch.stack(gradients).sum(0)
        return stats, balance * whole.norm() / balance.norm().clamp(min=1e-12)

    with patch.object(relay, "critic_backward", balanced):
        yield


LEVERS = {"ema": ema, "dropout": dropout, "aspects": aspects}
