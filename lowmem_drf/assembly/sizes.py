"""The sizes that a configuration asks for, checked before anything of that size is made: the generator's own limits,
and what a device could not hold whatever is saved elsewhere. A size that passes may still be too large: on a card the
plan says so (``planner/report.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from lowmem_drf.errors import BadInputError
from lowmem_drf.models.family import GeneratorConfig, GeneratorSizes
from lowmem_drf.models.generators import family_of
from lowmem_drf.models.weights.downloads import available_host_bytes
from lowmem_drf.schema import Config
from lowmem_drf.shortage import GIB


def sizes_of(generator: GeneratorConfig) -> GeneratorSizes:
    """Of a generator that is not loaded."""
    return family_of(generator).sizes(generator.transformer, generator.vae)


def latent_shape(config: Config, sizes: GeneratorSizes) -> tuple[int, int, int, int]:
    """(C, F, h, w). Raises BadInputError: the video's size does not fit the generator."""
    video, most, every = config.video, sizes.positions, sizes.temporal or 1
    frames = (video.frames - 1) // every + 1
    for name, value, patch in (("width", video.width, sizes.patch[2]), ("height", video.height, sizes.patch[1])):
        unit = sizes.spatial * patch
        if value % unit:
            raise BadInputError(
                f"video.{name} = {value} is not a multiple of {unit}, the patch grid of {config.model.id}. "
                f"Nearest: -s video.{name}={max(unit, round(value / unit) * unit)}"
            )
        if value > most * unit:
            raise BadInputError(
                f"video.{name} = {value} is more than the positions of {config.model.id} cover. "
                f"At most: -s video.{name}={most * unit}"
            )
    if not sizes.temporal and video.frames > 1:
        raise BadInputError(f"video.frames = {video.frames}: {config.model.id} makes images. Set -s video.frames=1")
    if (video.frames - 1) % (every * sizes.vae_group) or frames % sizes.patch[0]:
        unit = every * sizes.vae_group * sizes.patch[0]
        least = every * (sizes.patch[0] - 1) + 1
        nearest = least + max(0, round((video.frames - least) / unit)) * unit
        raise BadInputError(
            f"video.frames = {video.frames} is not {unit}n + {least}, which {config.model.id} makes. "
            f"Nearest: -s video.frames={nearest}"
        )
    if frames > most * sizes.patch[0]:
        largest = (most * sizes.patch[0] - 1) * every + 1
        raise BadInputError(
            f"video.frames = {video.frames} is more than the positions of {config.model.id} cover. "
            f"At most: -s video.frames={largest}"
        )
    return sizes.channels, frames, video.height // sizes.spatial, video.width // sizes.spatial


def require_room(config: Config, generator: GeneratorConfig, clips: Mapping[str, int], free: float, where: str) -> None:
    """Raises BadInputError if clips made at once need more than ``free`` bytes whatever is done to save memory.

    Args:
        clips: how many are made at once, by the key that sets it.
        where: what has ``free`` bytes, for the message.
    """
    for key, count in clips.items():
        for needed, what in _at_once(config, generator, count):
            if needed > free:
                raise BadInputError(
                    f"{count} clip{'s' if count > 1 else ''} of {config.video.width} x {config.video.height}, "
                    f"{config.video.frames} frames, at once ({key}): {what} alone would take {needed / GIB:,.1f} GiB, "
                    f"and {where} {free / GIB:,.1f} GiB. Lower {key}, video.width, video.height or video.frames."
                )


def free_bytes(device: torch.device) -> tuple[float, str]:
    """What ``require_room`` may fill on a device, and its name in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory, "the card has"
    free = available_host_bytes()
    return (math.inf if free is None else free), "the host's free memory is"


def _at_once(config: Config, generator: GeneratorConfig, clips: int) -> list[tuple[float, str]]:
    """Lower bounds in bytes, each with what takes them."""
    sizes, video = sizes_of(generator), config.video
    tokens = sizes.tokens(latent_shape(config, sizes)[1:])
    bytes_of = {"fp32": 4, "bf16": 2, "fp16": 2}
    attention = 4 * tokens * sizes.width * bytes_of[config.dtype]  # input, query, key and value of one block
    channels = sizes.vae_widths[0]
    pixels = video.width * video.height // sizes.vae_patch**2
    chunk = sizes.temporal * sizes.vae_group if video.frames > 1 else 1
    convolution = (
        2 * chunk * channels * pixels * bytes_of[config.memory.vae_dtype]
    )  # one convolution's input and output
    return [(clips * attention, "attention"), (clips * convolution, "the VAE")]
