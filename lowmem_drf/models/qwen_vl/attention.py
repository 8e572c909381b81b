"""The language model's attention through a kernel that takes key ranges instead of a mask of L x L: it neither stores
the mask nor computes masked blocks.

Ranges are int32 (B or 1, 1, L, 3): the query of row (prefix, start, stop) attends to the keys [0, prefix) and
[start, stop). They are passed as ``attention_mask``, which transformers hands to the attention function untouched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAME = "lowmem_drf_ranges"
"""Key of our function in transformers' attention registry."""

RangedAttention = Callable[[Tensor, Tensor, Tensor, float, Tensor], Tensor]
"""(q (B, L, H, d), k and v (B, L, G, d), scale, ranges (B or 1, L, 3)) -> (B, L, H, d). Differentiable."""


def use_ranges(language: Any, attention: RangedAttention | None) -> None:
    """Makes a VLM's language model take ranges instead of a mask; ``None`` restores masks and SDPA."""
    from transformers import AttentionInterface

    if attention is None:
        if language.config._attn_implementation == NAME:
            language.config._attn_implementation = "sdpa"
        return
    AttentionInterface.register(NAME, _attend)
    language.config._attn_implementation = NAME
    for layer in language.layers:
        layer.self_attn.ranged_attention = attention


def _attend(
    module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, scaling: float, **arguments: Any
) -> tuple[Tensor, None]:
    """An attention function as transformers calls it: (B, H, L, d) -> (B, L, H, d). Without ranges (``generate``) it
    is transformers' SDPA."""
    if attention_mask is None or attention_mask.dtype == torch.bool:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, q, k, v, attention_mask, scaling=scaling, **arguments)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return module.ranged_attention(q, k, v, scaling, attention_mask[:, 0]), None
