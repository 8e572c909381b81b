"""Faster forms of two parts of Qwen's vision tower, with the same mathematics.

transformers calls the attention kernel once per frame and window (over 160 calls per layer for 32 short clips); here
windows of one length share a call. The patch embedding is a Conv3d with stride equal to its kernel, so it is a matrix
product; as one, its backward is several times faster on a CPU.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from functools import lru_cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from lowmem_drf.models.qwen_vl.attention import RangedAttention
from lowmem_drf.ops import window_ranges

_bounds: MutableMapping[Tensor, tuple[int, ...]] = WeakIdKeyDictionary()
_ranges: MutableMapping[Tensor, Tensor] = WeakIdKeyDictionary()
"""Of the cumulative lengths that all layers of a pass share: to read them, or to send a table, waits for the card."""


def speed_up_vision(visual: Any, attention: RangedAttention | None = None) -> None:
    """Replaces ``forward`` of the patch embedding and of every attention. Outputs agree up to rounding. ``attention``:
    a kernel that computes all windows of a layer in one call, in place."""
    visual.patch_embed.forward = MethodType(_linear_patch_embed, visual.patch_embed)
    for block in visual.blocks:
        block.attn.ranged_attention = attention
        block.attn.forward = MethodType(_batched_attention, block.attn)


def forget_windows() -> None:
    """Frees the tables of windows that are kept between passes."""
    _windows.cache_clear()


def _linear_patch_embed(self: Any, hidden_states: Tensor) -> Tensor:
    """``forward`` of ``Qwen2_5_VisionPatchEmbed`` and ``Qwen3VLVisionPatchEmbed``: (S, C * t * p * p) -> (S, D)."""
    weight = self.proj.weight.flatten(1)
    return F.linear(hidden_states.to(weight.dtype), weight, self.proj.bias)


def _batched_attention(
    self: Any, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any
) -> Tensor:
    """``forward`` of ``Qwen2_5_VLVisionAttention`` and ``Qwen3VLVisionAttention`` (transformers 5.23): hidden_states
    (S, D), windows by their cumulative lengths."""
    rows = hidden_states.shape[0]
    query, key, value = self.qkv(hidden_states).view(rows, 3, self.num_heads, -1).unbind(1)
    query, key = (_rotate(x, *position_embeddings) for x in (query, key))
    if self.ranged_attention is not None:
        if cu_seqlens not in _ranges:
            _ranges[cu_seqlens] = window_ranges(_read(cu_seqlens)).to(hidden_states.device)
        output = self.ranged_attention(query[None], key[None], value[None], self.scaling, _ranges[cu_seqlens])
        return self.proj(output.reshape(rows, -1))
    groups, back = _windows(_read(cu_seqlens))
    outputs = []
    for length, index in groups:
        q, k, v = (_take(x, index).unflatten(0, (-1, length)).transpose(1, 2) for x in (query, key, value))
        outputs.append(F.scaled_dot_product_attention(q, k, v, scale=self.scaling).transpose(1, 2).flatten(0, 1))
    joined = outputs[0] if back is None else torch.cat(outputs)[back.to(hidden_states.device)]
    return self.proj(joined.reshape(rows, -1))


def _read(cu_seqlens: Tensor) -> tuple[int, ...]:
    if cu_seqlens not in _bounds:
        _bounds[cu_seqlens] = tuple(cu_seqlens.tolist())
    return _bounds[cu_seqlens]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``apply_rotary_pos_emb_vision`` of one tensor (S, heads, d), in fp32, or in fp64 for an fp64 model."""
    high = x.to(torch.promote_types(x.dtype, torch.float32))
    first, second = high.chunk(2, dim=-1)
    rotated = high * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
    return rotated.to(x.dtype)


def _take(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x[index.to(x.device)]


@lru_cache(maxsize=64)
def _windows(cu_seqlens: tuple[int, ...]) -> tuple[list[tuple[int, Tensor | None]], Tensor | None]:
    """(length, rows of all windows of that length) for each length, and the permutation that restores the order of
    rows; ``None`` for rows that are already in order."""
    lengths = [end - start for start, end in zip(cu_seqlens, cu_seqlens[1:], strict=False)]
    if len(set(lengths)) == 1:
        return [(lengths[0], None)], None
    starts = torch.tensor(cu_seqlens[:-1])
    groups: list[tuple[int, Tensor | None]] = []
    for length in sorted(set(lengths)):
        chosen = starts[torch.tensor(lengths) == length]
        groups.append((length, (chosen[:, None] + torch.arange(length)).flatten()))
    rows = torch.cat([index for _, index in groups if index is not None])
    return groups, rows.argsort()
