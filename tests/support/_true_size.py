"""The Wan transformer at its true size on fake tensors: bytes without weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lowmem_drf.models.lora.adapter import add_lora, lora_parameters
from lowmem_drf.models.wan.denoiser import as_velocity
from lowmem_drf.planner.ledger import Ledger

TOKENS, WIDTH = 32_760, 1536
HIDDEN = TOKENS * WIDTH * 2
"""Bytes of what enters a block of Wan2.1-1.3B at 832x480, 81 frames, in bf16."""


def wan_1_3b(mode: FakeTensorMode, layers: int = 2) -> Any:
    """Wan2.1-T2V-1.3B with fewer layers and a LoRA of rank 32: bf16, but for what diffusers keeps in fp32."""
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_attention_heads=12, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=4096,
            freq_dim=256, ffn_dim=8960, num_layers=layers, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
            eps=1e-6, patch_size=(1, 2, 2),
        )  # fmt: skip
        for name, parameter in model.named_parameters():
            if not set(name.split(".")) & set(model._keep_in_fp32_modules):
                parameter.data = parameter.data.to(torch.bfloat16)
        model.eval().requires_grad_(False)
        add_lora(model, rank=32, alpha=32.0)
    with mode:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    module._parameters[name] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return model


@dataclass(frozen=True)
class Bytes:
    """Of one forward and backward, the transformer's weights not counted."""

    kept: int
    """On the card between the two."""
    waiting: int
    """On the host between the two."""
    peak: int
    """On the card, in the backward."""
    flops: int


def graded_step(model: Any) -> Bytes:
    """One forward and backward at 832x480, 81 frames."""
    with Ledger() as ledger:
        ledger.adopt([*model.parameters(), *model.buffers()])
        weights = ledger.card_bytes
        x, text = torch.empty(1, 16, 21, 60, 104, requires_grad=True), torch.empty(1, 512, 4096)
        out = as_velocity(model)(x, 0.5, text)
        kept, waiting = ledger.card_bytes - weights, ledger.host_bytes
        ledger.reset_peak()
        out.backward(torch.empty_like(out), inputs=[*lora_parameters(model), x])
    return Bytes(kept, waiting, ledger.peak_card_bytes - weights, ledger.flops)
