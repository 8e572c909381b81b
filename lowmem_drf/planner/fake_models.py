"""Models of true size without values, for the plan: every parameter is a fake CPU tensor
(``torch._subclasses.FakeTensorMode``).

Such a model takes no memory. Forward and backward run under its mode, where a dispatch mode can count the bytes that
the real model would allocate. Integers (token ids, grids, positions) are passed as real tensors, because shapes depend
on their values. Buffers (rotary tables) are real too; they are small. Weights in 4 and 8 bit are packed under the mode
by the operators that pack real ones (``packed``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from lowmem_drf.models.lora.adapter import ADAPTER, lora_layers
from lowmem_drf.models.qwen_vl.critic import DEFAULT_FPS, QwenCritic
from lowmem_drf.models.qwen_vl.files import video_geometry
from lowmem_drf.models.qwen_vl.random_critic import described, empty_model, remake_rotary
from lowmem_drf.models.wan.random_generator import empty_text, empty_transformer, empty_vae, fill_as_loaded
from lowmem_drf.models.weights.filling import Value, fill
from lowmem_drf.models.weights.quant import Quant, in_critic, lay_out, require_library
from lowmem_drf.models.weights.sources import resolve

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5EncoderModel


def fake_transformer(
    config: Mapping[str, Any], dtype: torch.dtype, mode: FakeTensorMode, quant: Quant = "none"
) -> WanTransformer3DModel:
    """The transformer of this ``config.json``, as ``load_denoiser`` returns it. Callable under any dispatch mode.
    Raises BadInputError if bitsandbytes is missing."""
    with _disable_current_modes():
        return fill_as_loaded(empty_transformer(config, quant=quant), dtype, partial(_fake_value, mode))


def empty_lora(transformer: WanTransformer3DModel, mode: FakeTensorMode) -> None:
    """Makes the LoRA's tensors fake. Call it after ``add_lora``, which runs without the mode: peft needs real ones."""
    for layer in lora_layers(transformer).values():
        for matrix in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]):
            with _disable_current_modes(), mode:
                matrix.weight = nn.Parameter(torch.empty(matrix.weight.shape, dtype=matrix.weight.dtype))


def fake_vae(config: Mapping[str, Any], dtype: torch.dtype, mode: FakeTensorMode) -> AutoencoderKLWan:
    """The VAE, as ``load_vae`` returns it."""
    with _disable_current_modes():
        return fill_as_loaded(empty_vae(config), dtype, partial(_fake_value, mode))


def fake_text(config: Mapping[str, Any], dtype: torch.dtype, mode: FakeTensorMode) -> UMT5EncoderModel:
    """The encoder of ``load_text``, without the tokenizer."""
    with _disable_current_modes():
        return fill_as_loaded(empty_text(config), dtype, partial(_fake_value, mode))


def fake_critic(
    name_or_folder: str, dtype: torch.dtype, fps: float | None, quant: Quant, mode: FakeTensorMode, files: Any = None
) -> QwenCritic:
    """The critic, as ``load_critic`` returns it.

    Args:
        name_or_folder: ``toyworld``, a model's folder, or a hub id of ``known_critics``. A hub id gets a stand-in
            tokenizer, which makes about four times as many tokens.
        files: in place of ``random_critic.described`` of that name.

    Raises:
        BadInputError: none of these, or bitsandbytes is missing.
    """
    require_library(quant)
    with _disable_current_modes():
        config, settings, tokenizer = files or described(resolve(name_or_folder, "critic"))
        model = empty_model(config)
        remake_rotary(model)
        lay_out(model, quant, in_critic)
        fill(model, _fake_value(mode, dtype))
        rate = fps or float(settings.get("fps") or DEFAULT_FPS)
        return QwenCritic(model.eval().requires_grad_(False), tokenizer, video_geometry(settings), fps=rate)


def _fake_value(mode: FakeTensorMode, dtype: torch.dtype) -> Value:
    def value(name: str, shape: Sequence[int]) -> Tensor:
        with mode:
            return torch.empty(shape, dtype=dtype)

    return value
