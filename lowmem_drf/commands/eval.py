"""``lowmem-drf eval``: base against tuned, as a table or as JSON."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowmem_drf.assembly.assemble import run_prompts
from lowmem_drf.config import change
from lowmem_drf.errors import BadInputError, LowmemError
from lowmem_drf.models.weights.sources import TOYWORLD
from lowmem_drf.prompts import load_prompts
from lowmem_drf.reporting.notes import write_result
from lowmem_drf.scoring import evaluate
from lowmem_drf.scoring.second import SecondCritic
from lowmem_drf.scoring.table import print_table
from lowmem_drf.scoring.vbench import Export, with_scores
from lowmem_drf.shared import tuned
from lowmem_drf.terminal import make_console, say, showing
from lowmem_drf.training.checkpoint import step_of

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from lowmem_drf.scoring.evaluate import Measured, Trial
    from lowmem_drf.shared.tuned import Tuned
    from lowmem_drf.types import Prompt


def eval_command(
    run_folder: Path | None,
    file: Path | None,
    as_json: bool,
    seeds: int | None = None,
    critic: str | None = None,
    export: tuple[str, Path] | None = None,
    scores: Path | None = None,
    best: bool = False,
    preset: str | None = None,
    lora: Path | None = None,
    overrides: Sequence[str] = (),
) -> None:
    """``lowmem-drf eval``."""
    console = make_console(stderr=as_json)
    if scores is not None:
        if run_folder or file or seeds or critic or export or best or preset or lora or overrides:
            raise BadInputError("--vbench-scores reads an evaluation that was exported: give it alone, or with --json.")
        _show(with_scores(scores), as_json, console)
        return
    if export and export[0] != "vbench":
        raise BadInputError(f"--export {export[0]}: there is one format, --export vbench DIR.")
    prompts = None if file is None else load_prompts(file)
    folder, source = export[1] if export else None, "" if file is None else f"of {file}"
    result, exported = compared(
        run_folder, preset, lora, overrides, best, prompts, source, seeds, critic, folder, console
    )
    _show(result, as_json, console)
    if exported:
        said = f"{exported.folder}: clips for VBench. Next, the first two commands where VBench is installed:"
        for line in (said, *(f"  {command}" for command in exported.finish(result))):
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def compared(
    run_folder: Path | None,
    preset: str | None,
    lora: Path | None,
    overrides: Sequence[str],
    best: bool,
    given: Sequence[Prompt] | None,
    source: str,
    seeds: int | None,
    critic: str | None,
    folder: Path | None,
    console: Console,
) -> tuple[dict[str, Any], Export | None]:
    """The JSON of ``eval``, and the clips in ``folder``, if one is given.

    Args:
        given: the prompts to evaluate on, whose origin is ``source`` in words.
        critic: a second one.
    """
    chosen = tuned.choose(run_folder, preset, lora, overrides, best, needs_lora=True)
    config = chosen.config
    prompts = () if config.prompts == TOYWORLD or given else run_prompts(config)
    seeds = evaluate.EVAL_SEEDS if seeds is None else seeds
    if seeds < 1:
        raise BadInputError(f"--seeds {seeds}: give at least 1 clip of each prompt.")
    trial = evaluate.make_trial(config, prompts, evaluate.EVAL_PROMPTS, seeds, given, source)
    # before clips are made for hours
    second = SecondCritic(config, critic, trial) if critic else None
    exported = Export(folder, trial, config.video.fps) if folder else None
    watchers = [watcher.watch for watcher in (second, exported) if watcher]

    def watch(side: str, here: Sequence[int], frames_BTCHW: Tensor) -> None:
        for see in watchers:
            see(side, here, frames_BTCHW)

    trial, sides = _measured(chosen, trial, console, watch)
    result = evaluate.as_result(trial, sides)
    if second:
        for side, values in second.ask(trial, console).items():
            for row, value in zip(sides[side].by_prompt, values, strict=True):
                row["second_reward"] = value
        asked = "held out" if trial.heldout else "of training"
        result = evaluate.as_result(trial, sides) | {"second": {"critic": critic, "questions": asked}}
    if chosen.run and chosen.checkpoint and given is None and not (best or overrides):
        _keep(chosen.run, step_of(chosen.checkpoint), evaluate.describe(trial), result)
    return result, exported


def _keep(run: Path, step: int, source: str, result: Mapping[str, Any]) -> None:
    """Puts a run's comparison as it was trained where ``train`` puts its own, for the report."""
    try:
        write_result(run, step, source, result)
    except (OSError, LowmemError) as error:  # the figures are not lost for it: they are shown
        say(f"{run} cannot be written to ({error}): the report will not have this comparison. Keep what is shown here.")


def _measured(chosen: Tuned, trial: Trial, console: Console, watch: Any) -> tuple[Trial, dict[str, Measured]]:
    """The finished trial and both sides. All models are gone when it returns."""
    config = chosen.config
    clips = {"log.eval_batch": min(config.log.eval_batch, len(trial.prompts) * trial.seeds)}
    exact = change(config, ["model.decoder=exact"])  # clips are decoded by the VAE in any case
    turns: list[tuple[bool, Sequence[str]]] = [(True, evaluate.SIDES)]
    if chosen.is_merged:
        say("clips of the base first, then the models are loaded anew: this LoRA changes more than linear layers")
        turns = [(False, ("base",)), (True, ("tuned",))]
    sides: dict[str, Measured] = {}
    for with_lora, names in turns:
        with showing(console):
            models = tuned.load(chosen, trial.prompts, exact, clips=clips, with_lora=with_lora)
        models.awake("critic")
        if not sides:
            trial = evaluate.finish_trial(config, trial, models.critic, console)
            what = f"{chosen.run or config.model.id}, {_of(chosen)}: {evaluate.describe(trial)}"
            console.print(what, highlight=False, markup=False, soft_wrap=True)
        sides |= evaluate.both_sides(config, models, trial, console, watch=watch, sides=names)
        del models
        _collect()
    return trial, sides


def _of(chosen: Tuned) -> str:
    """Which LoRA it is, in words."""
    return f"step {int(chosen.name.rpartition('-')[2])}" if chosen.checkpoint else f"LoRA {chosen.name}"


def _collect() -> None:
    """Frees models, which are in circles of hooks."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _show(result: dict[str, Any], as_json: bool, console: Console) -> None:
    if as_json:
        print(json.dumps(result))
    else:
        print_table(result, console)
