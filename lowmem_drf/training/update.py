"""One update of the LoRA: micro-batches through the relay, gradient clipping, optimizer step.

An update with a reward or gradient that is NaN or infinite makes no optimizer step. It runs to its end all the same,
because other processes may wait for this one in collectives, and its gradient is made NaN: the mean over processes is
then NaN in each of them, and all skip the step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from lowmem_drf.assembly.assemble import Models, derive_seed, step_spec
from lowmem_drf.assembly.questions import with_scalars
from lowmem_drf.distributed.ranks import ALONE, Ranks
from lowmem_drf.errors import NonFiniteError
from lowmem_drf.method.step import StepSpec, drf_step
from lowmem_drf.schema import Config
from lowmem_drf.schema.learning import Optim
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
    departure: float | None = None
    """With ``optim.anchor``: ``StepStats.departure``, mean over clips."""
    decoder_cosine: float | None = None
    """Between the gradients at the latents by the VAE and by the tiny decoder, where both were computed."""


@dataclass(frozen=True)
class Cause:
    """The first value of an update that was NaN or infinite."""

    what: str
    stage: str
    dtype: str
    """In which the stage computes."""
    prompts: list[str]
    """Ids of the prompts that were computed together."""
    seed: list[int]

    def __str__(self) -> str:
        clips = ", ".join(f"{prompt} (seed {seed})" for prompt, seed in zip(self.prompts, self.seed, strict=True))
        return f"{self.what}: stage {self.stage}, {self.dtype}, prompt {clips}"


@dataclass(frozen=True)
class Skipped:
    """An update that changed nothing: its line of ``metrics.jsonl``. Fields as in ``UpdateReport``."""

    step: int
    skipped: Cause
    lr: float
    update_s: float
    stage_s: dict[str, float]
    stage_peak_gib: dict[str, float]
    prompts: list[str]
    seed: list[int]


class SkippedUpdate(NonFiniteError):
    """A reward or gradient of an update is NaN or infinite. The weights and the optimizer's state are unchanged."""

    def __init__(self, report: Skipped) -> None:
        super().__init__(f"update {report.step} was skipped: {report.skipped}", report.skipped.stage)
        self.report = report


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """The learning rate of update ``step`` (from 0) of ``steps``: a linear warm-up, then constant, or a decay to 0 at
    the end by a half cosine, a line or its power, or by several half cosines (``diffusers.optimization`` has the same
    curves, with a warm-up from 0)."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    done = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    if optim.schedule == "cosine_with_restarts":
        done = optim.cycles * done % 1.0
    power = {"constant": 0, "linear": 1, "polynomial": optim.power}.get(optim.schedule)
    return optim.lr * ((1 - done) ** power if power is not None else 0.5 * (1 + math.cos(math.pi * done)))


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
        SkippedUpdate: a reward or a gradient is NaN or infinite, in any process.
        NonFiniteError: the optimizer made a weight NaN or infinite.
    """
    start = time.perf_counter()
    spec = step_spec(config, step, scales)
    seeds = [derive_seed(config.seed, "noise", step, clip) for clip in range(len(prompts))]
    lr = learning_rate(config.optim, step, config.steps)
    own, own_seeds = ranks.share(prompts), ranks.share(seeds)
    judge = judge if len(spec.kept) == config.video.frames else None
    with trainer.accumulate():
        stats, cause = _accumulate(config, models, parts, spec, own, own_seeds, questions, ranks, judge is not None)
    with models.meter.stage("update"):
        grad_norm = trainer.step(lr)
        stepped = math.isfinite(grad_norm)
        good = trainer.finite() if stepped else True
    oracle: dict[str, float] = {}
    if judge and stepped:
        frames = torch.cat([stat.frames_BTCHW for stat, _ in stats])
        oracle = dict(judge(frames, [prompt.text for prompt in own]))
    rewards = [(stat.reward, stat.reward_by_aspect, stat.reward_by_question, weight) for stat, weight in stats]
    compared = [stat.compared for stat, _ in stats if stat.compared]
    departures = [(stat.departure, weight) for stat, weight in stats if stat.departure is not None]
    shares = ranks.gather((rewards, oracle, good, cause, compared, departures, *models.meter.take()))
    made = [row for rows, *_ in shares for row in rows]
    compared = [one for row in shares for one in row[4]]
    departures = [one for row in shares for one in row[5]]
    ids, update_s = [prompt.id for prompt in prompts], time.perf_counter() - start
    stage_s, stage_peak_gib = _largest([row[-2] for row in shares]), _largest([row[-1] for row in shares])
    if not stepped:
        causes = [row[3] for row in shares if row[3]]
        first = causes[0] if causes else Cause("the norm of the gradients is infinite", "update", "fp32", ids, seeds)
        raise SkippedUpdate(Skipped(step + 1, first, lr, update_s, stage_s, stage_peak_gib, ids, seeds))
    if not all(good for _, _, good, *_ in shares):
        raise NonFiniteError(f"update {step + 1} made weights of the LoRA NaN or infinite", "update")
    return UpdateReport(
        step=step + 1,
        reward=_mean([(reward, weight) for reward, _, _, weight in made]),
        reward_by_aspect=_mean_by_key([(by_aspect, weight) for _, by_aspect, _, weight in made]),
        reward_by_question=_mean_by_key([(by_question, weight) for _, _, by_question, weight in made]),
        grad_norm=grad_norm,
        lr=lr,
        update_s=update_s,
        stage_s=stage_s,
        stage_peak_gib=stage_peak_gib,
        prompts=ids,
        seed=seeds,
        oracle=_mean_by_key([(rates, 1.0) for _, rates, *_ in shares]),
        decoder_cosine=sum(compared[1:], compared[0]).cosine if compared else None,
        departure=_mean(departures) if departures else None,
    )


def _accumulate(
    config: Config,
    models: Models,
    parts: Parts,
    spec: StepSpec,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    questions: Mapping[str, Sequence[Question]],
    ranks: Ranks,
    with_frames: bool,
) -> tuple[list[tuple[StepStats, float]], Cause | None]:
    """Accumulates the gradient of -(mean reward of the batch) in ``.grad``, one micro-batch after another. Returns the
    statistics and the weight of each micro-batch, and what was NaN or infinite; then the gradient is NaN.

    Latents are dropped, and so are frames unless ``with_frames``: over the batch they would add up."""
    stats: list[tuple[StepStats, float]] = []
    cause: Cause | None = None
    for first in range(0, len(prompts), config.micro_batch):
        part = slice(first, first + config.micro_batch)
        some, some_seeds = prompts[part], seeds[part]
        weight = len(some) / len(prompts)
        cond, uncond = models.condition(some), models.no_condition(some)
        asked = with_scalars(config, some, [questions[prompt.id] for prompt in some])
        noise, generators = models.noise(some_seeds), models.generators(some_seeds)
        found: list[NonFiniteError] = []
        stat = drf_step(parts, spec, noise, cond, uncond, asked, generators, weight, found.append)
        nothing = stat.frames_BTCHW.new_empty(0)  # a slice would keep the whole
        frames = stat.frames_BTCHW if with_frames else nothing
        stats.append((replace(stat, latents_BCFhw=nothing, frames_BTCHW=frames), weight))
        gradients = [tensor.grad for tensor in parts.lora if tensor.grad is not None]
        if not found and cause is None and not bool(torch.nn.utils.get_total_norm(gradients).isfinite()):
            found.append(NonFiniteError("gradients of the LoRA are NaN or infinite", "denoise_backward"))
        if found and cause is None:
            stage = found[0].stage
            ids, dtype = [prompt.id for prompt in some], _dtype_of(config, stage)
            cause = Cause(str(found[0]), stage, dtype, ids, list(some_seeds))
            for gradient in gradients:
                gradient.fill_(math.nan)
        if cause and ranks.count == 1:
            break
    return stats, cause


def _dtype_of(config: Config, stage: str) -> str:
    memory = config.memory
    return {"decode": memory.vae_dtype, "vae_backward": memory.vae_grad_dtype}.get(stage, config.dtype)


def _largest(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: max(row[key] for row in rows) for key in rows[0]}


def _mean(pairs: Sequence[tuple[float, float]]) -> float:
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)


def _mean_by_key(rows: Sequence[tuple[Mapping[str, Any], float]]) -> dict[str, float]:
    keys = dict.fromkeys(key for row, _ in rows for key in row)
    return {key: _mean([(row[key], weight) for row, weight in rows if key in row]) for key in keys}
