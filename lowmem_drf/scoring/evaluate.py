"""Base against tuned on the same prompts and noise: the critic's reward, and measures that the critic cannot see."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from lowmem_drf.assembly.assemble import Models, critic_frames, derive_seed, reward_spec
from lowmem_drf.assembly.check import can_check, checked_questions
from lowmem_drf.assembly.generate import NAN, batches, flaw
from lowmem_drf.assembly.questions import draft_questions, grammar_of
from lowmem_drf.assembly.references import finish_questions
from lowmem_drf.distributed.ranks import ALONE, Ranks
from lowmem_drf.errors import BadInputError, NonFiniteError
from lowmem_drf.method.frames import kept_frames
from lowmem_drf.method.reward import RewardSpec, mean_reward
from lowmem_drf.models.lora.adapter import lora_scale
from lowmem_drf.models.weights.sources import TOYWORLD
from lowmem_drf.prompts import as_prompts, load_prompts
from lowmem_drf.questions.make import Grammar, foils, make_questions
from lowmem_drf.schema import Config
from lowmem_drf.scoring.oracle_rates import Drift, oracle_for
from lowmem_drf.terminal import work_bar
from lowmem_drf.types import Aspect, Prompt, Question

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from lowmem_drf.models.qwen_vl.critic import QwenCritic

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


def make_trial(config: Config, prompts: Sequence[Prompt], count: int, seeds: int, file: Path | None = None) -> Trial:
    """Takes all prompts of ``file``, or ``count`` held-out ones of ToyWorld, or the first ``count`` of ``prompts``."""
    if file is not None:
        chosen, source = load_prompts(file), f"of {file}"
    elif config.prompts == TOYWORLD:
        from lowmem_drf.toy.captions import heldout_prompts

        chosen, source = as_prompts(heldout_prompts(count, seed=0)), "held out from training"
    else:
        chosen = tuple(prompts[:count])
        source = "of the training file, with other noise (give held-out ones: lowmem-drf eval --prompts FILE)"
    heldout = _heldout_questions(chosen, grammar_of(config))
    return Trial(chosen, seeds, draft_questions(config, chosen, strict=False), heldout, source)


def part_of(trial: Trial | None, prompts: int, seeds: int) -> Trial | None:
    """The first prompts, with so many clips of each; ``None`` without any."""
    return replace(trial, prompts=trial.prompts[:prompts], seeds=seeds) if trial and prompts else None


def finish_trial(config: Config, trial: Trial, critic: QwenCritic, console: Console) -> Trial:
    """Finishes the questions as training does (``references.finish_questions``), and checks the held-out ones."""
    questions = finish_questions(config, trial.prompts, trial.questions, critic, console).questions
    heldout = {name: tuple(asked) for name, asked in trial.heldout.items()}
    if heldout and can_check(config):
        heldout = checked_questions(config, trial.prompts, heldout, critic, console, replaces=False).questions
    return replace(trial, questions=questions, heldout=heldout)


def compare(config: Config, models: Models, trial: Trial, console: Console, ranks: Ranks = ALONE) -> dict[str, Any]:
    """The JSON of ``eval``: ``{"prompts", "seeds", "base", "tuned"}``, with a progress bar on ``console``."""
    sides = {}
    with work_bar(console, "clips", 2 * trial.seeds * len(trial.prompts)) as advance:
        for name, scale in (("base", 0.0), ("tuned", 1.0)):
            with lora_scale(models.transformer, scale):
                sides[name] = measure(config, models, trial, advance, ranks)
    return {"prompts": len(trial.prompts), "seeds": trial.seeds, **sides}


@torch.no_grad()
def measure(
    config: Config, models: Models, trial: Trial, advance: Callable[[int], None], ranks: Ranks = ALONE
) -> dict[str, Any]:
    """Measures the model at its present LoRA scale, over prompts x seeds. Ranks share the prompts, and all get the
    result.

    ``reward_by_aspect``: ``null`` for an aspect without questions. ``heldout_reward``: ``null`` without held-out
    questions. ``diversity``: mean pairwise RMS distance between the clips of one prompt. ``motion``: mean absolute
    difference of successive frames. ``velocity_norm``: RMS of the velocity, mean over steps. Clips (0.4 GB for a real
    model) are freed as soon as they are measured.
    """
    prompts = [prompt for prompt in trial.prompts for _ in range(trial.seeds)]
    texts = [prompt.text for prompt in prompts]
    seeds = [derive_seed("eval", i // trial.seeds, i % trial.seeds) for i in range(len(prompts))]
    kept = list(kept_frames(config.video.frames, critic_frames(config)))
    spec = reward_spec(config)
    judge = oracle_for(config, texts)
    by_clip, by_prompt, oracle, drift = _Sums(), _Sums(), _Sums(), Drift()
    of_a_prompt: list[Tensor] = []
    for here, made, new in batches(models, config.sampler, texts, seeds, config.log.eval_batch, ranks, trial.seeds):
        if bad := [texts[i] for i, clip in zip(here, made.frames_BTCHW, strict=True) if flaw(clip) == NAN]:
            raise NonFiniteError(
                f"the clip of {bad[0]!r} {NAN}: there is nothing to compare. lowmem-drf sample --compare shows whether "
                "the base model or the LoRA makes it."
            )
        frames, some, size = made.frames_BTCHW, [prompts[i] for i in here], len(here) if new else 0
        by_clip.add(_ask(models, frames[:, kept], some, trial.questions, spec), size)
        if trial.heldout:
            by_clip.add({"heldout_reward": _ask(models, frames[:, kept], some, trial.heldout, spec)["reward"]}, size)
        motion = (frames[:, 1:] - frames[:, :-1]).abs().mean().item() if frames.shape[1] > 1 else 0.0
        by_clip.add({"motion": motion, "velocity_norm": made.velocity_norm}, size)
        if judge:
            shown = [prompt.text for prompt in some]
            oracle.add(judge(frames, shown), size)
            drift.add(frames[:size], shown[:size])
        for clip in frames.float().cpu() if new else ():
            of_a_prompt.append(clip)
            if len(of_a_prompt) == trial.seeds:
                by_prompt.add({"diversity": diversity(torch.stack(of_a_prompt)[None])}, 1)
                of_a_prompt.clear()
        advance(size * ranks.count)
    gathered = ranks.gather((by_clip, by_prompt, oracle, drift))
    *sums, drifts = zip(*gathered, strict=True)
    clip_means, prompt_means, rates = (_means(parts) for parts in sums)
    means = clip_means | prompt_means
    measures: dict[str, Any] = {
        "reward": means["reward"],
        "reward_by_aspect": {aspect: means.get(aspect) for aspect in get_args(Aspect)},
        "heldout_reward": means.get("heldout_reward"),
        **{name: means[name] for name in ("diversity", "motion", "velocity_norm")},
    }
    return measures | ({"oracle": rates, "drift": Drift.result(drifts)} if judge else {})


def diversity(clips_PSTCHW: Tensor) -> float:
    """RMS distance of two clips, mean over prompts P and pairs of seeds S; 0 for one seed."""
    pairs = [(clips_PSTCHW[:, a], clips_PSTCHW[:, b]) for a in range(clips_PSTCHW.shape[1]) for b in range(a)]
    distances = [(a - b).pow(2).flatten(1).mean(1).sqrt().mean().item() for a, b in pairs]
    return sum(distances) / len(distances) if distances else 0.0


def describe(trial: Trial) -> str:
    return f"{len(trial.prompts)} prompts x {trial.seeds} seeds, {trial.source}"


def print_table(result: Mapping[str, Any], console: Console) -> None:
    """Prints base against tuned, one line per measure."""
    from rich.table import Table

    table = Table("", *("base", "tuned", "change"), title=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, base, tuned, form in _rows(result["base"], result["tuned"]):
        table.add_row(name, format(base, form), format(tuned, form), format(tuned - base, f"+{form}"))
    console.print(table)


def _rows(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> list[tuple[str, float, float, str]]:
    aspects = [(name, value) for name, value in base["reward_by_aspect"].items() if value is not None]
    rows = [("reward", base["reward"], tuned["reward"], ".3f")]
    rows += [(f"  {name}", value, tuned["reward_by_aspect"][name], ".3f") for name, value in aspects]
    if base["heldout_reward"] is not None:
        rows.append(("reward, questions not trained on", base["heldout_reward"], tuned["heldout_reward"], ".3f"))
    rows += [(f"oracle: {name}", value, tuned["oracle"][name], ".1%") for name, value in base.get("oracle", {}).items()]
    rows += [(f"drift: {name}", value, tuned["drift"][name], ".2f") for name, value in base.get("drift", {}).items()]
    return rows + [(name, base[name], tuned[name], ".4f") for name in ("diversity", "motion", "velocity_norm")]


def _ask(
    models: Models,
    frames_BTCHW: Tensor,
    prompts: Sequence[Prompt],
    questions: Mapping[str, Sequence[Question]],
    spec: RewardSpec,
) -> dict[str, float]:
    """Mean reward of these clips, in total and by aspect."""
    asked = [questions[prompt.id] for prompt in prompts]
    models.awake("critic")
    total, by_aspect, _ = mean_reward((models.ask or models.asked_critic)(frames_BTCHW, asked), asked, spec)
    return {"reward": total.item(), **by_aspect}


def _heldout_questions(prompts: Sequence[Prompt], grammar: Grammar) -> dict[str, tuple[Question, ...]]:
    """Questions that training does not ask; empty unless every prompt allows them."""
    try:
        others = foils((prompt.text for prompt in prompts), grammar)
        return {prompt.id: make_questions(prompt.text, "heldout", grammar, others) for prompt in prompts}
    except BadInputError:
        return {}


class _Sums(dict[str, tuple[float, int]]):
    """Sums and counts over batches of different size, by key. A mean is over the batches that have the key."""

    def add(self, values: Mapping[str, float], count: int) -> None:
        for key, value in values.items():
            total, counted = self.get(key, (0.0, 0))
            self[key] = total + value * count, counted + count


def _means(parts: Sequence[_Sums]) -> dict[str, float]:
    whole = _Sums()
    for part in parts:
        for key, (more, count) in part.items():
            total, counted = whole.get(key, (0.0, 0))
            whole[key] = total + more, counted + count
    return {key: total / count for key, (total, count) in whole.items()}
