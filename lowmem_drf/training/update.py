"""One update of the LoRA: micro-batches through the relay, clip, refuse what is not finite, optimizer step."""

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
    """What one update reports: a line of ``metrics.jsonl``."""

    step: int
    """Updates done, this one included."""
    reward: float
    """The one number whose gradient is taken: with ``critic.normalize``, of the scaled rewards. Those below are as the
    critic gave them."""
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
    """The rate of update ``step`` (from 0) of ``steps``: linear warm-up, then constant, or down a half cosine or a line
    to 0 at the end."""
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
    """Update ``step`` (from 0) on these prompts, one clip each.

    Args:
        prompts: of all processes. Each makes the clips of its share.
        questions: by prompt id.
        judge: measures the clips where the critic sees all their frames.
        scales: what each question's reward is divided by (``RewardSpec.scales``).

    Returns:
        The report of all processes' clips, in every process; times and peaks are the largest of them.

    Raises: NonFiniteError: a reward or a gradient is NaN or infinite. Names the update, prompts and seeds; the weights
        were not changed.
    """
    start = time.perf_counter()
    plan = step_spec(config, step, scales)
    seeds = [derive_seed(config.seed, "noise", step, clip) for clip in range(len(prompts))]
    lr = learning_rate(config.optim, step, config.steps)
    some, its_seeds = ranks.share(prompts), ranks.share(seeds)
    with trainer.accumulate():
        stats = _accumulate(config, models, parts, plan, step, some, its_seeds, questions)
        if not bool(
            torch.nn.utils.get_total_norm([tensor.grad for tensor in parts.lora if tensor.grad is not None]).isfinite()
        ):
            raise NonFiniteError(f"the LoRA's gradient is not finite in {_where(step, some, its_seeds)}")
    with models.meter.stage("update"):
        grad_norm = trainer.step(lr)
    if not math.isfinite(grad_norm):
        raise NonFiniteError(
            f"the mean of the processes' LoRA gradients is not finite in {_where(step, prompts, seeds)}"
        )
    frames = torch.cat([stat.frames_BTCHW for stat, _ in stats])
    oracle = (
        dict(judge(frames, [prompt.text for prompt in some]))
        if judge and frames.shape[1] == config.video.frames
        else {}
    )
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
    plan: StepSpec,
    step: int,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    questions: Mapping[str, Sequence[Question]],
) -> list[tuple[StepStats, float]]:
    """Leaves in ``.grad`` the gradient of -(mean reward of the batch), micro-batch by micro-batch. Returns each one's
    statistics and weight."""
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
    clips = "; ".join(
        f"{prompt.id} ({prompt.text!r}, seed {seed})" for prompt, seed in zip(prompts, seeds, strict=True)
    )
    return f"update {step + 1}: {clips}. No weight was changed. Go on from the last checkpoint with a lower optim.lr, or leave the prompt out."


def _largest(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: max(row[key] for row in rows) for key in rows[0]}


def _mean(pairs: Sequence[tuple[float, float]]) -> float:
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)


def _mean_by_key(rows: Sequence[tuple[Mapping[str, Any], float]]) -> dict[str, float]:
    keys = dict.fromkeys(key for row, _ in rows for key in row)
    return {key: _mean([(row[key], weight) for row, weight in rows if key in row]) for key in keys}
