"""A look at a model while it trains: clips of fixed prompts and seeds, measured without anybody who knows the truth."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from lowmem_drf.assembly.assemble import Models, derive_seed, reward_spec
from lowmem_drf.assembly.generate import batches
from lowmem_drf.distributed.ranks import ALONE, Ranks
from lowmem_drf.models.lora.adapter import lora_scale
from lowmem_drf.prompts import fingerprint
from lowmem_drf.schema import Config
from lowmem_drf.scoring.alarm import FILE, Alarm, Look, mark_best, read_looks, save_looks
from lowmem_drf.scoring.evaluate import Trial, asked_of, diversity, judge_evenly, mean_rows, rewards
from lowmem_drf.scoring.measures import clip_measures

SEEDS = 2
"""Clips of a prompt: diversity needs two."""
BLIND = (
    "one prompt is watched: there is nothing to tell what the base's own clips differ by, so there can be no alarm. "
    "Give more prompts (log.watch_prompts)."
)


class Watch:
    """The looks of a run. Without a trial it only knows the best update of earlier ones, so that it is kept.

    Args:
        done: updates of the run so far; looks after them are dropped.
    """

    def __init__(
        self, config: Config, run: Path, models: Models, trial: Trial | None, ranks: Ranks = ALONE, done: int = 0
    ) -> None:
        self._config, self._run, self._models, self._trial, self._ranks = config, run, models, trial, ranks
        before = ranks.from_chief(read_looks(run, done) if ranks.chief else [])
        self._prompts = fingerprint(trial.prompts) if trial else ""
        self._use = f"lora.scale={config.lora.scale:g} lora.max_sigma={config.lora.max_sigma:g}"
        self._notes: dict[str, Any] = {"prompts": self._prompts, "use": self._use}
        self._anew = self._other(before) if trial and before else ""
        self._kept = f"watch-until-{before[-1].step:06d}.jsonl" if self._anew else ""
        self.rewards: list[float] = []
        """Of the updates since the last look."""
        if self._anew:
            first, last = before[min(1, len(before) - 1)], before[-1]
            self._notes |= {"reward": first.reward, "best": last.best}
            self.rewards += [last.reward] if last.reward is not None else []  # of the update that is looked at anew
            is_same = before[0].prompts == self._prompts  # then the base's clips are as they were
            before = [replace(before[0], **self._notes)] if is_same else []
        self._alarm = Alarm(before)

    @property
    def began(self) -> int | None:
        """The update at which the alarm began, while it lasts."""
        return self._alarm.began if self._trial else None

    @property
    def best(self) -> int | None:
        """The update of the best look so far without an alarm."""
        return self._alarm.best

    def is_due(self, step: int, last: bool) -> bool:
        """Whether to look after update ``step``; ``last``: it is the run's last one."""
        every = self._config.log.watch_every
        return self._trial is not None and every > 0 and (last or step % every == 0)

    def begin(self) -> str:
        """Looks at the base, unless that was done: the LoRA is off meanwhile. Returns a line to print, or nothing."""
        if not self._trial or not self._config.log.watch_every:
            return ""
        if self._anew and self._ranks.chief and (self._run / FILE).exists():
            os.replace(self._run / FILE, self._run / self._kept)
        if not self._alarm.looks:
            with lora_scale(self._models.transformer, 0.0):
                base = look(self._config, self._models, self._trial, self._ranks)
            self._alarm.begin({**base, "lora_norm": [0.0]}, **self._notes)
            self._save()
        if self._anew:
            return f"{self._anew} {self._kept} has the looks until then."
        return "" if self._alarm.looks[0].bands else BLIND

    def _other(self, before: Sequence[Look]) -> str:
        """Why looks begin anew, and what those before knew; empty if they go on."""
        first, last = before[0], before[-1]
        if first.prompts != self._prompts:
            why = "it has other prompts"
        elif first.use not in ("", self._use):
            why = f"the LoRA is used with {self._use}, before with {first.use}"
        else:
            return ""
        best = "none" if last.best is None else f"update {last.best}"
        alarm = "" if last.alarm is None else f", and the alarm of update {last.alarm} lasted"
        return f"the watch begins anew: {why}. The best until update {last.step} was {best}{alarm}."

    def missed(self, done: int) -> bool:
        """Whether a run that goes on after update ``done`` has not looked at it as it is used now."""
        due = self.is_due(done, last=bool(self._anew))
        return done > 0 and due and self._alarm.looks[-1].step < done

    def look(self, step: int, lora_norm: float) -> str:
        """Looks at the model after update ``step``, which is saved; ``lora_norm``: the size of its LoRA. Returns a line
        to print where the alarm begins or ends, else nothing."""
        assert self._trial is not None
        before, measures = self._alarm.began, look(self._config, self._models, self._trial, self._ranks)
        reward = fmean(self.rewards) if self.rewards else self._alarm.looks[-1].reward or 0.0  # all were skipped
        self.rewards.clear()
        means = {name: fmean(values) for name, values in measures.items()}
        seen = self._alarm.add(step, {**means, "lora_norm": lora_norm}, reward)
        self._save()
        if before is None and seen.alarm is not None:
            best = f"the best update before it is {seen.best} (--best)" if seen.best else "no earlier look was better"
            what = ", ".join(name.replace("_", " ") for name in seen.outside)
            but = "held-out answers are worse than the base's, and" if seen.worse else "the reward rises, but"
            return f"update {step}: {but} {what} left their bands: {best}."
        if before is not None and seen.alarm is None:
            return f"update {step}: the clips are back within their bands."
        return ""

    def _save(self) -> None:
        if self._ranks.chief and self._run.exists():  # else the loop says that it is gone
            save_looks(self._run, self._alarm.looks)
            if self.best:
                mark_best(self._run, self.best)


@torch.no_grad()
def look(config: Config, models: Models, trial: Trial, ranks: Ranks = ALONE) -> dict[str, list[float]]:
    """Measure -> a value a prompt: those of ``measures.clip_measures``, ``heldout_reward`` if the trial has held-out
    questions, the same by aspect (``heldout_TA``), ``diversity`` and ``velocity_norm``. Every process gets them all, of
    all prompts; the same prompts have the same noise each time, so looks differ by the model alone."""
    prompts, count = trial.prompts, trial.seeds
    made_of = [prompt for prompt in prompts for _ in range(count)]
    seeds = [derive_seed("watch", prompt, clip) for prompt in range(len(prompts)) for clip in range(count)]
    (kept, judge), spec = judge_evenly(config, models), reward_spec(config)
    size = max(1, config.log.eval_batch // count) * count  # whole prompts
    found: dict[str, list[float]] = {}
    for here, made, new in batches(models, config.sampler, made_of, seeds, size, ranks, count):
        frames = made.frames_BTCHW
        rows = [clip_measures(clip) | {"velocity_norm": n} for clip, n in zip(frames, made.velocity_norms, strict=True)]
        if any(asked := asked_of(config, trial.heldout, [prompts[i // count] for i in here], held_out=True)):
            models.awake("critic")
            for row, answered in zip(rows, rewards(judge, frames[:, kept], asked, spec), strict=True):
                row |= {f"heldout_{name.removeprefix('reward_by_aspect.')}": value for name, value in answered.items()}
        for first in range(0, len(rows) if new else 0, count):
            of_a_prompt = slice(first, first + count)
            means = mean_rows(rows[of_a_prompt]) | {"diversity": diversity(frames[of_a_prompt].float().cpu()[None])}
            for name, value in means.items():
                found.setdefault(name, []).append(value)
    parts = ranks.gather(found)
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: [value for part in parts for value in part.get(name, [])] for name in names}
