"""The ``forward`` of a Wan block as two token-wise functions around the self-attention.

Everything in a block except the self-attention acts on each token independently: norms, modulation, projections, rotary
embedding, cross-attention to the text, feed-forward, gates. Diffusers computes each over the whole sequence, with fp32
copies. Here each operation may be a fused kernel, and the two functions may run in slices of tokens, recomputed slice
by slice: of the whole sequence only the block's input, q, k, v and the attention's output are alive. The result of
the self-attention may be kept for the recompute.

Same operations in the same order as ``WanTransformerBlock.forward`` and ``WanAttnProcessor`` of diffusers 0.42. What
``forward`` passes for clips that begin with an image is taken too: text behind tokens of the image, and two
modulations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowmem_drf.memory.activations import in_slices
from lowmem_drf.memory.streaming import Resident
from lowmem_drf.models.lora.linear import APPROXIMATE, linear

if TYPE_CHECKING:
    from lowmem_drf.memory.kept_attention import KeptAttention
    from lowmem_drf.memory.streaming import Layer
    from lowmem_drf.ops import Attention, RowOps


class BlockForward:
    """The ``forward`` of one block.

    Args:
        count: slices of tokens. With 1 only a checkpoint around the block recomputes it.
        rollout_attention: self-attention for passes without gradient that are not recorded. ``None``: ``attention``.
        graded_attention: self-attention for all others. ``None``: ``attention``.
        weights: the block's, if they are streamed.
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
        self._block, self._rows, self._attention, self._count = block, rows, attention, count
        self._rollout_attention, self._graded_attention = rollout_attention, graded_attention or attention
        self._weights = weights or Resident()

    def __call__(
        self,
        hidden_BLD: Tensor,
        text_BLD: Tensor | tuple[Tensor, Tensor],
        time: Tensor,
        rotary: tuple[Tensor, Tensor],
        kept_attention: KeptAttention | None = None,
        *,
        recorded: bool = False,
        unread: bool = False,
    ) -> Tensor:
        """
        Args:
            text_BLD: or (tokens of the image, text).
            time: (B, 6, D), or (B, 2, 6, D): of the tokens of the first latent frame, and of the others.
            rotary: cosine and sine (1, L, 1, d); for two times (1, F, L / F, 1, d).
        """
        block = self._block
        attn1, attn2 = block.attn1, block.attn2
        modulation, first = block.scale_shift_table + time.float(), 0
        if time.ndim == 4:
            first, (cos, sin) = rotary[0].shape[2], rotary
            rotary = cos.flatten(1, 2), sin.flatten(1, 2)
        run: Any = partial(in_slices, count=self._count) if self._count > 1 else _whole
        # the backward calls slices again when the block's weights may have left it, so they are arguments
        weights = self._weights if self._count > 1 else Resident()
        q, k, v = run(
            weights.bound(partial(self._before, first)),
            sliced=[hidden_BLD, *rotary],
            shared=[modulation, *weights.tensors()],
            parameters=_trainable(attn1.to_q, attn1.to_k, attn1.to_v),
        )
        if recorded or unread or torch.is_grad_enabled():
            attended_BLHd = _attend(self._graded_attention, q, k, v, kept_attention)
        else:
            attended_BLHd = (self._rollout_attention or self._attention.call)(q, k, v)
        del q, k, v
        (out_BLD,) = run(
            weights.bound(partial(self._after, first)),
            sliced=[hidden_BLD, attended_BLHd],
            shared=[modulation, *self._text(text_BLD), *weights.tensors()],
            parameters=_trainable(attn1.to_out, attn2.to_q, attn2.to_out, block.ffn),
            unread=unread,
        )
        return out_BLD

    def unread(self, *inputs: Any, **arguments: Any) -> Tensor:
        """For a recompute: saves the same tensors as ``__call__``. In slices it skips the part after the
        self-attention, which saves only its inputs."""
        return self(*inputs, **arguments, unread=True)

    def _text(self, text_BLD: Tensor | tuple[Tensor, Tensor]) -> Iterator[Tensor]:
        """Keys and values (B, L, H, d) of the text, and then those of the image's tokens."""
        attn, image_BLD = self._block.attn2, None
        if isinstance(text_BLD, tuple):
            image_BLD, text_BLD = text_BLD
        yield _heads(attn, self._rows.rms_norm(attn.to_k(text_BLD), attn.norm_k.weight, attn.norm_k.eps))
        yield _heads(attn, attn.to_v(text_BLD))
        if image_BLD is not None:
            norm = attn.norm_added_k
            yield _heads(attn, self._rows.rms_norm(attn.add_k_proj(image_BLD), norm.weight, norm.eps))
            yield _heads(attn, attn.add_v_proj(image_BLD))

    def _before(
        self, first: int, start: int, hidden: Tensor, cos: Tensor, sin: Tensor, modulation: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        attn = self._block.attn1
        x = self._modulated(self._block.norm1, hidden, first - start, modulation[..., :2, :])
        q, k = self._linear(attn.to_q, x), self._linear(attn.to_k, x)
        q, k = self._rows.rope_qk(q, k, attn.norm_q.weight, attn.norm_k.weight, cos, sin, attn.heads, attn.norm_q.eps)
        return q, k, _heads(attn, self._linear(attn.to_v, x))

    def _after(
        self, first: int, start: int, hidden: Tensor, attended: Tensor, modulation: Tensor, *text: Tensor
    ) -> tuple[Tensor]:
        block, attn, rows = self._block, self._block.attn2, self._rows
        first -= start
        hidden = _by_time(
            rows.gate_residual, [hidden, self._out(block.attn1, attended)], first, modulation[..., 2:3, :]
        )
        x, norm = hidden, block.norm2
        if isinstance(norm, nn.LayerNorm):
            x = rows.layer_norm(hidden, norm.weight, norm.bias, norm.eps)
        q = _heads(attn, rows.rms_norm(self._linear(attn.to_q, x), attn.norm_q.weight, attn.norm_q.eps))
        attended = self._attention.call(q, *text[:2])  # of few keys: cheaper to repeat than to keep
        if text[2:]:
            attended = attended + self._attention.call(q, *text[2:])
        hidden = hidden + self._out(attn, attended)
        x = self._modulated(block.norm3, hidden, first, modulation[..., 3:5, :])
        return (_by_time(rows.gate_residual, [hidden, self._feed_forward(x)], first, modulation[..., 5:, :]),)

    def _modulated(self, norm: Any, x: Tensor, first: int, modulation: Tensor) -> Tensor:
        def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
            return self._rows.norm_modulate(x, scale, shift, norm.eps)

        return _by_time(modulate, [x], first, modulation)

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
    return function(0, *sliced, *shared)


def _by_time(function: Callable[..., Tensor], tokens: list[Tensor], first: int, modulation: Tensor) -> Tensor:
    """``function(*tokens, *rows of the modulation)``.

    Args:
        tokens: (B, L, D).
        first: how many of them have the first of two modulations.
        modulation: (B, n, D), or two: (B, 2, n, D).
    """
    if modulation.ndim == 3:
        return function(*tokens, *modulation.split(1, dim=1))
    first = min(max(first, 0), tokens[0].shape[1])
    parts = zip(*(x.split([first, x.shape[1] - first], dim=1) for x in tokens), modulation.unbind(1), strict=True)
    made = [function(*part, *rows.split(1, dim=1)) for *part, rows in parts if part[0].shape[1]]
    return made[0] if len(made) == 1 else torch.cat(made, dim=1)


def _heads(attn: Any, x_BLD: Tensor) -> Tensor:
    return x_BLD.unflatten(2, (attn.heads, -1))


def _trainable(*modules: nn.Module) -> Iterator[Tensor]:
    return (parameter for module in modules for parameter in module.parameters() if parameter.requires_grad)
