"""``lowmem-drf eval``: base against tuned, as a table or as JSON."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowmem_drf.assembly.assemble import run_prompts
from lowmem_drf.assembly.kernel_choice import saved_choice
from lowmem_drf.assembly.loading import load_models, say
from lowmem_drf.config import change
from lowmem_drf.errors import BadInputError
from lowmem_drf.models.weights.sources import TOYWORLD
from lowmem_drf.scoring import evaluate
from lowmem_drf.scoring.alarm import best_step
from lowmem_drf.scoring.second import SecondCritic
from lowmem_drf.scoring.table import print_table
from lowmem_drf.scoring.vbench import Export, with_scores
from lowmem_drf.terminal import make_console, showing
from lowmem_drf.training.checkpoint import checkpoint_folder
from lowmem_drf.training.lora_file import load_run_lora
from lowmem_drf.training.run_folder import find_run, run_config

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from lowmem_drf.scoring.evaluate import Measured, Trial


def eval_command(
    run_folder: Path | None,
    file: Path | None,
    as_json: bool,
    seeds: int | None = None,
    critic: str | None = None,
    export: tuple[str, Path] | None = None,
    scores: Path | None = None,
    best: bool = False,
) -> None:
    """``lowmem-drf eval``."""
    console = make_console(stderr=as_json)
    if scores is not None:
        if run_folder or file or seeds or critic or export or best:
            raise BadInputError("--vbench-scores reads an evaluation that was exported: give it alone, or with --json.")
        _show(with_scores(scores), as_json, console)
        return
    if export and export[0] != "vbench":
        raise BadInputError(f"--export {export[0]}: there is one format, --export vbench DIR.")
    run = find_run(run_folder)
    config, folder = run_config(run), checkpoint_folder(run, best_step(run) if best else None)
    prompts = () if config.prompts == TOYWORLD or file else run_prompts(config)
    trial = evaluate.make_trial(config, prompts, evaluate.EVAL_PROMPTS, seeds or evaluate.EVAL_SEEDS, file)
    # before clips are made for hours
    second = SecondCritic(config, critic, trial) if critic else None
    exported = Export(export[1], trial, config.video.fps) if export else None
    watchers = [watcher.watch for watcher in (second, exported) if watcher]

    def watch(side: str, here: Sequence[int], frames_BTCHW: Tensor) -> None:
        for see in watchers:
            see(side, here, frames_BTCHW)

    trial, sides = _measured(run, folder, trial, console, watch)
    result = evaluate.as_result(trial, sides)
    if second:
        gc.collect()  # the generator and the first critic: in circles of hooks
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        for side, values in second.ask(trial, console).items():
            for row, value in zip(sides[side].by_prompt, values, strict=True):
                row["second_reward"] = value
        asked = "held out" if trial.heldout else "of training"
        result = evaluate.as_result(trial, sides) | {"second": {"critic": critic, "questions": asked}}
    _show(result, as_json, console)
    if exported:
        said = f"{exported.folder}: clips for VBench. Next, the first two commands where VBench is installed:"
        for line in (said, *(f"  {command}" for command in exported.finish(result))):
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def _measured(
    run: Path, checkpoint: Path, trial: Trial, console: Console, watch: Any
) -> tuple[Trial, dict[str, Measured]]:
    """The finished trial and both sides, with the LoRA of a checkpoint. All models are gone when it returns."""
    config = run_config(run)
    clips = {"log.eval_batch": min(config.log.eval_batch, len(trial.prompts) * trial.seeds)}
    with showing(console):
        texts, kernels = [prompt.text for prompt in trial.prompts], saved_choice(run, say)
        exact = change(config, ["model.decoder=exact"])  # clips are decoded by the VAE in any case
        models = load_models(exact, texts, clips=clips, kernels=kernels)
    step = load_run_lora(models.transformer, checkpoint, config)
    models.awake("critic")
    trial = evaluate.finish_trial(config, trial, models.asked_critic, console)
    console.print(f"{run}, step {step}: {evaluate.describe(trial)}", highlight=False, markup=False, soft_wrap=True)
    return trial, evaluate.both_sides(config, models, trial, console, watch=watch)


def _show(result: dict[str, Any], as_json: bool, console: Console) -> None:
    if as_json:
        print(json.dumps(result))
    else:
        print_table(result, console)
