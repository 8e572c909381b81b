"""A Wan block whose token-by-token work is done in slices of tokens.

All of a block but the attention among its tokens works on each token by itself: norms, modulation, projections, rotary embedding, the attention
to the text, the feed-forward, gates. Diffusers computes each of these over the whole sequence, with fp32 copies of it on the way. Here they are
two functions, before and after the self-attention, computed and recomputed in slices: of the whole sequence only the block's input, q, k, v and
the attention's output are alive. Same operations as ``WanTransformerBlock.forward`` and ``WanAttnProcessor`` of diffusers 0.42, in their order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_drf.errors import BadInputError
from lowmem_drf.memory.activations import in_slices


class SlicedForward:
    """The ``forward`` of one block (T2V: no image tokens), in ``count`` slices of tokens."""

    def __init__(self, block: Any, count: int) -> None:
        if block.attn2.add_k_proj is not None:
            raise BadInputError("the transformer is an image-to-video one, whose blocks cannot be computed in slices of tokens")
        self._block, self._count = block, count

    def __call__(self, hidden_BLD: Tensor, text_BLD: Tensor, time_B6D: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        return self._forward(hidden_BLD, text_BLD, time_B6D, rotary, unread=False)

    def unread(self, hidden_BLD: Tensor, text_BLD: Tensor, time_B6D: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """For a recompute: keeps what ``__call__`` keeps, and leaves out what comes after the self-attention, which keeps only its inputs."""
        return self._forward(hidden_BLD, text_BLD, time_B6D, rotary, unread=True)

    def _forward(self, hidden_BLD: Tensor, text_BLD: Tensor, time_B6D: Tensor, rotary: tuple[Tensor, Tensor], unread: bool) -> Tensor:
        block = self._block
        attn1, attn2 = block.attn1, block.attn2
        modulation_B6D = block.scale_shift_table + time_B6D.float()
        before = _trainable(attn1.to_q, attn1.to_k, attn1.to_v)
        q, k, v = in_slices(self._before, self._count, [hidden_BLD, *rotary], [modulation_B6D], before)
        attended_BLHd = _attend(attn1, q, k, v)
        del q, k, v
        text_k = attn2.norm_k(attn2.to_k(text_BLD)).unflatten(2, (attn2.heads, -1))
        text_v = attn2.to_v(text_BLD).unflatten(2, (attn2.heads, -1))
        after = _trainable(attn1.to_out, attn2.to_q, attn2.to_out, block.ffn)
        (out_BLD,) = in_slices(self._after, self._count, [hidden_BLD, attended_BLHd], [modulation_B6D, text_k, text_v], after, unread)
        return out_BLD

    def _before(self, hidden: Tensor, cos: Tensor, sin: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attn = self._block.attn1
        shift, scale = modulation.chunk(6, dim=1)[:2]
        x = (self._block.norm1(hidden.float()) * (1 + scale) + shift).type_as(hidden)
        q, k, v = (y.unflatten(2, (attn.heads, -1)) for y in (attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(x)), attn.to_v(x)))
        return _rotate(q, cos, sin), _rotate(k, cos, sin), v

    def _after(self, hidden: Tensor, attended: Tensor, modulation: Tensor, text_k: Tensor, text_v: Tensor) -> tuple[Tensor]:
        block, attn = self._block, self._block.attn2
        gate, ff_shift, ff_scale, ff_gate = modulation.chunk(6, dim=1)[2:]
        hidden = (hidden.float() + _out(block.attn1, attended) * gate).type_as(hidden)
        q = attn.norm_q(attn.to_q(block.norm2(hidden.float()).type_as(hidden))).unflatten(2, (attn.heads, -1))
        hidden = hidden + _out(attn, _attend(attn, q, text_k, text_v))
        x = (block.norm3(hidden.float()) * (1 + ff_scale) + ff_shift).type_as(hidden)
        return ((hidden.float() + block.ffn(x).float() * ff_gate).type_as(hidden),)


def _attend(attn: Any, q_BLHd: Tensor, k_BLHd: Tensor, v_BLHd: Tensor) -> Tensor:
    """By the back end that was set on the transformer."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    processor = attn.processor
    return dispatch_attention_fn(q_BLHd, k_BLHd, v_BLHd, backend=processor._attention_backend, parallel_config=processor._parallel_config)


def _out(attn: Any, attended_BLHd: Tensor) -> Tensor:
    """The projection after the attention. What follows it in diffusers is a dropout of 0."""
    return attn.to_out[0](attended_BLHd.flatten(2, 3))


def _rotate(x_BLHd: Tensor, cos_1L1d: Tensor, sin_1L1d: Tensor) -> Tensor:
    """Rotary embedding on pairs of neighbours, in the embedding's dtype. Leaves in the dtype of ``x``."""
    x_1, x_2 = x_BLHd.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_1L1d[..., 0::2], sin_1L1d[..., 1::2]
    out = torch.empty_like(x_BLHd)
    out[..., 0::2] = x_1 * cos - x_2 * sin
    out[..., 1::2] = x_1 * sin + x_2 * cos
    return out


def _trainable(*modules: nn.Module) -> Iterator[Tensor]:
    return (parameter for module in modules for parameter in module.parameters() if parameter.requires_grad)
