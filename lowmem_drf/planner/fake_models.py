"""Models of true size without values, for the plan: every parameter a fake CPU tensor
(``torch._subclasses.FakeTensorMode``).

Such a model takes no memory, and runs forward and backward under its mode, where a dispatch mode can count the bytes
that the real one would hold. It takes integers (token ids, grids, positions) as real tensors: they decide about shapes.
Buffers (rotary tables) are real too; they are small.

Weights in 4 and 8 bit are packed under the mode by the operators that pack real ones (``packed``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    """The transformer of this ``config.json``, as ``load_denoiser`` would leave it; all modes may be active or none.
    Raises BadInputError where bitsandbytes is missing."""
    with _disable_current_modes():
        return fill_as_loaded(empty_transformer(config, quant=quant), dtype, _fake_values(mode))


def empty_lora(transformer: WanTransformer3DModel, mode: FakeTensorMode) -> None:
    """Makes the LoRA's tensors fake, after ``add_lora`` without the mode: peft can lay it out in real ones only."""
    for layer in lora_layers(transformer).values():
        for matrix in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]):
            with _disable_current_modes(), mode:
                matrix.weight = nn.Parameter(torch.empty(matrix.weight.shape, dtype=matrix.weight.dtype))


def fake_vae(config: Mapping[str, Any], dtype: torch.dtype, mode: FakeTensorMode) -> AutoencoderKLWan:
    """As ``load_vae`` would leave it."""
    with _disable_current_modes():
        return fill_as_loaded(empty_vae(config), dtype, _fake_values(mode))


def fake_text(config: Mapping[str, Any], dtype: torch.dtype, mode: FakeTensorMode) -> UMT5EncoderModel:
    """The encoder of ``load_text``, without the tokenizer."""
    with _disable_current_modes():
        return fill_as_loaded(empty_text(config), dtype, _fake_values(mode))


def fake_critic(
    name_or_folder: str, dtype: torch.dtype, fps: float | None, quant: Quant, mode: FakeTensorMode
) -> QwenCritic:
    """As ``load_critic`` would leave it.

    Args: name_or_folder: ``toyworld``, a model's folder, or a hub id of ``known_critics``, whose tokenizer is a
        stand-in: questions get about four times their tokens.

    Raises:
        BadInputError: neither of these, or bitsandbytes is missing.
    """
    require_library(quant)
    with _disable_current_modes():
        config, settings, tokenizer = described(resolve(name_or_folder, "critic"))
        model = empty_model(config)
        remake_rotary(model)
        lay_out(model, quant, in_critic)
        fill(model, _fake_values(mode)(dtype))
        return QwenCritic(
            model.eval().requires_grad_(False),
            tokenizer,
            video_geometry(settings),
            fps=fps or float(settings.get("fps") or DEFAULT_FPS),
        )


def _fake_values(mode: FakeTensorMode) -> Callable[[torch.dtype], Value]:
    def value_of(dtype: torch.dtype) -> Value:
        def value(name: str, shape: Sequence[int]) -> Tensor:
            with mode:
                return torch.empty(shape, dtype=dtype)

        return value

    return value_of
