"""Critics with random weights at true size, to benchmark memory and time without downloading 16 GB.

The model is built on ``meta`` and filled module by module on the device in its final dtype, and each linear layer is
quantised before the next is drawn, so the host never holds the model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lowmem_drf.errors import BadInputError
from lowmem_drf.models.qwen_vl.critic import DEFAULT_FPS, VLMCritic
from lowmem_drf.models.qwen_vl.families import family_of
from lowmem_drf.models.qwen_vl.files import load_tokenizer, video_geometry, video_settings
from lowmem_drf.models.qwen_vl.known import KNOWN
from lowmem_drf.models.qwen_vl.random_tokenizer import byte_tokenizer
from lowmem_drf.models.weights.filling import fill, random_value
from lowmem_drf.models.weights.quant import Quant, check_quantised, in_critic, lay_out, require_library
from lowmem_drf.models.weights.sources import loading


def random_critic(
    name_or_folder: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    fps: float | None = None,
    quant: Quant = "none",
    seed: int = 0,
    layers: int | None = None,
) -> VLMCritic:
    """A frozen critic with random weights, which depend on seed, device and dtype alone, not on ``quant``.

    Args:
        name_or_folder: a hub id in ``KNOWN`` (with ``byte_tokenizer``; nothing is downloaded), or a model's folder, of
            which all but the weights is used.
        layers: at most this many layers of the language model and blocks of the vision tower, at full width.

    Raises BadInputError: neither a known id nor a usable folder, or no bitsandbytes.
    """
    require_library(quant)
    config, settings, tokenizer = described(name_or_folder)
    model = random_model(config, dtype, device, quant, seed, layers)
    return VLMCritic(model, tokenizer, video_geometry(settings), fps=fps or float(settings.get("fps") or DEFAULT_FPS))


def described(name_or_folder: str) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """(config.json, video preprocessor settings, tokenizer) of a critic. Raises BadInputError."""
    if name_or_folder in KNOWN:
        known = KNOWN[name_or_folder]
        return known.config, known.settings, byte_tokenizer(known.config)
    if not Path(name_or_folder).is_dir():
        raise BadInputError(
            f"No configuration of {name_or_folder!r} is known. Give a model's folder, or one of: {', '.join(KNOWN)}."
        )
    from transformers import AutoConfig

    with loading("the critic", name_or_folder):
        config = AutoConfig.from_pretrained(name_or_folder).to_dict()
        family_of(config["model_type"])
        return config, video_settings(name_or_folder), load_tokenizer(name_or_folder)


def random_model(
    config: Mapping[str, Any],
    dtype: torch.dtype,
    device: str | torch.device,
    quant: Quant,
    seed: int,
    layers: int | None = None,
) -> Any:
    """The family's class in transformers, filled at random, frozen, in eval mode. ``config``: config.json."""
    model = empty_model(config, layers)
    remake_rotary(model, device)
    lay_out(model, quant, in_critic)
    value = random_value(dtype, torch.device(device), torch.Generator(device).manual_seed(seed))
    tied = model.config.tie_word_embeddings
    for module in model.modules():
        if not (tied and module is model.lm_head):
            fill(module, value, recurse=False)
    if tied:
        model.tie_weights()
    check_quantised(model, quant, in_critic)
    return model.eval().requires_grad_(False)


def empty_model(config: Mapping[str, Any], layers: int | None = None) -> Any:
    """The model on ``meta``."""
    settings = copy.deepcopy(dict(config))
    cls = family_of(settings.pop("model_type")).model_class()
    if layers is not None:
        _shorten(settings, layers)
    with torch.device("meta"):
        return cls(cls.config_class(**settings))


def remake_rotary(model: Any, device: str | torch.device = "cpu") -> None:
    """Rebuilds rotary embeddings that are on ``meta`` on the device: checkpoints do not hold their buffers."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            cls: Any = type(module)
            model.set_submodule(name, cls(module.config).to(device))


def _shorten(settings: dict[str, Any], layers: int) -> None:
    text, vision = settings["text_config"], settings["vision_config"]
    text["num_hidden_layers"] = min(layers, text["num_hidden_layers"])
    text.pop("layer_types", None)
    key = "depth" if "depth" in vision else "num_hidden_layers"
    vision[key] = depth = min(layers, vision[key])
    for key in ("fullatt_block_indexes", "deepstack_visual_indexes"):
        if key in vision:
            vision[key] = [index for index in vision[key] if index < depth]
