"""Chooses the implementation of each operation once, at the start of a run."""

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
    """The chosen implementations."""

    rows: RowOps
    attention: Attention
    why: str
    """Reason for the attention, printed."""
    rollout_attention: Callable[[Tensor, Tensor, Tensor], Tensor] | None
    """Attention without gradients; ``None``: ``attention``."""

    def __str__(self) -> str:
        rollout = "; int8 attention without gradient" if self.rollout_attention else ""
        return f"kernels: {self.rows.name}; attention: {self.attention.name} ({self.why}){rollout}"


def choose(config: Config, device: torch.device, shape: Sequence[int], dtype: torch.dtype) -> Chosen:
    """For a run on ``device``; ``shape``: (B, L, H, d) of the transformer's self-attention.

    Raises BadInputError: a requested implementation cannot run here.
    """
    kernels, keep = config.kernels, config.memory.keep_attention != "none"
    rows = choose_rows(kernels.ops, device)
    attention, why = choose_attention(kernels.attention, device, shape, dtype, keep_attention=keep)
    return Chosen(rows, attention, why, int8_attention(device) if kernels.rollout_attention == "int8" else None)


def choose_planned(config: Config) -> Chosen:
    """For a plan, which computes nothing: ``auto`` means a CUDA card with Triton, whatever this machine has. All
    attentions need the same bytes (output, log-sum-exp, gradients), so two stand for all."""
    kernels = config.kernels
    rows: RowChoice = "fused" if kernels.ops == "auto" else kernels.ops
    attention = attention_named("triton" if kernels.attention == "triton" else "sdpa")
    rollout = int8_attention(None) if kernels.rollout_attention == "int8" else None
    return Chosen(fused_ops() if rows == "fused" else naive_ops(), attention, "planned", rollout)
