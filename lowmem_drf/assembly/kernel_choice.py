"""Configuration -> the form of each operation that a run uses: chosen once, before anything is computed, and
printed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowmem_drf.models.wan.attention import attention_named, choose_attention
from lowmem_drf.ops import Attention, RowOps, choose_rows, fused_ops, int8_attention, naive_ops
from lowmem_drf.schema import Config

if TYPE_CHECKING:
    from lowmem_drf.ops import RowChoice


@dataclass(frozen=True)
class Chosen:
    """What a run uses, and why."""

    rows: RowOps
    attention: Attention
    why: str
    rollout_attention: Callable[[Tensor, Tensor, Tensor], Tensor] | None
    """Where there is no gradient; ``None``: ``attention``."""

    def __str__(self) -> str:
        rollout = "; int8 attention without gradient" if self.rollout_attention else ""
        return f"kernels: {self.rows.name}; attention: {self.attention.name} ({self.why}){rollout}"


def choose(config: Config, device: torch.device, shape: Sequence[int], dtype: torch.dtype) -> Chosen:
    """For a run on ``device``.

    Args:
        shape: (B, L, H, d) of the transformer's self-attention.

    Raises:
        BadInputError: what was asked for cannot run here; says why, and what to do.
    """
    kernels = config.kernels
    rows = choose_rows(kernels.ops, device)
    attention, why = choose_attention(
        kernels.attention, device, shape, dtype, keep_attention=config.memory.keep_attention != "none"
    )
    return Chosen(rows, attention, why, int8_attention(device) if kernels.rollout_attention == "int8" else None)


def choose_planned(config: Config) -> Chosen:
    """For a plan, which computes nothing: ``auto`` stands for a CUDA card with Triton, whatever is here. Of attentions
    it knows those that take the bytes of any: out, log-sum-exp, gradients."""
    kernels = config.kernels
    rows: RowChoice = "fused" if kernels.ops == "auto" else kernels.ops
    attention = attention_named("triton" if kernels.attention == "triton" else "sdpa")
    rollout = int8_attention(None) if kernels.rollout_attention == "int8" else None
    return Chosen(fused_ops() if rows == "fused" else naive_ops(), attention, "planned", rollout)
