"""Loads the models that a configuration names, from the hub or the disk to the device."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowmem_drf.assembly.assemble import Models, assemble, critic_rate, resolve_device
from lowmem_drf.assembly.conditions import DTYPES, encode_images, encode_texts, require_images
from lowmem_drf.assembly.cudnn import require_fast_vae
from lowmem_drf.assembly.sizes import free_bytes, require_room, sizes_of
from lowmem_drf.distributed.ranks import ALONE, Ranks
from lowmem_drf.errors import BadInputError
from lowmem_drf.libraries import import_all
from lowmem_drf.memory.meter import Meter
from lowmem_drf.memory.residency import bring
from lowmem_drf.models.generators import family_of, generator_config
from lowmem_drf.models.rewards.clip import load_clip
from lowmem_drf.models.rewards.users import UserReward, find_maker, is_entry
from lowmem_drf.models.weights.downloads import check_host_memory, prepare
from lowmem_drf.models.weights.files import SECOND
from lowmem_drf.models.weights.sources import READER, TOYWORLD, resolve
from lowmem_drf.schema import Config
from lowmem_drf.schema.running import Parkable
from lowmem_drf.shortage import during
from lowmem_drf.terminal import say
from lowmem_drf.types import Prompt

if TYPE_CHECKING:
    from lowmem_drf.models.family import GeneratorConfig
    from lowmem_drf.models.lora.changes import LoraChanges
    from lowmem_drf.models.qwen_vl.critic import VLMCritic
    from lowmem_drf.models.weights.quant import Quant
    from lowmem_drf.models.weights.reader import Change, Shapes


def load_models(
    config: Config,
    prompts: Sequence[Prompt],
    with_critic: bool = True,
    ranks: Ranks = ALONE,
    clips: Mapping[str, int] | None = None,
    lora: LoraChanges | None = None,
    lora_scale: float = 1.0,
    kernels: Mapping[str, Any] | None = None,
) -> Models:
    """Loads every model of the configuration. The encoders are freed once ``prompts`` are encoded.

    Everything is downloaded and checked before anything is loaded. One rank per machine downloads and encodes for all;
    under ZeRO-3 the transformer is partitioned while it is read.

    Args:
        clips: how many will be made at once, as in ``sizes.require_room``.
        lora: of a file, for the transformer that is trained. Its pairs on Linears become adapters of strength 1
            (``adapter.lora_scale`` changes it); the rest is merged, times ``lora_scale``.
        kernels: as in ``assemble``.

    Raises:
        BadInputError: a model is missing or damaged, or the video's size does not fit it, or the memory.
        LowmemError: too little disk or host memory, or a download failed.
    """
    import_libraries(config)
    from lowmem_drf.models.experts import make_transformers, require_expert, subfolders_of
    from lowmem_drf.models.lora.adapter import attach_lora
    from lowmem_drf.models.lora.base import lora_changes, read_base_lora
    from lowmem_drf.models.tiny.files import load_tiny, sizes_in, tiny_file

    device = resolve_device(config.device)
    require_fast_vae(config, device)
    with ranks.one_first():
        generator = prepare_generator(config)
        described = generator_config(str(generator))
        require_expert(config, described)
        require_images(prompts, described, config)
        require_room(config, described, clips or {}, *free_bytes(device))
        family = family_of(described)
        shapes = family.parameter_shapes(described.transformer)
        adapters, rest = lora.split(shapes) if lora else (None, None)
        sizes, small = sizes_of(described), None
        if config.model.decoder != "exact" and with_critic:
            small = tiny_file(config.model.id, config.model.decoder_file, sizes, say)
            sizes_in(small, sizes)
        for source, _ in config.model.base_loras():  # a bad file is refused before texts are encoded for minutes
            read_base_lora(source, shapes, say)
        if with_critic and config.critic.weights.asked:
            prepare(config.critic.id, "critic", say)
        for reward in config.rewards.values() if with_critic else ():
            prepare_reward(reward.id, say)
        home = _home(config, "transformer", device)
        # transformers that go to the card, or are packed or partitioned, are never on the host in full
        whole = home.type == "cpu" and config.model.storage == "none" and config.engine != "zero3"
        passing = () if whole else ("transformer", SECOND)
        single = _parameters(described) if whole and config.model.transformer else 0
        without = (*_without(config), *passing)
        check_host_memory(generator, "generator", DTYPES[config.dtype].itemsize, without, single)
        text_device = torch.device("cpu") if config.memory.text_device == "host" else device
        with during("text"):
            texts = [*(prompt.text for prompt in prompts), config.sampler.negative_prompt]
            encoded = encode_texts(config, str(generator), texts, text_device)
            images = encode_images(config, str(generator), [p.image for p in prompts if p.image], device)
    taken = None
    if config.engine == "zero3":
        from lowmem_drf.distributed.zero import Partition

        taken = Partition(config).take

    trained, _ = subfolders_of(described, config.model.expert)

    def load(name: str) -> Any:
        merged = lora_changes(rest, lora_scale) if rest and name == trained else None
        return load_transformer(config, generator, DTYPES[config.dtype], device, name, home, taken=taken, merged=merged)

    transformer, other = make_transformers(described, config, load)
    vae = family.load_vae(str(generator), DTYPES[config.memory.vae_dtype], _home(config, "vae", device))
    asked, judges = with_critic and config.critic.weights.asked, _home(config, "critic", device)
    critic = load_run_critic(config, judges) if asked else None
    rewards = load_rewards(config, judges) if with_critic else {}
    meter, tiny = Meter(device), None
    if small:
        tiny = load_tiny(small, sizes, DTYPES[config.memory.vae_dtype], device)
    models = assemble(
        config, transformer, vae, critic, encoded, device, meter, other=other, kernels=kernels, ranks=ranks, tiny=tiny,
        rewards=rewards, images=images,
    )  # fmt: skip
    if adapters:
        attach_lora(models.transformer, adapters)
    return with_partitioned_critic(config, models) if config.zero.critic and critic else models


def read_lora_for(config: Config, path: Path) -> LoraChanges:
    """Reads a LoRA file for the transformer that ``config`` trains. Raises BadInputError as ``read_lora``, and, before
    anything is downloaded, for a LoRA of another model."""
    from lowmem_drf.models.lora.reading import read_lora

    try:
        generator = generator_config(config.model.id)
    except BadInputError:  # its configuration is not on this machine yet
        return read_lora(path)
    lora = read_lora(path, config.model.expert if generator.boundary is not None else None)
    try:
        lora.require_fit(family_of(generator).parameter_shapes(generator.transformer))
    except BadInputError as error:
        raise BadInputError(f"{path}: {error} lowmem-drf inspect-lora says which one that is.") from error
    return lora


def with_partitioned_critic(config: Config, models: Models) -> Models:
    """Partitions the weights of the loaded critic over the ranks."""
    from lowmem_drf.distributed.zero import Partition, ZeroForward

    critic, partition = models.asked_critic, Partition(config)
    for parameter in critic.model.parameters():
        partition.take(parameter)
    bring(critic.model, models.device)  # buffers
    ask = ZeroForward(config, critic.model, critic, critic.leaves)
    models.residency.add("critic", ask)
    return replace(models, ask=ask)


def _home(config: Config, name: Parkable, device: torch.device) -> torch.device:
    """The device to load a model to: the host for offloaded and streamed models, which may not fit on the card."""
    on_host = name in config.memory.park or name in config.memory.stream or (name == "critic" and config.zero.critic)
    return torch.device("cpu") if on_host else device


def prepare_generator(config: Config) -> Path:
    """The generator's complete folder. Raises as ``downloads.prepare``."""
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
    merged: Mapping[str, Change] | None = None,
) -> Any:
    """The frozen base of a run's LoRA, from the folder or the single file: ``model.base_lora`` is merged, then the
    weights are packed.

    Args:
        device: where weights are changed and packed.
        home: final device. Default: ``device``.
        quant: default: ``model.storage``.
        blocks: only the first N blocks get values and memory.
        taken: called with every filled parameter.
        merged: changes of parameters besides those of ``model.base_lora``.

    Raises BadInputError: a file is missing or unusable, or no bitsandbytes.
    """
    from lowmem_drf.models.lora.base import base_changes, in_turn

    loras, described = config.model.base_loras(), generator_config(str(generator))
    family = family_of(described)

    def changes(shapes: Shapes) -> dict[str, Change]:
        return in_turn(base_changes(loras, shapes, say), merged or {})

    rest: dict[str, Any] = {
        "quant": quant or config.model.storage,
        "home": home,
        "changes": changes if loras or merged else None,
        "blocks": blocks,
        "taken": taken,
    }
    if config.model.transformer and subfolder == "transformer":
        sizes, place = described.transformer, str(generator)
        return family.load_file(config.model.transformer, sizes, place, dtype, device, say=say, **rest)
    return family.load_transformer(str(generator), dtype, device, subfolder=subfolder, **rest)


def load_run_critic(config: Config, home: torch.device | None = None) -> VLMCritic:
    """The critic as a run uses it. ``home``: device of its weights; default: the run's device, which also quantised
    weights get: a CPU takes minutes to quantise what a card does in seconds."""
    if not config.critic.weights.asked:
        raise BadInputError("all critic.weights are 0, so there is no critic to ask. Raise one: -s critic.weights.TA=1")
    import_libraries(config)
    from lowmem_drf.models.qwen_vl.critic import load_critic

    folder, device = prepare(config.critic.id, "critic", say), resolve_device(config.device)
    device = home or device if config.critic.quant == "none" else device
    if config.critic.quant == "none":
        check_host_memory(folder, "critic", DTYPES[config.dtype].itemsize)
    elif device.type == "cpu":  # on a card, weights are quantised one by one
        check_host_memory(folder, "critic", 1)  # half a byte per 4-bit weight, two per other weight: at least one
    # ToyWorld's critics were trained at one frame rate, which their folders name
    fps = None if config.critic.id in (TOYWORLD, READER) else critic_rate(config)
    critic = load_critic(str(folder), DTYPES[config.dtype], device, fps, config.critic.quant)
    critic.set_checkpointing(bool(config.memory.checkpoint))
    return critic


def load_rewards(config: Config, home: torch.device) -> dict[str, torch.nn.Module]:
    """The scalar rewards of a run, by name. ``home``: where their weights are to be."""
    dtype, rewards = DTYPES[config.dtype], dict[str, torch.nn.Module]()
    for name, reward in config.rewards.items():
        if is_entry(reward.id):
            rewards[name] = UserReward(reward.id, resolve_device(config.device), dtype)
        else:
            folder = prepare_reward(reward.id, say)
            check_host_memory(folder, "reward", 4)  # it is read in fp32
            rewards[name] = load_clip(folder, dtype, home, bool(config.memory.checkpoint), say)
    return rewards


def prepare_reward(reward_id: str, say: Callable[[str], None]) -> Path:
    """Its complete folder; of an entry point the current one, once the function is found."""
    if is_entry(reward_id):
        find_maker(reward_id)
        return Path()
    return prepare(reward_id, "reward", say)


def _without(config: Config) -> tuple[str, ...]:
    """Unneeded subfolders of the generator."""
    return ("transformer",) if config.model.transformer else ()


def _parameters(generator: GeneratorConfig) -> int:
    """Parameters of its transformer."""
    return sum(map(math.prod, family_of(generator).parameter_shapes(generator.transformer).values()))


def import_libraries(config: Config) -> None:
    """Imports the libraries, so that a broken one is named before any work, and hides their bars if nothing is
    downloaded."""
    if Path(resolve(config.model.id, "generator")).is_dir() and Path(resolve(config.critic.id, "critic")).is_dir():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import_all()
    if config.engine != "single":
        from lowmem_drf.distributed.zero import import_deepspeed

        import_deepspeed()
