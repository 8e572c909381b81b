"""The models that a configuration names, from the disk (and before that from the hub) to the device."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowmem_drf.memory.meter import Meter
from lowmem_drf.models.downloads import check_host_memory, prepare
from lowmem_drf.models.sources import TOYWORLD, resolve
from lowmem_drf.run.parts import Models, assemble, critic_rate, resolve_device
from lowmem_drf.run.texts import DTYPES, encode_texts
from lowmem_drf.schema import Config

if TYPE_CHECKING:
    from lowmem_drf.models.critic import QwenCritic


def load_models(config: Config, texts: Sequence[str], with_critic: bool = True) -> Models:
    """Loads every model the configuration names; the text encoder is gone once all ``texts`` are encoded. The LoRA is the caller's.

    Everything is downloaded and checked before anything is loaded.

    Raises:
        BadInputError: a model cannot be found or is damaged, or the video's size does not fit it.
        LowmemError: not enough disk or host memory, or a download failed.
    """
    _hide_loading_bars(config)
    from lowmem_drf.models.decoder import load_vae

    device = resolve_device(config.device)
    generator = prepare_generator(config)
    if with_critic:
        prepare(config.critic.id, "critic", say)
    check_host_memory(generator, "generator", DTYPES[config.dtype].itemsize, _without(config))
    text_device = torch.device("cpu") if config.memory.text_device == "host" else device
    encoded = encode_texts(config, str(generator), [*texts, config.sampler.negative_prompt], text_device)
    transformer = load_transformer(config, generator, DTYPES[config.dtype], device)
    vae = load_vae(str(generator), DTYPES[config.memory.vae_dtype], device)
    return assemble(config, transformer, vae, load_run_critic(config) if with_critic else None, encoded, device, Meter(device))


def prepare_generator(config: Config) -> Path:
    """The generator's folder, complete. Raises as ``downloads.prepare``."""
    return prepare(config.model.id, "generator", say, _without(config))


def load_transformer(config: Config, generator: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The frozen base that the LoRA of a run is trained on: of the folder or the single file, with ``model.base_lora`` merged in."""
    from lowmem_drf.models.denoiser import load_denoiser

    if config.model.transformer:
        from lowmem_drf.models.single_file import load_single_file

        transformer = load_single_file(config.model.transformer, str(generator), dtype, device)
    else:
        transformer = load_denoiser(str(generator), dtype, device)
    if config.model.base_lora:
        from lowmem_drf.models.base_lora import merge_base_lora

        changed = merge_base_lora(transformer, config.model.base_lora, say, config.model.base_lora_scale)
        say(f"{config.model.base_lora}: merged into {changed} tensors of the base")
    return transformer


def load_run_critic(config: Config) -> QwenCritic:
    """The critic alone, as a run has it."""
    _hide_loading_bars(config)
    from lowmem_drf.models.critic import load_critic

    folder, device = prepare(config.critic.id, "critic", say), resolve_device(config.device)
    if config.critic.quant == "none" or device.type == "cpu":  # else its weights stream to the card one by one
        check_host_memory(folder, "critic", DTYPES[config.dtype].itemsize)
    # ToyWorld's critic was trained at the one frame rate that its folder names; a real one is told how fast its frames pass
    fps = None if config.critic.id == TOYWORLD else critic_rate(config)
    critic = load_critic(str(folder), DTYPES[config.dtype], device, fps, config.critic.quant)
    critic.set_checkpointing(bool(config.memory.checkpoint))
    return critic


def say(text: str) -> None:
    """A line for whoever waits."""
    print(text, file=sys.stderr, flush=True)


def _without(config: Config) -> tuple[str, ...]:
    """Subfolders of the generator that are not needed."""
    return ("transformer",) if config.model.transformer else ()


def _hide_loading_bars(config: Config) -> None:
    """Where nothing is downloaded. To be called before the libraries are imported."""
    if Path(resolve(config.model.id, "generator")).is_dir() and Path(resolve(config.critic.id, "critic")).is_dir():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
