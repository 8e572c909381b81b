"""Models of true size without values, for the plan: every parameter a fake CPU tensor (``torch._subclasses.FakeTensorMode``).

Such a model takes no memory, and runs forward and backward under its mode, where a dispatch mode can count the bytes that the real one would
hold. It takes integers (token ids, grids, positions) as real tensors: they decide about shapes. Buffers (rotary tables) are real too; they are
small.

4-bit weights: bitsandbytes cannot make its ``Params4bit`` under the mode, so ``Linear4bit`` here stands for its: the same bytes at rest, and
the same temporaries as its CUDA kernels have from 1537 rows on (bitsandbytes 0.50: below, some shapes need none).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from lowmem_drf.models.critic import DEFAULT_FPS, QwenCritic
from lowmem_drf.models.critic_files import video_geometry
from lowmem_drf.models.filling import Value, fill
from lowmem_drf.models.lora import ADAPTER, lora_layers
from lowmem_drf.models.quant import QUANTISED, Quant, require_library
from lowmem_drf.models.random_critic import described, empty_model, remake_rotary
from lowmem_drf.models.random_generator import empty_text, empty_transformer, empty_vae, fill_as_loaded
from lowmem_drf.models.sources import resolve

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5EncoderModel

BLOCK = 64
"""Weights that share a scale in NF4."""
NESTED_BLOCK = 256
"""Scales that share a scale of their own (double quantisation)."""


def fake_transformer(config: Mapping[str, Any], dtype: torch.dtype, mode: FakeTensorMode) -> WanTransformer3DModel:
    """The transformer of this ``config.json``, as ``load_denoiser`` would leave it; all modes may be active or none."""
    with _disable_current_modes():
        return fill_as_loaded(empty_transformer(config), dtype, _fake_values(mode))


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


def fake_critic(name_or_folder: str, dtype: torch.dtype, fps: float | None, quant: Quant, mode: FakeTensorMode) -> QwenCritic:
    """As ``load_critic`` would leave it.

    Args:
        name_or_folder: ``toyworld``, a model's folder, or a hub id of ``known_critics``, whose tokenizer is a stand-in: questions get about
            four times their tokens.

    Raises:
        BadInputError: neither of these, or bitsandbytes is missing.
    """
    require_library(quant)
    with _disable_current_modes():
        config, settings, tokenizer = described(resolve(name_or_folder, "critic"))
        model = empty_model(config)
        remake_rotary(model)
        fill(model, _fake_values(mode)(dtype))
        if quant == "nf4":
            for name, module in list(model.named_modules()):
                if isinstance(module, nn.Linear) and name.startswith(QUANTISED):
                    model.set_submodule(name, Linear4bit(module, dtype, mode))
        return QwenCritic(model.eval().requires_grad_(False), tokenizer, video_geometry(settings), fps=fps or float(settings.get("fps") or DEFAULT_FPS))


def _fake_values(mode: FakeTensorMode) -> Callable[[torch.dtype], Value]:
    def value_of(dtype: torch.dtype) -> Value:
        def value(name: str, shape: Sequence[int]) -> Tensor:
            with mode:
                return torch.empty(shape, dtype=dtype)

        return value

    return value_of


class Linear4bit(nn.Module):
    """A linear whose weight (out, in) is NF4 with double quantisation, without values: packed weights, their scales in 8 bit, and the scales'
    own, as ``bitsandbytes.functional.QuantState`` holds them."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, mode: FakeTensorMode) -> None:
        super().__init__()
        self.in_features, self.out_features, self.compute_dtype = linear.in_features, linear.out_features, dtype
        count = self.in_features * self.out_features
        scales = -(-count // BLOCK)
        with mode:
            self.weight = nn.Parameter(torch.empty((count + 1) // 2, 1, dtype=torch.uint8), requires_grad=False)
            self.register_buffer("absmax", torch.empty(scales, dtype=torch.uint8))
            self.register_buffer("nested_absmax", torch.empty(-(-scales // NESTED_BLOCK)))
            self.register_buffer("nested_code", torch.empty(256))
            self.register_buffer("offset", torch.empty(()))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Dequantised.apply(x.to(self.compute_dtype), self, self.bias)
        return y.to(x.dtype)

    def dequantised(self) -> Tensor:
        """The weight in the dtype it computes in, by bitsandbytes' own two steps."""
        ops = torch.ops.bitsandbytes
        scales = ops.dequantize_blockwise(self.absmax, self.nested_absmax, self.nested_code, NESTED_BLOCK, torch.float32) + self.offset
        weight: Tensor = ops.dequantize_4bit(self.weight, scales, BLOCK, "nf4", (self.out_features, self.in_features), self.compute_dtype)
        return weight


class _Dequantised(torch.autograd.Function):
    """As ``MatMul4Bit`` of bitsandbytes: the weight is dequantised in the forward and again in the backward, and no activation is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Linear4bit, bias: Tensor | None) -> Tensor:
        ctx.linear = linear
        return nn.functional.linear(x, linear.dequantised(), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        return torch.matmul(gradient, ctx.linear.dequantised()), None, None
