"""Trains a variant with one seed, and measures its checkpoints: one JSON file a run."""

from __future__ import annotations

import json
import statistics
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.evening import passes
from bench.evidence.alarms import replayed
from bench.evidence.baselines import method
from bench.evidence.levers import LEVERS
from bench.evidence.page import drift_of
from bench.evidence.variants import LATE, QUICK, Variant
from bench.script import save
from bench.toyworld.seeds import LIBRARIES
from lowmem_drf.assembly.assemble import Models
from lowmem_drf.assembly.loading import load_models
from lowmem_drf.commands.train import train_command
from lowmem_drf.config import change
from lowmem_drf.models.lora.adapter import load_lora_state, lora_norm, lora_scale
from lowmem_drf.schema import Config
from lowmem_drf.scoring.alarm import read_looks
from lowmem_drf.scoring.evaluate import Trial, finish_trial, make_trial, measure
from lowmem_drf.training.checkpoint import checkpoint_folder, load_checkpoint, saved_step
from lowmem_drf.training.lora_file import load_run_lora
from lowmem_drf.training.metrics import read_metrics
from lowmem_drf.training.run_folder import run_config

EVERY, EVERY_ALARM = 100, 50
"""Updates between two measured checkpoints; where the alarm is judged."""
PROMPTS, SEEDS = 64, 2
"""Held-out prompts, and clips of each."""
SCALES = (1.5, 0.75, 0.5)
"""Of the LoRA at sampling, times the run's own, measured besides 1 at the end of a run."""
WATCHED = ("log.watch_every=25", "log.watch_prompts=16")
BEFORE = ("optim.anchor=0", "optim.anchor_huber=off", "optim.anchor_every=1", "lora.scale=1")
BEFORE += ("batch=8", "micro_batch=8", "lora.alpha=16")
"""What ``toy-fast`` was before the study, and ``toy`` is."""
SETTINGS = (*WATCHED, "log.sample_every=0", "log.eval_prompts=0", "log.keep=1000")


def run(name: str, variant: Variant, seed: int, work: Path, file: Path, console: Console, every: int = 0) -> None:
    """Trains (or goes on) in ``work``, then measures what ``file`` does not have yet, and writes it after each
    checkpoint."""
    folder, every = work / f"{name}_{seed}", every or (EVERY_ALARM if variant.group == "alarm" else EVERY)
    settings = [
        *BEFORE,
        *variant.overrides,
        f"steps={variant.updates}",
        f"log.checkpoint_every={every}",
        *SETTINGS,
    ]
    with method(variant.method), ExitStack() as stack:
        for lever in variant.levers:
            stack.enter_context(LEVERS[lever]())
        if not (done := saved_step(folder)):
            train_command(variant.preset, None, folder, None, seed, False, settings, False)
        elif done < variant.updates:
            train_command(None, None, folder, None, None, True, (), False)
    config = run_config(folder)
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"rows": []}
    asked = {**asdict(variant), "threads": torch.get_num_threads(), "passes": passes(config)}
    result = {"variant": name, "seed": seed, **asked, "rows": result["rows"], "late": result.get("late", [])}
    result["looks"] = [asdict(look) for look in read_looks(folder, variant.updates)]
    measured = {(row["step"], row["scale"], row.get("max_sigma", 1)) for row in (*result["rows"], *result["late"])}
    points = [(step, 1.0, 1.0) for step in (*range(0, variant.updates, every), variant.updates)]
    points += [(marked, 1.0, 1.0)] if result["looks"] and (marked := replayed(result["looks"]).best) else []
    if variant.updates > QUICK:
        points += [(variant.updates, scale, 1.0) for scale in SCALES]
        points += [(variant.updates, scale, LATE) for scale in (1.0, SCALES[0])]
    if not (left := [point for point in dict.fromkeys(points) if point not in measured]):
        return
    measurer = Measurer(config, folder, console)
    metrics = read_metrics(folder)
    for step, scale, max_sigma in left:
        last = [row for row in metrics if step - 20 < row["step"] <= step]
        trained = {"reward": statistics.fmean(row["reward"] for row in last)} if last else {}
        seconds = sum(row["update_s"] for row in metrics if row["step"] <= step)
        row = {"step": step, "scale": scale, "updates_s": seconds, "trained": trained}
        row |= measurer(step, scale, max_sigma)
        if max_sigma == LATE:
            row = {"max_sigma": max_sigma, **row}
            result["late"].append(row)
        else:
            result["rows"] = sorted([*result["rows"], row], key=lambda row: (row["step"], -row["scale"]))
        file.parent.mkdir(parents=True, exist_ok=True)
        save(file, result, *LIBRARIES)
        console.print(line(name, seed, row), highlight=False)


def line(name: str, seed: int, row: dict[str, Any]) -> str:
    """A measured checkpoint in one line."""
    oracle = row["oracle"]
    drift, radius, spread, edge = (drift_of(row, key) for key in ("mean", "radius", "radius_spread", "edge_px"))
    late = f" up to {row['max_sigma']}" if "max_sigma" in row else ""
    said = f"{name} {seed} {row['step']:5d} x{row['scale']}{late}  all {oracle['all']:.1%}"
    said += f" physics {oracle['physics']:.1%} quality {oracle['quality']:.1%}"
    said += f"  held-out {row['heldout_reward']:.3f} second {row['second']:.3f}"
    said += f"  diversity {row['diversity']:.3f} velocity {row['velocity_norm']:.2f} lora {row['lora_norm']:.1f}"
    return f"{said}  drift {drift:.2f} radius {radius:.2f} spread {spread:.2f} edge {edge:.2f}"


class Measurer:
    """A run's checkpoints against held-out prompts: two critics and the oracle."""

    def __init__(self, config: Config, folder: Path, console: Console) -> None:
        self.config, self.folder, self.done = config, folder, saved_step(folder)
        trial = make_trial(config, (), PROMPTS, SEEDS)
        self.models = load_models(config, trial.prompts)
        load_run_lora(self.models.transformer, checkpoint_folder(folder), config)
        self.trial = finish_trial(config, trial, self.models.asked_critic, console)
        other = "toyworld" if config.critic.id == "toyworld-reader" else "toyworld-reader"
        critic = load_models(change(config, [f"critic.id={other}"]), trial.prompts).asked_critic
        self.second = _answered_by(self.models, self.trial, critic)

    def __call__(self, step: int, scale: float, max_sigma: float = 1.0) -> dict[str, Any]:
        """``eval``'s measures of this checkpoint (0: the base) at ``scale`` times its own strength, used up to
        ``max_sigma``; ``second``, the other critic's answers to the held-out questions; and ``lora_norm``."""
        models = replace(self.models, max_sigma=max_sigma)
        transformer, (other, asked) = models.transformer, self.second
        self.load(step)
        with lora_scale(transformer, self.used(step, scale)):
            seen = measure(self.config, models, self.trial, lambda clips: None)
            other = replace(other, max_sigma=max_sigma)
            second = measure(self.config, other, asked, lambda clips: None)["heldout_reward"]
            norm = lora_norm(transformer) if step else 0.0
        return {**seen, "second": second, "lora_norm": norm}

    def used(self, step: int, scale: float = 1.0) -> float:
        """For ``lora_scale``: ``scale`` times this checkpoint's own strength, on a model that was loaded at the last
        one's; 0: the base."""
        return scale * self.config.strength(step) / self.config.strength(self.done) if step else 0.0

    def load(self, step: int) -> None:
        """Takes the LoRA of this checkpoint; 0: it stays."""
        if step:
            load_lora_state(self.models.transformer, load_checkpoint(checkpoint_folder(self.folder, step)).lora)


def _answered_by(models: Models, trial: Trial, critic: Any) -> tuple[Models, Trial]:
    """The same models and clips, with another critic that is asked the held-out questions alone."""
    asked = {name: tuple(questions) for name, questions in trial.heldout.items()}
    return replace(models, critic=critic, ask=None), replace(trial, questions=asked)
