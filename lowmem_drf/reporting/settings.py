"""The settings that tell a reader what was trained on what."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from lowmem_drf.reporting.read import Record, as_row
from lowmem_drf.schema import Config


def groups(record: Record) -> Mapping[str, Mapping[str, str]]:
    """Title -> name -> value. Empty values are not shown."""
    config = without_folders(record.config)
    video, model, critic, lora = config.video, config.model, config.critic, config.lora
    sampler, optim, notes = config.sampler, config.optim, record.notes
    bases = [model.base_lora] if isinstance(model.base_lora, str) else model.base_lora
    weights = ", ".join(f"{name} {value:g}" for name, value in critic.weights.model_dump().items())
    versions = {name: str(version) for name, version in as_row(notes.get("versions")).items()}
    rs = " (rsLoRA)" if lora.rslora else ""
    used = "" if lora.scale == 1 else f", used at {lora.scale:g} times its strength"
    ranks = " and ".join(map(str, sorted({lora.rank, *lora.ranks.values()})))
    warmup = f", warm-up {optim.warmup_steps}" if optim.warmup_steps else ""
    found = {
        "What": {
            "preset": PureWindowsPath(str(notes.get("origin", "")).removeprefix("preset ")).name,
            "generator": model.id,
            "transformer": model.transformer,
            "base LoRA": ", ".join(filter(None, bases)),
            "weights": "" if model.quant == "none" else model.quant,
            "clips": f"{video.width}×{video.height}, {video.frames} frames at {video.fps} a second",
            "prompts": f"{len(record.questions)}, of {config.prompts}" if record.questions else config.prompts,
        },
        "Critic": {
            "model": critic.id,
            "weights": "" if critic.quant == "none" else critic.quant,
            "questions": f"{critic.mode}, from {critic.questions}",
            "reward": critic.reward,
            "aspects": weights,
            "sees": f"{critic.frames} frames" if isinstance(critic.frames, int) else critic.frames,
        }
        if critic.weights.asked
        else {},
        "Other rewards": {
            name: f"{reward.id}, {'held out' if reward.held_out else f'times {reward.weight:g}'}"
            for name, reward in config.rewards.items()
        },
        "Training": {
            "LoRA": f"rank {ranks}, alpha {lora.alpha:g}{rs}, {len(lora.targets)} kinds of layers{used}",
            "begins with": lora.init,
            "updates": f"{config.steps}, {config.batch} clips each",
            "optimizer": f"{optim.name}, lr {optim.lr:g}, {optim.schedule}{warmup}",
            "sampling": f"{sampler.steps} steps, {sampler.graded_steps} graded ({sampler.graded})",
            "guidance": "" if sampler.guidance == 1 else f"{sampler.guidance:g}",
            "precision": config.dtype,
            "seed": str(config.seed),
        },
        "Made with": {"device": str(notes.get("device", "")), **versions},
    }
    return {title: {k: v for k, v in rows.items() if v} for title, rows in found.items() if any(rows.values())}


def without_folders(config: Config) -> Config:
    """Files are named without their folders, which may hold the user's name: reports are passed on."""

    def bare(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: bare(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [bare(inner) for inner in value]
        if isinstance(value, str) and (Path(value).is_absolute() or PureWindowsPath(value).is_absolute()):
            return PureWindowsPath(value).name
        return value

    return config.model_validate(bare(config.model_dump()))
