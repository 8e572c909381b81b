"""``lowmem-drf eval``: base against tuned, as a table or as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from lowmem_drf.assembly.assemble import run_prompts
from lowmem_drf.assembly.kernel_choice import saved_choice
from lowmem_drf.assembly.loading import load_models, say
from lowmem_drf.config import change
from lowmem_drf.models.weights.sources import TOYWORLD
from lowmem_drf.scoring import evaluate
from lowmem_drf.terminal import make_console, showing
from lowmem_drf.training.checkpoint import checkpoint_folder
from lowmem_drf.training.lora_file import load_run_lora
from lowmem_drf.training.run_folder import find_run, run_config


def eval_command(run_folder: Path | None, file: Path | None, as_json: bool) -> None:
    """``lowmem-drf eval``."""
    run = find_run(run_folder)
    config, folder = run_config(run), checkpoint_folder(run)
    prompts = () if config.prompts == TOYWORLD or file else run_prompts(config)
    trial = evaluate.make_trial(config, prompts, evaluate.EVAL_PROMPTS, evaluate.EVAL_SEEDS, file)
    clips = {"log.eval_batch": min(config.log.eval_batch, len(trial.prompts) * trial.seeds)}
    console = make_console(stderr=as_json)
    with showing(console):
        texts, kernels = [prompt.text for prompt in trial.prompts], saved_choice(run, say)
        exact = change(config, ["model.decoder=exact"])  # clips are decoded by the VAE in any case
        models = load_models(exact, texts, clips=clips, kernels=kernels)
    step = load_run_lora(models.transformer, folder, config)
    models.awake("critic")
    trial = evaluate.finish_trial(config, trial, models.asked_critic, console)
    console.print(f"{run}, step {step}: {evaluate.describe(trial)}", highlight=False, markup=False, soft_wrap=True)
    result = evaluate.compare(config, models, trial, console)
    if as_json:
        print(json.dumps(result))
    else:
        evaluate.print_table(result, console)
