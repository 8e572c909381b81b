"""One update of the LoRA: micro-batches through the relay, gradient clipping, refusal of non-finite values, optimizer
step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from lowmem_drf.assembly.assemble import Models, derive_seed, step_spec
from lowmem_drf.distributed.ranks import ALONE, Ranks
from lowmem_drf.errors import NonFiniteError
from lowmem_drf.method.step import StepSpec, drf_step
from lowmem_drf.schema import Config, Optim
from lowmem_drf.types import Parts, Prompt, Question, StepStats

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem_drf.training.trainer import Trainer

Judge = Callable[["Tensor", Sequence[str]], Mapping[str, float]]
"""(frames_BTCHW, prompts) -> rates."""


@dataclass(frozen=True)
class UpdateReport:
    """The measurements of one update: a line of ``metrics.jsonl``."""

    step: int
    """Updates done, including this one."""
    reward: float
    """The scalar that is differentiated. With ``critic.normalize`` it is the mean of the scaled rewards; the rewards
    below are unscaled."""
    reward_by_aspect: dict[str, float]
    reward_by_question: dict[str, float]
    grad_norm: float
    """Before clipping."""
    lr: float
    update_s: float
    stage_s: dict[str, float]
    stage_peak_gib: dict[str, float]
    prompts: list[str]
    """Prompt ids."""
    seed: list[int]
    """Noise seed of each clip."""
    oracle: dict[str, float] = field(default_factory=dict)
    """ToyWorld: the oracle's rates on the clips of this update. Empty elsewhere."""


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """The learning rate of update ``step`` (from 0) of ``steps``: a linear warm-up, then constant, or a decay to 0 at
    the end by a half cosine or a line."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    done = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    factor = {"constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done}[optim.schedule]
    return optim.lr * factor


def update(
    config: Config,
    models: Models,
    parts: Parts,
    trainer: Trainer,
    step: int,
    prompts: Sequence[Prompt],
    questions: Mapping[str, Sequence[Question]],
    judge: Judge | None,
    scales: Mapping[str, float] | None = None,
    ranks: Ranks = ALONE,
) -> UpdateReport:
    """Runs update ``step`` (from 0) on these prompts, one clip each.

    Args:
        prompts: of all processes; each process makes the clips of its share.
        questions: by prompt id.
        judge: measures the clips; skipped where the critic does not see every frame.
        scales: divisor of each question's reward (``RewardSpec.scales``).

    Returns:
        In every process, the same report over the clips of all processes. Times and peaks are the largest of any
        process.

    Raises:
        NonFiniteError: a reward or a gradient is NaN or infinite. The message names update, prompts and seeds; the
            weights are unchanged.
    """
    start = time.perf_counter()
    spec = step_spec(config, step, scales)
    seeds = [derive_seed(config.seed, "noise", step, clip) for clip in range(len(prompts))]
    lr = learning_rate(config.optim, step, config.steps)
    own, own_seeds = ranks.share(prompts), ranks.share(seeds)
    with trainer.accumulate():
        stats = _accumulate(config, models, parts, spec, step, own, own_seeds, questions)
        gradients = [tensor.grad for tensor in parts.lora if tensor.grad is not None]
        if not bool(torch.nn.utils.get_total_norm(gradients).isfinite()):
            raise NonFiniteError(f"the LoRA's gradient is not finite in {_where(step, own, own_seeds)}")
    with models.meter.stage("update"):
        grad_norm = trainer.step(lr)
    if not math.isfinite(grad_norm):
        where = _where(step, prompts, seeds)
        raise NonFiniteError(f"the mean of the processes' LoRA gradients is not finite in {where}")
    frames = torch.cat([stat.frames_BTCHW for stat, _ in stats])
    every_frame = frames.shape[1] == config.video.frames
    oracle = dict(judge(frames, [prompt.text for prompt in own])) if judge and every_frame else {}
    rewards = [(stat.reward, stat.reward_by_aspect, stat.reward_by_question, weight) for stat, weight in stats]
    shares = ranks.gather((rewards, oracle, *models.meter.take()))
    made = [row for rows, *_ in shares for row in rows]
    return UpdateReport(
        step=step + 1,
        reward=_mean([(reward, weight) for reward, _, _, weight in made]),
        reward_by_aspect=_mean_by_key([(by_aspect, weight) for _, by_aspect, _, weight in made]),
        reward_by_question=_mean_by_key([(by_question, weight) for _, _, by_question, weight in made]),
        grad_norm=grad_norm,
        lr=lr,
        update_s=time.perf_counter() - start,
        stage_s=_largest([seconds for _, _, seconds, _ in shares]),
        stage_peak_gib=_largest([peaks for *_, peaks in shares]),
        prompts=[prompt.id for prompt in prompts],
        seed=seeds,
        oracle=_mean_by_key([(rates, 1.0) for _, rates, _, _ in shares]),
    )


def _accumulate(
    config: Config,
    models: Models,
    parts: Parts,
    spec: StepSpec,
    step: int,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    questions: Mapping[str, Sequence[Question]],
) -> list[tuple[StepStats, float]]:
    """Accumulates the gradient of -(mean reward of the batch) in ``.grad``, one micro-batch after another. Returns the
    statistics and the weight of each micro-batch."""
    stats: list[tuple[StepStats, float]] = []
    for first in range(0, len(prompts), config.micro_batch):
        part = slice(first, first + config.micro_batch)
        some, some_seeds = prompts[part], seeds[part]
        weight = len(some) / len(prompts)
        cond = models.condition([prompt.text for prompt in some])
        asked = [questions[prompt.id] for prompt in some]
        lv_generators = [torch.Generator().manual_seed(derive_seed("lv", seed)) for seed in some_seeds]
        try:
            noise, uncond = models.noise(some_seeds), models.no_condition(len(some))
            stat = drf_step(parts, spec, noise, cond, uncond, asked, lv_generators, weight)
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}\nThis happened in {_where(step, some, some_seeds)}") from error
        stats.append((replace(stat, latents_BCFhw=stat.latents_BCFhw[:0]), weight))
    return stats


def _where(step: int, prompts: Sequence[Prompt], seeds: Sequence[int]) -> str:
    clips = "; ".join(f"{p.id} ({p.text!r}, seed {seed})" for p, seed in zip(prompts, seeds, strict=True))
    cure = "Go on from the last checkpoint with a lower optim.lr, or leave the prompt out."
    return f"update {step + 1}: {clips}. No weight was changed. {cure}"


def _largest(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: max(row[key] for row in rows) for key in rows[0]}


def _mean(pairs: Sequence[tuple[float, float]]) -> float:
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)


def _mean_by_key(rows: Sequence[tuple[Mapping[str, Any], float]]) -> dict[str, float]:
    keys = dict.fromkeys(key for row, _ in rows for key in row)
    return {key: _mean([(row[key], weight) for row, weight in rows if key in row]) for key in keys}
