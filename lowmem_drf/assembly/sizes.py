"""The sizes that a configuration asks for, checked before anything of that size is made: the generator's own limits,
and what a device could not hold whatever is saved elsewhere. A size that passes may still be too large: on a card the
plan says so (``planner/report.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from lowmem_drf.errors import BadInputError
from lowmem_drf.models.generators import GeneratorConfig
from lowmem_drf.models.weights.downloads import available_host_bytes
from lowmem_drf.schema import Config
from lowmem_drf.shortage import GIB


def latent_shape(config: Config, transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """(C, F, h, w), from the ``config.json`` of both models. Raises BadInputError: the video's size does not fit
    them."""
    video, factor = config.video, vae.get("scale_factor_spatial", 8)
    frames = (video.frames - 1) // vae.get("scale_factor_temporal", 4) + 1
    patches, most = transformer["patch_size"], transformer.get("rope_max_seq_len", 1024)
    sides = ("width", video.width, factor * patches[2]), ("height", video.height, factor * patches[1])
    for name, value, unit in sides:
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
    if frames > most * patches[0]:
        largest = (most * patches[0] - 1) * vae.get("scale_factor_temporal", 4) + 1
        raise BadInputError(
            f"video.frames = {video.frames} is more than the positions of {config.model.id} cover. "
            f"At most: -s video.frames={largest}"
        )
    return transformer["in_channels"], frames, video.height // factor, video.width // factor


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
    transformer, vae, video = generator.transformer, generator.vae, config.video
    _, frames, height, width = latent_shape(config, transformer, vae)
    tokens = math.prod(n // patch for n, patch in zip((frames, height, width), transformer["patch_size"], strict=True))
    inner = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    bytes_of = {"fp32": 4, "bf16": 2, "fp16": 2}
    attention = 4 * tokens * inner * bytes_of[config.dtype]  # input, query, key and value of one block
    channels = vae.get("decoder_base_dim") or vae["base_dim"]
    pixels = video.width * video.height // (vae.get("patch_size") or 1) ** 2
    chunk = 4 if video.frames > 1 else 1
    convolution = (
        2 * chunk * channels * pixels * bytes_of[config.memory.vae_dtype]
    )  # one convolution's input and output
    return [(clips * attention, "attention"), (clips * convolution, "the VAE")]
