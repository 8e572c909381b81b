"""Generators with random weights at true size: for benchmarks without a download of 28 GB.

Models are laid out on ``meta`` and filled module by module on the device, in the dtypes of the loaded weights: as in
diffusers, norms, the time embedding and the adaptive norms' tables of a 16-bit transformer stay in fp32;
``model.quant`` packs its blocks' linear layers one by one. Such a model makes noise, in the time and memory of the real
one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from lowmem_drf.models.wan.names import in_transformer
from lowmem_drf.models.weights.filling import fill_as_loaded, random_values
from lowmem_drf.models.weights.quant import Quant, check_quantised, lay_out, require_library

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan, WanTransformer3DModel


def random_transformer(
    config: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    layers: int | None = None,
    quant: Quant = "none",
    home: str | torch.device | None = None,
    taken: Callable[[torch.nn.Parameter], None] | None = None,
) -> WanTransformer3DModel:
    """A frozen transformer of this ``config.json``. Its weights depend on seed, device and dtype, not on ``quant``.

    Args:
        device: where they are drawn and packed.
        layers: at most this many blocks, at full width.
        quant: as in ``load_denoiser``.
        home: where they stay. Default: ``device``.
        taken: as in ``fill``.

    Raises:
        BadInputError: bitsandbytes is missing.
    """
    return fill_as_loaded(
        empty_transformer(config, layers, quant), dtype, random_values(device, seed), home or device, taken
    )


def random_vae(
    config: Mapping[str, Any], dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", seed: int = 0
) -> AutoencoderKLWan:
    """A frozen VAE of this ``config.json``."""
    return fill_as_loaded(empty_vae(config), dtype, random_values(device, seed), device)


def empty_transformer(config: Mapping[str, Any], layers: int | None = None, quant: Quant = "none") -> Any:
    """The transformer on ``meta``, except its rotary tables, which no checkpoint holds: on the CPU, fp32 or fp64.
    Raises BadInputError if bitsandbytes is missing."""
    from diffusers import WanTransformer3DModel

    require_library(quant, "model.quant", ("none", "nf4", "int8"))
    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(_with_layers(config, layers))
    rope: Any = model.rope
    model.rope = type(rope)(rope.attention_head_dim, rope.patch_size, rope.max_seq_len)
    lay_out(model, quant, in_transformer)
    check_quantised(model, quant, in_transformer, "transformer")
    return model


def empty_vae(config: Mapping[str, Any]) -> Any:
    """The VAE on ``meta``."""
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        return AutoencoderKLWan.from_config(dict(config))


def empty_text(config: Mapping[str, Any], layers: int | None = None) -> Any:
    """The text encoder on ``meta``."""
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.device("meta"):
        return UMT5EncoderModel(UMT5Config.from_dict(_with_layers(config, layers)))


def _with_layers(config: Mapping[str, Any], most: int | None) -> dict[str, Any]:
    return {**config, **({} if most is None else {"num_layers": min(most, config["num_layers"])})}
