"""What is left to gain where the reward is satisfied: the critic against the oracle on a run's clips.

    python -m bench.evidence.agreement RUN [RUN ...] [--step N]

RUN: a run of the study (``--work`` of ``bench.evidence``), or of preset ``toy``. Clips of held-out prompts. A property
is *accepted* where the critic gives the wanted answer of its held-out question more than half of yes and no. What the
oracle calls wrong and the critic accepts, no reward can mend; what it does not accept is left to learn.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from rich.console import Console

from bench.evidence.runs import PROMPTS, SEEDS, Measurer
from bench.script import make_parser, reports_errors, save
from bench.toyworld.seeds import LIBRARIES
from lowmem_drf.assembly.generate import generate
from lowmem_drf.method.reward import RewardSpec, question_reward
from lowmem_drf.models.lora.adapter import lora_scale
from lowmem_drf.scoring.oracle_rates import oracle_by_clip
from lowmem_drf.training.checkpoint import saved_step
from lowmem_drf.training.run_folder import run_config

PROPERTIES = ("color", "shape", "direction")


@dataclass(frozen=True)
class Row:
    """One property of one clip."""

    name: str
    right: bool
    """According to the oracle."""
    probability: float
    """Of the wanted answer against the other one."""


@torch.no_grad()
def rows_of(measurer: Measurer, step: int) -> list[Row]:
    """Of ``PROMPTS`` x ``SEEDS`` clips at this update; 0: the base's."""
    models, trial, config = measurer.models, measurer.trial, measurer.config
    measurer.load(step)
    found: list[Row] = []
    for seed in range(SEEDS):
        with lora_scale(models.transformer, measurer.used(step)):
            frames = generate(
                models, config.sampler, trial.prompts, [1000 * seed + i for i in range(PROMPTS)]
            ).frames_BTCHW
        asked = [[q for q in trial.heldout[p.id] if q.name in PROPERTIES] for p in trial.prompts]
        verdicts = oracle_by_clip(frames, [prompt.text for prompt in trial.prompts])
        for answers, questions, verdict in zip(models.judge(frames, asked), asked, verdicts, strict=True):
            for answer, question in zip(answers, questions, strict=True):
                odds = question_reward(answer, question, RewardSpec("yes_margin"))
                found.append(Row(question.name, bool(verdict[question.name]), odds.sigmoid().item()))
    return found


def summary(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """Property -> the oracle's rate, the critic's, and of what the oracle calls wrong the share that the critic
    accepts."""
    said = {}
    for name in PROPERTIES:
        some = [row for row in rows if row.name == name]
        wrong = [row for row in some if not row.right]
        said[name] = {
            "right": fmean(row.right for row in some),
            "accepted": fmean(row.probability > 0.5 for row in some),
            "wrong": len(wrong),
            "wrong and accepted": sum(row.probability > 0.5 for row in wrong),
        }
    return said


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = make_parser("bench.evidence.agreement", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--step", type=int, help="update. Default: the last one")
    options = parser.parse_args(arguments)
    result = {}
    for folder in options.runs:
        measurer = Measurer(run_config(folder), folder, Console(stderr=True))
        for step in dict.fromkeys((0, saved_step(folder) if options.step is None else options.step)):
            result[f"{folder.name}/{step}"] = found = summary(list(rows_of(measurer, step)))
            for name, of in found.items():
                print(
                    f"{folder.name} {step:5d} {name:9s}  oracle {of['right']:6.1%}  critic {of['accepted']:6.1%}  "
                    f"wrong {of['wrong']:3d}, of which the critic accepts {of['wrong and accepted']:3d}"
                )
    save(options.json, {"runs": result}, *LIBRARIES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
