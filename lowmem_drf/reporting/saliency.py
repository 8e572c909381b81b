"""Saliency of a run's sample clips, by its critic: written into the run's folder, where every later report finds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lowmem_drf.assembly.assemble import critic_frames, reward_spec
from lowmem_drf.assembly.loading import load_run_critic
from lowmem_drf.assembly.questions import draft_questions
from lowmem_drf.assembly.references import finish_questions
from lowmem_drf.errors import BadInputError
from lowmem_drf.files import write_text
from lowmem_drf.method.preprocess import resized
from lowmem_drf.models.weights.sources import READER, TOYWORLD
from lowmem_drf.prompts import as_prompts
from lowmem_drf.reporting.clips import SALIENCY, prompt_of, tuned
from lowmem_drf.reporting.read import Record
from lowmem_drf.scoring.heatmap import glow
from lowmem_drf.scoring.saliency import saliency
from lowmem_drf.scoring.score import score_clip
from lowmem_drf.terminal import showing, work_bar
from lowmem_drf.video import read_video, watchable_upscale, write_mp4

if TYPE_CHECKING:
    from rich.console import Console

    from lowmem_drf.models.qwen_vl.critic import VLMCritic

CLIPS = 3


def make_saliency(record: Record, console: Console) -> None:
    """Writes ``saliency/step-000200/01-prompt.mp4`` (the clip and its saliency, side by side) and the critic's answers
    as JSON, for the run's last sample clips.

    Raises BadInputError: the run has no sample clips, or its critic cannot be loaded.
    """
    step, files = tuned(record)
    if not files:
        raise BadInputError(
            f"{record.run} has no sample clips, whose saliency could be shown (log.sample_every). Leave out --saliency."
        )
    with showing(console):
        critic = load_run_critic(record.config)
    with work_bar(console, "saliency", len(files[:CLIPS])) as advance:
        for file in files[:CLIPS]:
            _write(record, critic, file, record.run / SALIENCY / f"step-{step:06d}" / file.name, console)
            advance(1)


def _write(record: Record, critic: VLMCritic, file: Path, target: Path, console: Console) -> None:
    config, text = record.config, prompt_of(record, file.name)
    shown_TCHW, fps = read_video(file, critic_frames(config))
    if config.critic.id not in (TOYWORLD, READER):  # ToyWorld's critics were trained at one frame rate
        critic.fps = fps
    asked = record.questions.get(text)
    if not asked:  # of a prompt that was held out
        prompts = as_prompts([text])
        draft = draft_questions(config, prompts, strict=False)
        asked = finish_questions(config, prompts, draft, critic, console).questions[prompts[0].id]
    seen_TCHW = resized(shown_TCHW[None].to(critic.model.device), critic.geometry)[0]
    spec = reward_spec(config)
    found = saliency(critic, seen_TCHW, asked, spec)
    with torch.no_grad():
        score = score_clip(critic, seen_TCHW, asked, found.answers, spec)
    pair_TCHW = torch.cat([shown_TCHW, glow(shown_TCHW, found.total_THW)], dim=-1)
    write_mp4(target, pair_TCHW, fps, watchable_upscale(*shown_TCHW.shape[-2:]))
    write_text(target.with_suffix(".json"), json.dumps(score.as_json(), ensure_ascii=False) + "\n")
