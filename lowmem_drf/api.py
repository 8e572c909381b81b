"""The Python API: the commands as functions, by the same code.

    from lowmem_drf import train, sample, score, plan, export_lora

Functions print nothing unless they get a ``console`` (``rich.console.Console()``), which then shows progress and notes.
They raise ``LowmemError``, or ``BadInputError`` for an argument that cannot be used; messages name the option of the
command line, whose name is that of the argument. Nothing heavy is imported before a function is called.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_drf.errors import BadInputError, LowmemError, explain

if TYPE_CHECKING:
    from rich.console import Console

    from lowmem_drf.commands.export_lora import Exported
    from lowmem_drf.commands.sample import Clip
    from lowmem_drf.planner.stages import Plan
    from lowmem_drf.scoring.result import Result
    from lowmem_drf.scoring.score import ClipScore
    from lowmem_drf.types import OnUpdate, Prompt

File = str | PathLike[str]
Prompts = File | Sequence[str | Mapping[str, Any]]
"""A prompt file, or prompts: texts, or objects as in the lines of a jsonl file (``prompts.py``)."""
Settings = Mapping[str, Any]
"""Keys of docs/configuration.md with their values: ``{"lora.rank": 8, "critic": {"mode": "yesno"}}``."""


@dataclass(frozen=True)
class Run:
    """A run's folder. It stands for its path wherever one is asked for; all else is read when it is asked for."""

    folder: Path

    def __fspath__(self) -> str:
        return str(self.folder)

    @property
    def step(self) -> int:
        """Updates that are saved."""
        from lowmem_drf.training.checkpoint import saved_step

        return saved_step(self.folder)

    @property
    def lora(self) -> Path:
        """The LoRA file of the last checkpoint. ``export_lora`` makes one for other programs."""
        from lowmem_drf.training.checkpoint import checkpoint_folder

        return checkpoint_folder(self.folder) / "lora.safetensors"

    @property
    def result(self) -> Result | None:
        """Base against tuned at the run's end; ``None`` for a run that was not compared."""
        from lowmem_drf.reporting.notes import RESULT, read_notes
        from lowmem_drf.scoring.result import Result

        found = read_notes(self.folder / RESULT).get("result")
        return Result.model_validate(found) if found else None

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``, one an update."""
        from lowmem_drf.training.metrics import read_metrics

        return read_metrics(self.folder)


def train(
    preset: File | None = None,
    *,
    prompts: Prompts | None = None,
    output: File | None = None,
    steps: int | None = None,
    seed: int | None = None,
    settings: Settings | None = None,
    vram: str | None = None,
    init_lora: File | None = None,
    resume: bool = False,
    on_update: OnUpdate | None = None,
    console: Console | None = None,
) -> Run:
    """Trains a LoRA, and compares base and tuned.

    Args:
        preset: a name or a TOML file. Default: the largest that fits the card; ``toy-fast`` without one.
        prompts: default: the preset's. Texts are kept in the run, as ``prompts.jsonl``.
        output: the run's folder. Default: ``runs/<preset>-<time>``.
        settings: over the preset's.
        vram: how much of the card the run is set to fit, such as ``"12GB"``. Default: what is free.
        init_lora: a LoRA file to begin with.
        resume: go on with ``output``, or with the latest run.
        on_update: called after each update with its line of ``metrics.jsonl`` (one with the key ``skipped`` changed
            nothing). ``False`` ends the run as Ctrl-C does: the update is saved, the call returns, and ``resume`` goes
            on. ``None`` goes on, so that a callback needs no ``return``. An exception is raised once the update is
            saved. Runs of several processes have no callback.

    Raises:
        KeyboardInterrupt: Ctrl-C; the update was finished and saved.
        BadInputError: an argument or setting that cannot be used; nothing was written.
        LowmemError: the work failed; saved updates stay.
    """
    from lowmem_drf.commands.train import train_command
    from lowmem_drf.config import as_overrides
    from lowmem_drf.preset_files import chosen_preset
    from lowmem_drf.training.run_folder import default_output, find_run, own_prompts

    run, name, overrides = _path(output), _text(preset), as_overrides(settings or {})
    with _call(console), ExitStack() as stack:
        file = _file_of(prompts)
        if prompts is not None and file is None:
            run = find_run(run) if resume else run or default_output(name or chosen_preset()[0])
            file = stack.enter_context(own_prompts(run, prompts))  # type: ignore[arg-type]  # no file: a sequence
        lora = _path(init_lora)
        return Run(train_command(name, file, run, steps, seed, resume, overrides, False, None, lora, vram, on_update))


def sample(
    run: File | Run | None = None,
    *,
    preset: File | None = None,
    lora: File | None = None,
    prompts: Prompts | None = None,
    compare: bool = False,
    lora_scale: float = 1.0,
    best: bool = False,
    seed: int = 0,
    output: File | None = None,
    settings: Settings | None = None,
    force: bool = False,
    console: Console | None = None,
) -> list[Clip]:
    """Writes a clip per prompt, with a run's LoRA, or with a preset's model and any LoRA file.

    Args:
        run: default: the latest under ``runs/``, unless there is a ``preset``.
        lora: in place of the run's.
        prompts: default: those of the run's sample clips.
        compare: the base's clip beside the tuned one, from the same noise.
        lora_scale: strength of the LoRA, 0 for the base.
        best: the update that the run's watch found best, not the last.
        output: an MP4, or a folder for several. Default: ``samples/`` in the run, or here with a preset.
        force: ``output`` may replace another program's file.

    Raises:
        BadInputError: an argument or setting that cannot be used.
        LowmemError: a clip is black (it is written) or NaN (it is not); all others are written.
    """
    from lowmem_drf.commands.sample import sample_clips
    from lowmem_drf.config import as_overrides

    with _call(console):
        asked = _prompts_of(prompts) or ()
        place, overrides = _path(output), as_overrides(settings or {})
        name, own = _text(preset), (_path(run), _path(lora))
        return list(sample_clips(*own, asked, compare, lora_scale, seed, place, force, name, overrides, best))


def score(
    video: File,
    prompt: str,
    *,
    saliency: File | None = None,
    preset: File | None = None,
    critic: str | None = None,
    quant: str | None = None,
    frames: int | str | None = None,
    mode: str | None = None,
    settings: Settings | None = None,
    force: bool = False,
    console: Console | None = None,
) -> ClipScore:
    """The critic's answers to every question about a video.

    Args:
        video: any: MP4, MOV, WebM, MKV, GIF.
        saliency: an MP4 to write that shows where the reward's gradient points (``force``: in place of any file).
        preset: the one whose critic is asked. Default: as ``train`` chooses.
        critic: a transformers folder, a Hugging Face id, or ``toyworld``.
        quant: ``none`` or ``nf4``.
        frames: how many the critic sees, or a rate: ``"fps:2"``.
        mode: ``yesno``, ``dense``, ``both`` (the default) or ``vanilla``.
    """
    from lowmem_drf.commands.score import score_video
    from lowmem_drf.config import as_overrides

    with _call(console):
        overrides, name = as_overrides(settings or {}), _text(preset)
        asked = critic, quant, frames, mode
        return score_video(Path(video), prompt, _path(saliency), name, *asked, overrides, force).score


def plan(
    preset: File | None = None,
    *,
    vram: str | None = None,
    settings: Settings | None = None,
    console: Console | None = None,
) -> Plan:
    """Peak memory and time of every stage, without a GPU and without weights, set to fit the card.

    Args:
        vram: the card's memory, such as ``"16GB"``. Default: that of the preset's card.

    Returns:
        ``fits``, ``peak_gib``, ``host_gib``, ``update_s``, ``stages``; ``applied``: what was set to make it fit;
        ``changes``: what else would be to give up.
    """
    from lowmem_drf.commands.plan import plan_of
    from lowmem_drf.config import as_overrides, load_config
    from lowmem_drf.preset_files import chosen_preset
    from lowmem_drf.terminal import make_console

    with _call(console):
        name = _text(preset) or chosen_preset()[0]
        return plan_of(name, vram, load_config(name, as_overrides(settings or {})), make_console())


def export_lora(
    run: File | Run | None = None,
    *,
    step: int | None = None,
    best: bool = False,
    format: str | None = None,
    dtype: str | None = None,
    output: File | None = None,
    merge: File | None = None,
    force: bool = False,
    console: Console | None = None,
) -> Exported:
    """Writes a run's LoRA as one file for other programs, verified. ``paths`` has what was written.

    Args:
        run: default: the latest under ``runs/``.
        step: of a checkpoint. Default: the last one.
        best: the update that the run's watch found best.
        format: ``comfyui`` (diffusers loads it too), ``diffusers`` or ``kohya``. Default: ``comfyui``, or ``diffusers``
            for generators for which the first is not written.
        dtype: ``bf16``, ``fp16`` or ``fp32``. Default: the run's.
        output: the file. Default: in the run.
        merge: a folder for the whole model with the LoRA merged in; the file is then written with ``output`` only.
        force: ``output`` may replace any file that no run needs.
    """
    from lowmem_drf.commands.export_lora import export_run
    from lowmem_drf.training.run_folder import find_run

    with _call(console):
        return export_run(find_run(_path(run)), step, format, dtype, _path(output), _path(merge), force, best)


def evaluate(
    run: File | Run | None = None,
    *,
    preset: File | None = None,
    lora: File | None = None,
    prompts: Prompts | None = None,
    seeds: int | None = None,
    critic: str | None = None,
    best: bool = False,
    settings: Settings | None = None,
    console: Console | None = None,
) -> Result:
    """Base against tuned on held-out prompts, as ``lowmem-drf eval --json`` has it (docs/eval.md).

    Args:
        run: default: the latest under ``runs/``, unless there are a ``preset`` and a ``lora``.
        seeds: clips of each prompt and model. Default: 2.
        critic: a second one, which training never asked.
    """
    from lowmem_drf.commands.eval import compared
    from lowmem_drf.config import as_overrides
    from lowmem_drf.scoring.result import Result
    from lowmem_drf.terminal import make_console

    with _call(console):
        given, overrides = _prompts_of(prompts), as_overrides(settings or {})
        source = "that were given" if _file_of(prompts) is None else f"of {prompts}"
        chosen = _path(run), _text(preset), _path(lora), overrides, best
        return Result.model_validate(compared(*chosen, given, source, seeds, critic, None, make_console())[0])


def report(
    run: File | Run | None = None,
    *,
    output: File | None = None,
    saliency: bool = False,
    force: bool = False,
    console: Console | None = None,
) -> Path:
    """Writes one HTML file about a run, by default ``report.html`` in it. ``saliency``: loads the critic, and shows
    where the reward's gradient points."""
    from lowmem_drf.commands.report import page_of

    with _call(console):
        return page_of(_path(run), _path(output), saliency, force)[0]


@contextmanager
def _call(console: Console | None) -> Iterator[None]:
    """Around the work of every function."""
    from lowmem_drf.libraries import hush
    from lowmem_drf.shortage import expand_segments, shortage_of
    from lowmem_drf.terminal import called_with, make_console

    if "torch" not in sys.modules:  # else the program has chosen
        expand_segments()
    hush()
    if console is None:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with called_with(console or make_console(quiet=True)):
        try:
            yield
        except Exception as error:
            if isinstance(error, LowmemError) or shortage_of(error) is None:
                raise
            raise LowmemError(explain(error)[0]) from error


def _path(file: File | Run | None) -> Path | None:
    from lowmem_drf.texts import expanded

    return None if file is None else expanded(os.fspath(file))


def _text(preset: File | None) -> str | None:
    return None if preset is None else os.fspath(preset)


def _file_of(prompts: Prompts | None) -> Path | None:
    """The prompt file, if it is one that is given. Raises BadInputError if there is none."""
    if not isinstance(prompts, str | PathLike):
        return None
    if (file := _path(prompts)) is None or not file.is_file():
        raise BadInputError(f"prompt file {prompts} does not exist. Prompts themselves are given as a list of texts.")
    return file


def _prompts_of(prompts: Prompts | None) -> tuple[Prompt, ...] | None:
    from lowmem_drf.prompts import load_prompts, parse_rows

    if prompts is None:
        return None
    file = _file_of(prompts)
    return load_prompts(file) if file else parse_rows(prompts)  # type: ignore[arg-type]  # no file: a sequence
