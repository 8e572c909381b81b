"""One update of the LoRA: micro-batches through the relay, clip, refuse what is not finite, optimizer step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from lowmem_drf.errors import NonFiniteError
from lowmem_drf.method.step import StepPlan, drf_step
from lowmem_drf.run.parts import Models, derive_seed, step_plan
from lowmem_drf.schema import Config, Optim
from lowmem_drf.types import Parts, Prompt, Question, StepStats

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

Judge = Callable[["Tensor", Sequence[str]], Mapping[str, float]]
"""(frames_BTCHW, prompts) -> rates."""


@dataclass(frozen=True)
class UpdateReport:
    """What one update reports: a line of ``metrics.jsonl``."""

    step: int
    """Updates done, this one included."""
    reward: float
    """The one number whose gradient is taken: with ``critic.normalize``, of the scaled rewards. Those below are as the critic gave them."""
    reward_by_aspect: dict[str, float]
    reward_by_question: dict[str, float]
    grad_norm: float
    """Before clipping."""
    lr: float
    update_s: float
    stage_s: dict[str, float]
    stage_peak_gib: dict[str, float]
    prompts: list[str]
    """Ids."""
    seed: list[int]
    """Of each clip's noise."""
    oracle: dict[str, float] = field(default_factory=dict)
    """ToyWorld: the oracle's rates on the clips of this update. Empty elsewhere."""


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """The rate of update ``step`` (from 0) of ``steps``: linear warm-up, then constant, or down a half cosine or a line to 0 at the end."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    done = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    factor = {"constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done}[optim.schedule]
    return optim.lr * factor


def update(
    config: Config,
    models: Models,
    parts: Parts,
    optimizer: Optimizer,
    step: int,
    prompts: Sequence[Prompt],
    questions: Mapping[str, Sequence[Question]],
    judge: Judge | None,
    scales: Mapping[str, float] | None = None,
) -> UpdateReport:
    """Update ``step`` (from 0) on these prompts, one clip each.

    Args:
        questions: by prompt id.
        judge: measures the clips where the critic sees all their frames.
        scales: what each question's reward is divided by (``RewardSpec.scales``).

    Raises:
        NonFiniteError: a reward or a gradient is NaN or infinite. Names the update, prompts and seeds; the weights were not changed.
    """
    start = time.perf_counter()
    plan = step_plan(config, step, scales)
    seeds = [derive_seed(config.seed, "noise", step, clip) for clip in range(len(prompts))]
    lr = learning_rate(config.optim, step, config.steps)
    for group in optimizer.param_groups:
        group["lr"] = lr
    stats = _accumulate(config, models, parts, plan, step, prompts, seeds, questions)
    with models.meter.stage("update"):
        grad_norm = torch.nn.utils.clip_grad_norm_(list(parts.lora), config.optim.grad_clip).item()
        if not math.isfinite(grad_norm):
            raise NonFiniteError(f"the LoRA's gradient is not finite in {_where(step, prompts, seeds)}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    stage_s, stage_peak_gib = models.meter.take()
    frames = torch.cat([stat.frames_BTCHW for stat, _ in stats])
    sees_all = frames.shape[1] == config.video.frames
    return UpdateReport(
        step=step + 1,
        reward=_mean([(stat.reward, weight) for stat, weight in stats]),
        reward_by_aspect=_mean_by_key([(stat.reward_by_aspect, weight) for stat, weight in stats]),
        reward_by_question=_mean_by_key([(stat.reward_by_question, weight) for stat, weight in stats]),
        grad_norm=grad_norm,
        lr=lr,
        update_s=time.perf_counter() - start,
        stage_s=stage_s,
        stage_peak_gib=stage_peak_gib,
        prompts=[prompt.id for prompt in prompts],
        seed=seeds,
        oracle=dict(judge(frames, [prompt.text for prompt in prompts])) if judge and sees_all else {},
    )


def _accumulate(
    config: Config,
    models: Models,
    parts: Parts,
    plan: StepPlan,
    step: int,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    questions: Mapping[str, Sequence[Question]],
) -> list[tuple[StepStats, float]]:
    """Leaves in ``.grad`` the gradient of -(mean reward of the batch), micro-batch by micro-batch. Returns each one's statistics and weight."""
    for tensor in parts.lora:
        tensor.grad = torch.zeros_like(tensor)
    stats: list[tuple[StepStats, float]] = []
    for first in range(0, len(prompts), config.micro_batch):
        some, its_seeds = prompts[first : first + config.micro_batch], seeds[first : first + config.micro_batch]
        texts = [prompt.text for prompt in some]
        weight = len(some) / len(prompts)
        lv_generators = [torch.Generator().manual_seed(derive_seed("lv", seed)) for seed in its_seeds]
        try:
            stat = drf_step(
                parts, plan, models.noise(its_seeds), models.condition(texts), models.no_condition(len(some)),
                [questions[prompt.id] for prompt in some], lv_generators, weight,
            )  # fmt: skip
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}\nThis happened in {_where(step, some, its_seeds)}") from error
        stats.append((replace(stat, latents_BCFhw=stat.latents_BCFhw[:0]), weight))
    return stats


def _where(step: int, prompts: Sequence[Prompt], seeds: Sequence[int]) -> str:
    clips = "; ".join(f"{prompt.id} ({prompt.text!r}, seed {seed})" for prompt, seed in zip(prompts, seeds, strict=True))
    return f"update {step + 1}: {clips}. No weight was changed. Go on from the last checkpoint with a lower optim.lr, or leave the prompt out."


def _mean(pairs: Sequence[tuple[float, float]]) -> float:
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)


def _mean_by_key(rows: Sequence[tuple[Mapping[str, Any], float]]) -> dict[str, float]:
    keys = dict.fromkeys(key for row, _ in rows for key in row)
    return {key: _mean([(row[key], weight) for row, weight in rows if key in row]) for key in keys}
