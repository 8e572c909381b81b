"""``lowmem-drf score``: the critic's answers about any video, question by question, and a saliency clip."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lowmem_drf.assembly.assemble import reward_spec
from lowmem_drf.assembly.loading import load_run_critic
from lowmem_drf.assembly.questions import draft_questions, require_weights
from lowmem_drf.assembly.references import finish_questions
from lowmem_drf.config import load_config
from lowmem_drf.errors import BadInputError
from lowmem_drf.files import require_output
from lowmem_drf.method.preprocess import resized
from lowmem_drf.models.weights.sources import READER, TOYWORLD
from lowmem_drf.preset_files import chosen_preset
from lowmem_drf.prompts import as_prompts
from lowmem_drf.questions import toyworld
from lowmem_drf.schema import Config
from lowmem_drf.scoring.heatmap import WHAT, write_heatmap
from lowmem_drf.scoring.saliency import saliency as saliency_of
from lowmem_drf.scoring.score import ClipScore, score_clip
from lowmem_drf.terminal import make_console, showing
from lowmem_drf.texts import escaped, toml_value
from lowmem_drf.video import is_own_mp4, read_video

if TYPE_CHECKING:
    from rich.console import Console


def score_command(
    video: Path,
    prompt: str,
    saliency: Path | None,
    as_json: bool,
    preset: str | None,
    critic: str | None,
    quant: str | None,
    frames: str | None,
    mode: str | None,
    overrides: Sequence[str],
    force: bool = False,
) -> None:
    """``score_video``, as a table or as JSON."""
    found = score_video(video, prompt, saliency, preset, critic, quant, frames, mode, overrides, force, as_json)
    console = make_console(stderr=as_json, soft_wrap=True)
    if as_json:
        print(escaped(json.dumps(found.score.as_json(), ensure_ascii=False)))
    else:
        console.print(found.described, highlight=False, markup=False)
        print_table(found.score, prompt, console)
    if found.heatmap:
        console.print(f"{found.heatmap}: what moves the reward, pixel by pixel", highlight=False, markup=False)


class Scored(NamedTuple):
    """What ``score_video`` found."""

    score: ClipScore
    described: str
    """The video, and who was asked, in words."""
    heatmap: Path | None
    """The saliency clip."""


def score_video(
    video: Path,
    prompt: str,
    saliency: Path | None = None,
    preset: str | None = None,
    critic: str | None = None,
    quant: str | None = None,
    frames: int | str | None = None,
    mode: str | None = None,
    overrides: Sequence[str] = (),
    force: bool = False,
    on_stderr: bool = False,
) -> Scored:
    """Asks the critic about a video, and writes the saliency clip (``force``: in place of any file).

    Args:
        preset: whose critic is asked. Default: as ``train`` chooses.
        critic: a critic's name in place of that.
        frames: how many it sees, or a rate: ``"fps:2"``.
        on_stderr: where progress goes.

    Raises BadInputError: an unreadable video, an unusable prompt or question, or a critic that cannot be loaded.
    """
    if not prompt.strip():
        raise BadInputError('the prompt is empty. Say what the video should show: --prompt "a corgi surfing a wave"')
    flags = {"critic.id": critic, "critic.quant": quant, "critic.mode": mode}
    flagged = [f"{key}={toml_value(value)}" for key, value in flags.items() if value is not None]
    # all questions by default, whatever the preset trains on
    config = load_config(
        preset if preset is not None else chosen_preset()[0], ["critic.mode=both", *overrides, *flagged]
    )
    target = None if saliency is None else _target(saliency, force)
    prompts = as_prompts([prompt])
    toy = config.critic.id in (TOYWORLD, READER)
    if toy and preset is None and toyworld.attributes(prompt) is None:
        raise BadInputError(
            "ToyWorld's critic, the default where there is no CUDA card, knows ToyWorld's words only. Name a real one: "
            "--critic Qwen/Qwen2.5-VL-3B-Instruct"
        )
    config = config if toy else config.model_copy(update={"prompts": ""})  # of any world, whatever the preset trains
    draft = draft_questions(config, prompts)
    require_weights(draft, reward_spec(config))
    shown_TCHW, fps = read_video(video, *_wanted(config.critic.frames if frames is None else frames))

    console = make_console(stderr=on_stderr, soft_wrap=True)
    with showing(console):
        model = load_run_critic(config)
    if not toy:  # ToyWorld's critic was trained at one frame rate
        model.fps = fps
    questions = finish_questions(config, prompts, draft, model, console).questions[prompts[0].id]
    seen_TCHW = resized(shown_TCHW[None].to(model.model.device), model.geometry)[0]
    if target is None:
        with torch.no_grad():
            answers, result = model(seen_TCHW[None], [questions])[0], None
    else:
        result = saliency_of(model, seen_TCHW, questions, reward_spec(config))
        answers = result.answers
    score = score_clip(model, seen_TCHW, questions, answers, reward_spec(config))
    heatmap = None
    if target is not None and result is not None:
        heatmap = write_heatmap(target, shown_TCHW, result, score, prompt, fps)
    return Scored(score, _describe(config, shown_TCHW, seen_TCHW, fps), heatmap)


def print_table(score: ClipScore, prompt: str, console: Console) -> None:
    """Prints one line per question, by aspect, red if the critic disagrees."""
    from rich.table import Table
    from rich.text import Text

    headings = ("", "question", "wanted", "the critic says", "p(wanted)", "reward")
    table = Table(*headings, title=Text(prompt), title_justify="left")
    for column in table.columns[-2:]:
        column.justify = "right"
    aspects = list(dict.fromkeys(v.question.aspect for v in score.verdicts))
    for aspect in aspects:
        for v in (v for v in score.verdicts if v.question.aspect == aspect):
            style = "bold red" if v.disagrees else "dim" if v.question.weight == 0 else ""
            said = v.said if v.p_said is None else f"{v.said} {v.p_said:.1%}"
            cells = (aspect, v.question.text, v.question.answer, said, f"{v.p_answer:.1%}", f"{v.reward:.3f}")
            table.add_row(*(Text(cell) for cell in cells), style=style)
        table.add_section()
    for name, reward in score.by_aspect.items():
        table.add_row(name, "mean", "", "", "", f"{reward:.3f}")
    table.add_row("", "reward", "", "", "", f"{score.reward:.3f}", style="bold")
    console.print(table)
    wrong = sum(v.disagrees for v in score.verdicts)
    asked = sum(v.question.kind == "yesno" for v in score.verdicts)
    if asked:
        console.print(f"{asked - wrong} of {asked} yes/no answers are as wanted.", highlight=False)


def _describe(config: Config, shown_TCHW: Tensor, seen_TCHW: Tensor, fps: float) -> str:
    given, seen = (f"{clip.shape[-1]}x{clip.shape[-2]}" for clip in (shown_TCHW, seen_TCHW))
    size = given if given == seen else f"{given}, seen as {seen},"
    critic = f"critic {config.critic.id}, {config.critic.mode} questions"
    return f"{len(shown_TCHW)} frames of {size} at {fps:.2f} a second; {critic}"


def _wanted(frames: int | str) -> tuple[int | None, float | None]:
    """``critic.frames`` as (number of frames, ``None``) or (``None``, rate). Raises BadInputError for neither."""
    text = str(frames)
    try:
        count, rate = (None, float(text.removeprefix("fps:"))) if text.startswith("fps:") else (int(text), None)
    except ValueError:
        count, rate = 0, None
    if not 0 < (count or rate or 0) < math.inf:
        raise BadInputError(f'--frames {text}: give a number of frames, or a rate such as "fps:2"')
    return count, rate


def _target(path: Path, force: bool) -> Path:
    """The saliency clip's path, checked to be writable before anything is computed."""
    if path.suffix.lower() != ".mp4":
        raise BadInputError(f"--saliency {path}: the clip is an MP4 file. Give a name that ends in .mp4.")
    require_output(path, "--saliency", lambda existing: is_own_mp4(existing, WHAT), force, kind="clip")
    return path
