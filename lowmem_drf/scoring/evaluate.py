"""Base against tuned on the same prompts and noise: the critic's reward, and measures that the critic cannot see."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any, get_args

import torch

from lowmem_drf.assembly.assemble import Models, critic_frames, derive_seed, reward_spec
from lowmem_drf.assembly.check import can_check, checked_questions
from lowmem_drf.assembly.generate import NAN, batches, flaw
from lowmem_drf.assembly.questions import draft_questions, grammar_of, is_still, with_scalars
from lowmem_drf.assembly.references import finish_questions
from lowmem_drf.distributed.ranks import ALONE, Ranks
from lowmem_drf.errors import BadInputError, NonFiniteError
from lowmem_drf.method.frames import kept_fps, kept_frames
from lowmem_drf.method.reward import RewardSpec, total_reward
from lowmem_drf.models.lora.adapter import lora_scale
from lowmem_drf.models.weights.sources import TOYWORLD
from lowmem_drf.prompts import as_prompts
from lowmem_drf.questions.make import Grammar, foils, make_questions
from lowmem_drf.schema import Config
from lowmem_drf.scoring.intervals import changes, win_rates
from lowmem_drf.scoring.measures import MEASURES, clip_measures
from lowmem_drf.scoring.oracle_rates import Drift, oracle_by_clip, oracle_for
from lowmem_drf.terminal import work_bar
from lowmem_drf.types import Answer, Aspect, Critic, Prompt, Question, Scalar

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from lowmem_drf.models.qwen_vl.critic import VLMCritic

SIDES = ("base", "tuned")
EVAL_PROMPTS, EVAL_SEEDS = 128, 2
"""Prompts of ``eval``, and clips of each."""


@dataclass(frozen=True)
class Trial:
    """Prompts, seeds and questions of a comparison."""

    prompts: tuple[Prompt, ...]
    seeds: int
    questions: Mapping[str, tuple[Question, ...]]
    """By prompt id: the questions of training."""
    heldout: Mapping[str, Sequence[Question]]
    """By prompt id: questions that training never asks. Empty if they cannot be made."""
    source: str
    """Origin of the prompts, for printing."""


def make_trial(
    config: Config,
    prompts: Sequence[Prompt],
    count: int,
    seeds: int,
    given: Sequence[Prompt] | None = None,
    source: str = "",
) -> Trial:
    """Takes all the prompts that are ``given`` (``source`` says by whom), or ``count`` held-out ones of ToyWorld, or
    the first ``count`` of ``prompts``."""
    if given is not None:
        chosen = tuple(given)
    elif config.prompts == TOYWORLD:
        from lowmem_drf.toy.captions import heldout_prompts

        chosen, source = as_prompts(heldout_prompts(count, seed=0)), "held out from training"
    else:
        chosen = tuple(prompts[:count])
        source = "of the training file, with other noise (give held-out ones: lowmem-drf eval --prompts FILE)"
    asked = config.critic.weights.asked
    heldout = heldout_questions(chosen, grammar_of(config), is_still(config)) if asked else {}
    return Trial(chosen, seeds, draft_questions(config, chosen, strict=False), heldout, source)


def finish_trial(config: Config, trial: Trial, critic: VLMCritic | None, console: Console) -> Trial:
    """Finishes the questions as training does (``references.finish_questions``), and checks the held-out ones."""
    questions = finish_questions(config, trial.prompts, trial.questions, critic, console).questions
    return replace(finish_watched(config, trial, critic, console), questions=questions if critic else trial.questions)


def finish_watched(config: Config, trial: Trial, critic: VLMCritic | None, console: Console) -> Trial:
    """Checks the held-out questions: a watch asks no others."""
    if critic is None:
        return trial
    return replace(trial, heldout=checked_heldout(config, trial.prompts, trial.heldout, critic, console))


def checked_heldout(
    config: Config,
    prompts: Sequence[Prompt],
    heldout: Mapping[str, Sequence[Question]],
    critic: VLMCritic,
    console: Console,
) -> dict[str, tuple[Question, ...]]:
    """The held-out questions that this critic answers as wanted from the prompt alone; all of a prompt if none is."""
    asked = {name: tuple(some) for name, some in heldout.items()}
    if not asked or not can_check(config):
        return asked
    checked = checked_questions(config, prompts, asked, critic, console, replaces=False).questions
    return {name: checked[name] or some for name, some in asked.items()}


def compare(config: Config, models: Models, trial: Trial, console: Console, ranks: Ranks = ALONE) -> dict[str, Any]:
    """``as_result`` of the base and the tuned model."""
    return as_result(trial, both_sides(config, models, trial, console, ranks))


def both_sides(
    config: Config,
    models: Models,
    trial: Trial,
    console: Console,
    ranks: Ranks = ALONE,
    watch: Callable[[str, Sequence[int], Tensor], None] = lambda side, here, frames: None,
    sides: Sequence[str] = SIDES,
) -> dict[str, Measured]:
    """Measures ``base`` and ``tuned`` on the same prompts and noise, with a progress bar on ``console``.

    Args:
        sides: the one that can be measured now, if not both.
        watch: sees every clip of this rank once: its side, the places of a batch (prompt x seed), the frames
            (B, T, 3, H, W) on the models' device.
    """
    found = {}
    with work_bar(console, "clips", len(sides) * trial.seeds * len(trial.prompts)) as advance:
        for name in sides:
            with lora_scale(models.transformer, float(name == "tuned")):
                found[name] = measure_prompts(config, models, trial, advance, ranks, partial(watch, name))
    return found


def as_result(trial: Trial, sides: Mapping[str, Measured]) -> dict[str, Any]:
    """The JSON of ``eval``: a ``result.Result`` without ``second``."""
    base, tuned = (sides[name].by_prompt for name in ("base", "tuned"))
    judged = "heldout_reward" if "heldout_reward" in base[0] else "reward"
    rows = zip(trial.prompts, base, tuned, strict=True)
    return {
        "prompts": len(trial.prompts),
        "seeds": trial.seeds,
        **{name: side.as_json() for name, side in sides.items()},
        "change": changes(base, tuned),
        "wins": win_rates(base, tuned, (judged, "second_reward")),
        "by_prompt": [{"id": p.id, "prompt": p.text, "base": dict(b), "tuned": dict(t)} for p, b, t in rows],
    }


@dataclass
class Measured:
    """What one model was measured at."""

    by_prompt: list[dict[str, float]]
    """Means over the clips of each prompt, in order. Names of a group have its name before a dot: ``oracle.all``."""
    of_all: dict[str, dict[str, float]] = field(default_factory=dict)
    """Groups of measures that all clips have together: ``drift``."""

    def as_json(self) -> dict[str, Any]:
        """A ``result.Side``: means over prompts."""
        means: dict[str, Any] = {
            "reward": 0.0, "reward_by_aspect": dict.fromkeys(get_args(Aspect)), "heldout_reward": None,
            "diversity": 0.0, "velocity_norm": 0.0, **dict.fromkeys(MEASURES),
        }  # fmt: skip
        for name in dict.fromkeys(name for row in self.by_prompt for name in row):
            group, _, member = name.rpartition(".")
            mean = fmean(row[name] for row in self.by_prompt if name in row)
            (means.setdefault(group, {}) if group else means)[member] = mean
        return means | self.of_all


def measure(
    config: Config, models: Models, trial: Trial, advance: Callable[[int], None], ranks: Ranks = ALONE
) -> dict[str, Any]:
    """``measure_prompts``, as a ``result.Side``."""
    return measure_prompts(config, models, trial, advance, ranks).as_json()


@torch.no_grad()
def measure_prompts(
    config: Config,
    models: Models,
    trial: Trial,
    advance: Callable[[int], None],
    ranks: Ranks = ALONE,
    watch: Callable[[Sequence[int], Tensor], None] = lambda here, frames: None,
) -> Measured:
    """Measures the model at its present LoRA scale, over prompts x seeds. Ranks share the prompts, and all get the
    result. Clips (0.4 GB for a real model) are freed as soon as they are measured.

    ``diversity``: mean pairwise RMS distance between the clips of one prompt. ``velocity_norm``: RMS of the velocity,
    mean over steps. The others: ``result.Side``.
    """
    prompts = [prompt for prompt in trial.prompts for _ in range(trial.seeds)]
    texts = [prompt.text for prompt in prompts]
    seeds = [derive_seed("eval", i // trial.seeds, i % trial.seeds) for i in range(len(prompts))]
    (kept, judge), spec = judge_evenly(config, models), reward_spec(config)
    judged = oracle_for(config, texts) is not None
    rows, drift = dict[int, dict[str, float]](), Drift()
    of_a_prompt: list[tuple[Tensor, dict[str, float]]] = []
    for here, made, new in batches(models, config.sampler, prompts, seeds, config.log.eval_batch, ranks, trial.seeds):
        if bad := [texts[i] for i, clip in zip(here, made.frames_BTCHW, strict=True) if flaw(clip) == NAN]:
            raise NonFiniteError(
                f"the clip of {bad[0]!r} {NAN}: there is nothing to compare. lowmem-drf sample --compare shows whether "
                "the base model or the LoRA makes it."
            )
        frames, some = made.frames_BTCHW, [prompts[i] for i in here]
        models.awake("critic")
        values = rewards(judge, frames[:, kept], asked_of(config, trial.questions, some), spec)
        if any(asked := asked_of(config, trial.heldout, some, held_out=True)):
            for row, heldout in zip(values, rewards(judge, frames[:, kept], asked, spec), strict=True):
                row["heldout_reward"] = heldout["reward"]
                row |= {name: value for name, value in heldout.items() if name not in row}
        if not new:  # another rank's clips, made to keep the ranks together
            continue
        watch(here, frames)
        if judged:
            shown = [prompt.text for prompt in some]
            drift.add(frames, shown)
            for row, verdict in zip(values, oracle_by_clip(frames, shown), strict=True):
                row |= {f"oracle.{name}": value for name, value in verdict.items()}
        for i, clip, row, norm in zip(here, frames, values, made.velocity_norms, strict=True):
            row |= clip_measures(clip) | {"velocity_norm": norm}
            of_a_prompt.append((clip.float().cpu(), row))
            if len(of_a_prompt) == trial.seeds:
                clips, found = zip(*of_a_prompt, strict=True)
                rows[i // trial.seeds] = mean_rows(found) | {"diversity": diversity(torch.stack(clips)[None])}
                of_a_prompt.clear()
        advance(len(here) * ranks.count)
    parts, drifts = zip(*ranks.gather((rows, drift)), strict=True)
    whole = {place: row for part in parts for place, row in part.items()}
    by_prompt = [whole[place] for place in range(len(trial.prompts))]
    return Measured(by_prompt, {"drift": Drift.result(drifts)} if judged else {})


def diversity(clips_PSTCHW: Tensor) -> float:
    """RMS distance of two clips, mean over prompts P and pairs of seeds S; 0 for one seed."""
    pairs = [(clips_PSTCHW[:, a], clips_PSTCHW[:, b]) for a in range(clips_PSTCHW.shape[1]) for b in range(a)]
    distances = [(a - b).pow(2).flatten(1).mean(1).sqrt().mean().item() for a, b in pairs]
    return sum(distances) / len(distances) if distances else 0.0


def describe(trial: Trial) -> str:
    return f"{len(trial.prompts)} prompts x {trial.seeds} seeds, {trial.source}"


def asked_of(
    config: Config, questions: Mapping[str, Sequence[Question]], prompts: Sequence[Prompt], held_out: bool = False
) -> list[tuple[Question, ...]]:
    """``with_scalars``, from questions by prompt id."""
    return with_scalars(config, prompts, [questions.get(prompt.id, ()) for prompt in prompts], held_out)


def evenly(config: Config) -> tuple[list[int], float]:
    """The frames that are judged outside of updates, evenly spaced whatever ``critic.frame_sampling`` is, and how many
    a second they are."""
    video, count = config.video, critic_frames(config)
    return list(kept_frames(video.frames, count)), kept_fps(video.frames, video.fps, count)


def judge_evenly(config: Config, models: Models) -> tuple[list[int], Critic]:
    """The frames of ``evenly``, and what judges them: ``Models.judge``, whose critic is told their rate."""
    critic, (kept, rate) = models.critic, evenly(config)

    def judge(frames_BTCHW: Tensor, asked: Sequence[Sequence[Question]]) -> Sequence[Sequence[Answer | Scalar]]:
        if critic is None or critic.fps is None:
            return models.judge(frames_BTCHW, asked)
        trained, critic.fps = critic.fps, rate
        try:
            return models.judge(frames_BTCHW, asked)
        finally:
            critic.fps = trained

    return kept, judge


def rewards(
    critic: Critic, frames_BTCHW: Tensor, asked: Sequence[Sequence[Question]], spec: RewardSpec
) -> list[dict[str, float]]:
    """The reward of each clip, in total and by aspect."""
    found = []
    for of_clip, about in zip(critic(frames_BTCHW, asked), asked, strict=True):
        total, by_aspect, _ = total_reward(of_clip, about, spec)
        of_aspects = {f"reward_by_aspect.{aspect}": value for aspect, value in by_aspect.items()}
        found.append({"reward": total.item(), **of_aspects})
    return found


def mean_rows(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each name over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: fmean(row[name] for row in rows if name in row) for name in names}


def heldout_questions(
    prompts: Sequence[Prompt], grammar: Grammar, still: bool = False
) -> dict[str, tuple[Question, ...]]:
    """Questions that training does not ask; empty unless every prompt allows them."""
    try:
        others = foils((prompt.text for prompt in prompts), grammar)
        return {
            prompt.id: make_questions(prompt.text, "heldout", grammar, others, still, prompt.image is not None)
            for prompt in prompts
        }
    except BadInputError:
        return {}
