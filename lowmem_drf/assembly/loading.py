"""The models that a configuration names, from the disk (and before that from the hub) to the device."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowmem_drf.assembly.assemble import Models, assemble, critic_rate, resolve_device
from lowmem_drf.assembly.text_cache import DTYPES, encode_texts
from lowmem_drf.distributed.ranks import ALONE, Ranks
from lowmem_drf.memory.meter import Meter
from lowmem_drf.memory.residency import bring
from lowmem_drf.models.generators import generator_config
from lowmem_drf.models.weights.downloads import check_host_memory, prepare
from lowmem_drf.models.weights.files import SECOND
from lowmem_drf.models.weights.sources import TOYWORLD, resolve
from lowmem_drf.schema import Config, Parkable

if TYPE_CHECKING:
    from lowmem_drf.models.qwen_vl.critic import QwenCritic
    from lowmem_drf.models.weights.quant import Quant
    from lowmem_drf.models.weights.reader import Change, Shapes


def load_models(config: Config, texts: Sequence[str], with_critic: bool = True, ranks: Ranks = ALONE) -> Models:
    """Loads every model the configuration names; the text encoder is gone once all ``texts`` are encoded. The LoRA is
    the caller's.

    Everything is downloaded and checked before anything is loaded. Of many processes on a machine one downloads and
    encodes for all; under ZeRO-3 the transformer is partitioned over them as it is read.

    Raises:
        BadInputError: a model cannot be found or is damaged, or the video's size does not fit it.
        LowmemError: not enough disk or host memory, or a download failed.
    """
    _hide_loading_bars(config)
    from lowmem_drf.models.wan.decoder import load_vae
    from lowmem_drf.models.wan.experts import make_transformers, require_expert

    device = resolve_device(config.device)
    with ranks.one_first():
        generator = prepare_generator(config)
        described = generator_config(str(generator))
        require_expert(config, described)
        if with_critic:
            prepare(config.critic.id, "critic", say)
        home = _home(config, "transformer", device)
        # on their way to the card, packed, or partitioned, transformers are never here in full
        passing = (
            ()
            if home.type == "cpu" and config.model.quant == "none" and config.engine != "zero3"
            else ("transformer", SECOND)
        )
        check_host_memory(generator, "generator", DTYPES[config.dtype].itemsize, (*_without(config), *passing))
        text_device = torch.device("cpu") if config.memory.text_device == "host" else device
        encoded = encode_texts(config, str(generator), [*texts, config.sampler.negative_prompt], text_device)
    taken = None
    if config.engine == "zero3":
        from lowmem_drf.distributed.zero import Partition

        taken = Partition(config).take
    transformer, other = make_transformers(
        described,
        config,
        lambda name: load_transformer(config, generator, DTYPES[config.dtype], device, name, home, taken=taken),
    )
    vae = load_vae(str(generator), DTYPES[config.memory.vae_dtype], _home(config, "vae", device))
    critic = load_run_critic(config, _home(config, "critic", device)) if with_critic else None
    models = assemble(config, transformer, vae, critic, encoded, device, Meter(device), other=other)
    return with_partitioned_critic(config, models) if config.zero.critic and critic else models


def with_partitioned_critic(config: Config, models: Models) -> Models:
    """The models with the critic's weights, which are here in full, partitioned over the processes."""
    from lowmem_drf.distributed.zero import Partition, ZeroForward

    critic, partition = models.asked_critic, Partition(config)
    for parameter in critic.model.parameters():
        partition.take(parameter)
    bring(critic.model, models.device)  # buffers
    ask = ZeroForward(config, critic.model, critic, critic.leaves)
    models.residency.add("critic", ask)
    return replace(models, ask=ask)


def _home(config: Config, name: Parkable, device: torch.device) -> torch.device:
    """Where a model's weights lie when it is loaded: on the host if they are to wait there, and may be too many for the
    card."""
    waits = name in config.memory.park or name in config.memory.stream or (name == "critic" and config.zero.critic)
    return torch.device("cpu") if waits else device


def prepare_generator(config: Config) -> Path:
    """The generator's folder, complete. Raises as ``downloads.prepare``."""
    return prepare(config.model.id, "generator", say, _without(config))


def load_transformer(
    config: Config,
    generator: Path,
    dtype: torch.dtype,
    device: torch.device,
    subfolder: str = "transformer",
    home: torch.device | None = None,
    quant: Quant | None = None,
    blocks: int | None = None,
    taken: Callable[[torch.nn.Parameter], None] | None = None,
) -> Any:
    """The frozen base that the LoRA of a run is trained on: of the folder or the single file, with ``model.base_lora``
    added, then packed.

    Args:
        home: where it stays. Default: ``device``, where its weights are changed and packed.
        quant: default: ``model.quant``.
        blocks: only the first so many have values, and take memory.
        taken: called with every parameter as soon as it has its value.

    Raises:
        BadInputError: a file cannot be found or used, or bitsandbytes is missing.
    """
    from lowmem_drf.models.lora.base import base_changes
    from lowmem_drf.models.wan.denoiser import load_denoiser
    from lowmem_drf.models.wan.single_file import load_single_file

    lora = config.model.base_lora

    def changes(shapes: Shapes) -> dict[str, Change]:
        found = base_changes(lora, shapes, say, config.model.base_lora_scale)
        say(f"{lora}: merged into {len(found)} tensors of the base")
        return found

    rest: dict[str, Any] = {
        "quant": quant or config.model.quant,
        "home": home,
        "changes": changes if lora else None,
        "blocks": blocks,
        "taken": taken,
    }
    if config.model.transformer and subfolder == "transformer":
        return load_single_file(config.model.transformer, str(generator), dtype, device, **rest)
    return load_denoiser(str(generator), dtype, device, subfolder=subfolder, **rest)


def load_run_critic(config: Config, home: torch.device | None = None) -> QwenCritic:
    """The critic alone, as a run has it. ``home``: where its weights are to lie. Default: on the run's device, and
    there in any case if they are quantised as they are loaded: a CPU takes minutes to quantise what a card does in
    seconds."""
    _hide_loading_bars(config)
    from lowmem_drf.models.qwen_vl.critic import load_critic

    folder, device = prepare(config.critic.id, "critic", say), resolve_device(config.device)
    device = home or device if config.critic.quant == "none" else device
    if config.critic.quant == "none":
        check_host_memory(folder, "critic", DTYPES[config.dtype].itemsize)
    elif device.type == "cpu":  # else its weights stream to the card one by one
        # half a byte a weight in 4 bit, two of all others: a byte, about, and no less
        check_host_memory(folder, "critic", 1)
    # ToyWorld's critic was trained at the one frame rate that its folder names; a real one is told how fast its frames
    # pass
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
