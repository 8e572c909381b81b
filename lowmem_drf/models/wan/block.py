"""The ``forward`` of a Wan block as two token-wise functions around the self-attention.

Everything in a block except the self-attention acts on each token independently: norms, modulation, projections, rotary
embedding, cross-attention to the text, feed-forward, gates. Diffusers computes each over the whole sequence, with fp32
copies. Here each operation may be a fused kernel, and the two functions may run in slices of tokens, recomputed slice
by slice: of the whole sequence only the block's input, q, k, v and the attention's output are alive. The result of
the self-attention may be kept for the recompute.

Same operations in the same order as ``WanTransformerBlock.forward`` and ``WanAttnProcessor`` of diffusers 0.42.
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
    """The ``forward`` of one text-to-video block.

    Args:
        count: slices of tokens. With 1 only a checkpoint around the block recomputes it.
        rollout_attention: self-attention for passes without gradient that are not recorded. ``None``: ``attention``.
        graded_attention: self-attention for all others. ``None``: ``attention``.
        weights: the block's, if they are streamed.

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
        graded_attention: Attention | None = None,
    ) -> None:
        if block.attn2.add_k_proj is not None:
            raise BadInputError(
                "the transformer is an image-to-video one: its blocks attend to an image. Take a text-to-video model."
            )
        self._block, self._rows, self._attention, self._count = block, rows, attention, count
        self._rollout_attention, self._graded_attention = rollout_attention, graded_attention or attention
        self._weights = weights or Resident()

    def __call__(
        self,
        hidden_BLD: Tensor,
        text_BLD: Tensor,
        time_B6D: Tensor,
        rotary: tuple[Tensor, Tensor],
        kept_attention: KeptAttention | None = None,
        *,
        recorded: bool = False,
        unread: bool = False,
    ) -> Tensor:
        block = self._block
        attn1, attn2 = block.attn1, block.attn2
        modulation_B6D = block.scale_shift_table + time_B6D.float()
        run: Any = partial(in_slices, count=self._count) if self._count > 1 else _whole
        # the backward calls slices again when the block's weights may have left it, so they are arguments
        weights = self._weights if self._count > 1 else Resident()
        q, k, v = run(
            weights.bound(self._before),
            sliced=[hidden_BLD, *rotary],
            shared=[modulation_B6D, *weights.tensors()],
            parameters=_trainable(attn1.to_q, attn1.to_k, attn1.to_v),
        )
        if recorded or unread or torch.is_grad_enabled():
            attended_BLHd = _attend(self._graded_attention, q, k, v, kept_attention)
        else:
            attended_BLHd = (self._rollout_attention or self._attention.call)(q, k, v)
        del q, k, v
        text_k = self._rows.rms_norm(attn2.to_k(text_BLD), attn2.norm_k.weight, attn2.norm_k.eps)
        text_v = attn2.to_v(text_BLD)
        (out_BLD,) = run(
            weights.bound(self._after),
            sliced=[hidden_BLD, attended_BLHd],
            shared=[modulation_B6D, _heads(attn2, text_k), _heads(attn2, text_v), *weights.tensors()],
            parameters=_trainable(attn1.to_out, attn2.to_q, attn2.to_out, block.ffn),
            unread=unread,
        )
        return out_BLD

    def unread(self, *inputs: Any, **arguments: Any) -> Tensor:
        """For a recompute: saves the same tensors as ``__call__``. In slices it skips the part after the
        self-attention, which saves only its inputs."""
        return self(*inputs, **arguments, unread=True)

    def _before(self, hidden: Tensor, cos: Tensor, sin: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        block, attn = self._block, self._block.attn1
        shift, scale = modulation.chunk(6, dim=1)[:2]
        x = self._rows.norm_modulate(hidden, scale, shift, block.norm1.eps)
        q, k = self._linear(attn.to_q, x), self._linear(attn.to_k, x)
        q, k = self._rows.rope_qk(q, k, attn.norm_q.weight, attn.norm_k.weight, cos, sin, attn.heads, attn.norm_q.eps)
        return q, k, _heads(attn, self._linear(attn.to_v, x))

    def _after(
        self,
        hidden: Tensor,
        attended: Tensor,
        modulation: Tensor,
        text_k: Tensor,
        text_v: Tensor,
    ) -> tuple[Tensor]:
        block, attn, rows = self._block, self._block.attn2, self._rows
        gate, ff_shift, ff_scale, ff_gate = modulation.chunk(6, dim=1)[2:]
        hidden = rows.gate_residual(hidden, self._out(block.attn1, attended), gate)
        x, norm = hidden, block.norm2
        if isinstance(norm, nn.LayerNorm):
            x = rows.layer_norm(hidden, norm.weight, norm.bias, norm.eps)
        q = rows.rms_norm(self._linear(attn.to_q, x), attn.norm_q.weight, attn.norm_q.eps)
        attended = self._attention.call(_heads(attn, q), text_k, text_v)  # of few keys: cheaper to repeat than to keep
        hidden = hidden + self._out(attn, attended)
        x = rows.norm_modulate(hidden, ff_scale, ff_shift, block.norm3.eps)
        return (rows.gate_residual(hidden, self._feed_forward(x), ff_gate),)

    def _linear(self, layer: nn.Module, x: Tensor) -> Tensor:
        return linear(layer, x) if self._rows.lean_linears else layer(x)

    def _out(self, attn: Any, attended_BLHd: Tensor) -> Tensor:
        """The projection after the attention. The dropout of 0 that follows in diffusers is left out."""
        return self._linear(attn.to_out[0], attended_BLHd.flatten(2, 3))

    def _feed_forward(self, x: Tensor) -> Tensor:
        ffn = self._block.ffn
        if not self._rows.lean_linears or getattr(ffn.net[0], "approximate", None) != APPROXIMATE:
            result: Tensor = ffn(x)
            return result
        return linear(ffn.net[2], linear(ffn.net[0].proj, x), gelu=True)  # without the dropout of 0 between them


def _attend(
    attention: Attention, q_BLHd: Tensor, k_BLHd: Tensor, v_BLHd: Tensor, kept_attention: KeptAttention | None
) -> Tensor:
    if kept_attention is None:
        return attention.call(q_BLHd, k_BLHd, v_BLHd)
    return attention.keep_attention(q_BLHd, k_BLHd, v_BLHd, kept_attention)


def _whole(function: Any, sliced: list[Tensor], shared: list[Tensor], **_: Any) -> Any:
    return function(*sliced, *shared)


def _heads(attn: Any, x_BLD: Tensor) -> Tensor:
    return x_BLD.unflatten(2, (attn.heads, -1))


def _trainable(*modules: nn.Module) -> Iterator[Tensor]:
    return (parameter for module in modules for parameter in module.parameters() if parameter.requires_grad)
