"""A Wan block's ``forward``, taken apart: its token-by-token work as functions that may be fused kernels and may run in
slices, its attentions as calls whose results may be kept.

All of a block but the attention among its tokens works on each token by itself: norms, modulation, projections, rotary
embedding, the attention to the text, the feed-forward, gates. Diffusers computes each of these over the whole sequence,
with fp32 copies of it on the way. Here they are two functions, before and after the self-attention. In slices of tokens
each is computed and recomputed slice by slice: of the whole sequence only the block's input, q, k, v and the
attention's output are alive.

Same operations as ``WanTransformerBlock.forward`` and ``WanAttnProcessor`` of diffusers 0.42, in their order.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowmem_drf.errors import BadInputError
from lowmem_drf.memory.activations import in_slices
from lowmem_drf.memory.streaming import Resident
from lowmem_drf.models.lora.linear import APPROXIMATE, linear

if TYPE_CHECKING:
    from lowmem_drf.memory.kept_attention import KeptAttention
    from lowmem_drf.memory.streaming import Layer
    from lowmem_drf.ops import Attention, RowOps


class BlockForward:
    """The ``forward`` of one block (T2V: no image tokens).

    Args: count: slices of tokens. 1: the whole sequence, recomputed by nobody but a checkpoint around the block.
        rollout_attention: among the tokens, where there is no gradient and nothing is recorded. ``None``:
        ``attention``. weights: the block's, where they are streamed.

    Raises:
        BadInputError: an image-to-video block.
    """

    def __init__(
        self,
        block: Any,
        rows: RowOps,
        attention: Attention,
        count: int = 1,
        rollout_attention: Any = None,
        weights: Layer | Resident | None = None,
    ) -> None:
        if block.attn2.add_k_proj is not None:
            raise BadInputError(
                "the transformer is an image-to-video one: its blocks attend to an image besides. Take a text-to-video model."
            )
        self._block, self._rows, self._attention, self._count = block, rows, attention, count
        self._rollout_attention = rollout_attention
        self._weights = weights or Resident()

    def __call__(
        self,
        hidden_BLD: Tensor,
        text_BLD: Tensor,
        time_B6D: Tensor,
        rotary: tuple[Tensor, Tensor],
        kept_attention: KeptAttention | None = None,
        recorded: bool = False,
    ) -> Tensor:
        exact = recorded or self._rollout_attention is None or torch.is_grad_enabled()
        return self._forward(hidden_BLD, text_BLD, time_B6D, rotary, kept_attention, unread=False, exact=exact)

    def unread(
        self,
        hidden_BLD: Tensor,
        text_BLD: Tensor,
        time_B6D: Tensor,
        rotary: tuple[Tensor, Tensor],
        kept_attention: KeptAttention | None = None,
    ) -> Tensor:
        """For a recompute: keeps what ``__call__`` keeps, and, in slices, leaves out what comes after the
        self-attention, which keeps only its inputs."""
        return self._forward(hidden_BLD, text_BLD, time_B6D, rotary, kept_attention, unread=True, exact=True)

    def _forward(
        self,
        hidden_BLD: Tensor,
        text_BLD: Tensor,
        time_B6D: Tensor,
        rotary: tuple[Tensor, Tensor],
        kept_attention: KeptAttention | None,
        unread: bool,
        exact: bool,
    ) -> Tensor:
        block = self._block
        attn1, attn2 = block.attn1, block.attn2
        modulation_B6D = block.scale_shift_table + time_B6D.float()
        before = (
            partial(in_slices, count=self._count, parameters=_trainable(attn1.to_q, attn1.to_k, attn1.to_v))
            if self._count > 1
            else _whole
        )
        # in slices these are called again in the backward, when the block's weights may have left it: they are handed
        # them
        weights = self._weights if self._count > 1 else Resident()
        q, k, v = before(
            weights.bound(self._before), sliced=[hidden_BLD, *rotary], shared=[modulation_B6D, *weights.tensors()]
        )
        attended_BLHd = self._attend(q, k, v, kept_attention) if exact else self._rollout_attention(q, k, v)
        del q, k, v
        text_k = self._rows.rms_norm(attn2.to_k(text_BLD), attn2.norm_k.weight, attn2.norm_k.eps).unflatten(
            2, (attn2.heads, -1)
        )
        text_v = attn2.to_v(text_BLD).unflatten(2, (attn2.heads, -1))
        parameters = _trainable(attn1.to_out, attn2.to_q, attn2.to_out, block.ffn)
        after = (
            partial(in_slices, count=self._count, parameters=parameters, unread=unread) if self._count > 1 else _whole
        )
        shared = [modulation_B6D, text_k, text_v, *weights.tensors()]
        (out_BLD,) = after(
            weights.bound(partial(self._after, kept_attention)), sliced=[hidden_BLD, attended_BLHd], shared=shared
        )
        return out_BLD

    def _before(self, hidden: Tensor, cos: Tensor, sin: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        block, attn = self._block, self._block.attn1
        shift, scale = modulation.chunk(6, dim=1)[:2]
        x = self._rows.norm_modulate(hidden, scale, shift, block.norm1.eps)
        q, k = self._linear(attn.to_q, x), self._linear(attn.to_k, x)
        q, k = self._rows.rope_qk(q, k, attn.norm_q.weight, attn.norm_k.weight, cos, sin, attn.heads, attn.norm_q.eps)
        return q, k, self._linear(attn.to_v, x).unflatten(2, (attn.heads, -1))

    def _after(
        self,
        kept_attention: KeptAttention | None,
        hidden: Tensor,
        attended: Tensor,
        modulation: Tensor,
        text_k: Tensor,
        text_v: Tensor,
    ) -> tuple[Tensor]:
        block, attn, rows = self._block, self._block.attn2, self._rows
        gate, ff_shift, ff_scale, ff_gate = modulation.chunk(6, dim=1)[2:]
        hidden = rows.gate_residual(hidden, self._out(block.attn1, attended), gate)
        x = (
            rows.layer_norm(hidden, block.norm2.weight, block.norm2.bias, block.norm2.eps)
            if isinstance(block.norm2, nn.LayerNorm)
            else hidden
        )
        q = rows.rms_norm(self._linear(attn.to_q, x), attn.norm_q.weight, attn.norm_q.eps).unflatten(
            2, (attn.heads, -1)
        )
        hidden = hidden + self._out(attn, self._attend(q, text_k, text_v, kept_attention))
        x = rows.norm_modulate(hidden, ff_scale, ff_shift, block.norm3.eps)
        return (rows.gate_residual(hidden, self._feed_forward(x), ff_gate),)

    def _linear(self, layer: nn.Module, x: Tensor) -> Tensor:
        return linear(layer, x) if self._rows.lean_linears else layer(x)

    def _out(self, attn: Any, attended_BLHd: Tensor) -> Tensor:
        """The projection after the attention. What follows it in diffusers is a dropout of 0."""
        return self._linear(attn.to_out[0], attended_BLHd.flatten(2, 3))

    def _feed_forward(self, x: Tensor) -> Tensor:
        ffn = self._block.ffn
        if not self._rows.lean_linears or getattr(ffn.net[0], "approximate", None) != APPROXIMATE:
            result: Tensor = ffn(x)
            return result
        return linear(ffn.net[2], linear(ffn.net[0].proj, x), gelu=True)  # between them diffusers has a dropout of 0

    def _attend(self, q_BLHd: Tensor, k_BLHd: Tensor, v_BLHd: Tensor, kept_attention: KeptAttention | None) -> Tensor:
        return (
            self._attention.call(q_BLHd, k_BLHd, v_BLHd)
            if kept_attention is None
            else self._attention.keep_attention(q_BLHd, k_BLHd, v_BLHd, kept_attention)
        )


def _whole(function: Any, sliced: list[Tensor], shared: list[Tensor]) -> tuple[Tensor, ...]:
    result: tuple[Tensor, ...] = function(*sliced, *shared)
    return result


def _trainable(*modules: nn.Module) -> Iterator[Tensor]:
    return (parameter for module in modules for parameter in module.parameters() if parameter.requires_grad)
