"""The critic's attentions on a kernel that is told, row by row, which keys a query sees: no mask of tokens x tokens, no
work on what is masked.

The questions' mask travels as ranges: int32 (B or 1, 1, L, 3), in the place of transformers' 4-D mask, which hands it
on untouched. A row (prefix, start, stop) sees the keys [0, prefix) and [start, stop).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

NAME = "lowmem_drf_ranges"
"""Of the attention in transformers' registry."""

RangedAttention = Callable[[Tensor, Tensor, Tensor, float, Tensor], Tensor]
"""(q (B, L, H, d), k and v (B, L, G, d), scale, ranges (B or 1, L, 3)) -> (B, L, H, d). Differentiable."""


def use_ranges(model: Any, attention: RangedAttention | None) -> None:
    """The language model of a Qwen VLM reads ranges in place of a mask. ``None``: it reads masks, through PyTorch's
    SDPA, again."""
    from transformers import AttentionInterface

    language = model.model.language_model
    if attention is None:
        if language.config._attn_implementation == NAME:
            language.config._attn_implementation = "sdpa"
        return
    AttentionInterface.register(NAME, _attend)
    language.config._attn_implementation = NAME
    for layer in language.layers:
        layer.self_attn.ranged_attention = attention


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """As transformers' attention functions: (B, H, L, d) -> (B, L, H, d). Without ranges (``generate``) it is
    theirs."""
    if attention_mask is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, **arguments)
    return module.ranged_attention(
        *(x.transpose(1, 2) for x in (query, key, value)), scaling, attention_mask[:, 0]
    ), None
