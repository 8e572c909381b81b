"""The LTX-Video transformer as a ``types.Velocity``: flow-matching velocity v = eps - x_0 at noise level sigma.

As ``LTXPipeline`` of diffusers 0.42.1 calls it, and ``LTXConditionPipeline`` the 13B: one token of every latent,
timestep 1000 sigma (a real number), positions in seconds and pixels, and a mask over the text's padding.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from lowmem_drf.method.schedule import TRAIN_TIMESTEPS
from lowmem_drf.models.blocks import AS_IN_DIFFUSERS, Activations, set_blocks
from lowmem_drf.models.ltx.published import SPATIAL, TEMPORAL, is_13b
from lowmem_drf.ops import sdpa_attention

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem_drf.memory.kept_attention import KeptAttention
    from lowmem_drf.memory.recorded_rollout import Recorder
    from lowmem_drf.ops import Attention
    from lowmem_drf.types import Velocity

_ORDER = ("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb", "encoder_attention_mask")
"""Arguments of a block."""


class _SelfAttention:
    """A processor as diffusers' ``LTXVideoAttnProcessor``, with these attentions. ``kept`` and ``graded`` are set
    before each call."""

    def __init__(self, attention: Attention, rollout_attention: Any, graded_attention: Attention | None) -> None:
        self._rollout, self._graded = rollout_attention or attention.call, graded_attention or attention
        self.kept: KeptAttention | None = None
        self.graded = True

    def __call__(self, attn: Any, hidden_BLD: Tensor, _: None, mask: None, image_rotary_emb: Any) -> Tensor:
        from diffusers.models.transformers.transformer_ltx import apply_rotary_emb

        q = apply_rotary_emb(attn.norm_q(attn.to_q(hidden_BLD)), image_rotary_emb)
        k = apply_rotary_emb(attn.norm_k(attn.to_k(hidden_BLD)), image_rotary_emb)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, attn.to_v(hidden_BLD)))
        if self.kept is not None:
            attended = self._graded.keep_attention(q, k, v, self.kept)
        else:
            attended = (self._graded.call if self.graded else self._rollout)(q, k, v)
        made: Tensor = attn.to_out[1](attn.to_out[0](attended.flatten(2, 3)))
        return made


class _Forward:
    """A block's own ``forward``, with our self-attention."""

    def __init__(self, block: Any, attention: _SelfAttention) -> None:
        self._run, self._attention = type(block).forward.__get__(block), attention
        block.attn1.set_processor(attention)

    def __call__(
        self, hidden_BLD: Tensor, *rest: Any, kept_attention: KeptAttention | None = None, recorded: bool = False
    ) -> Any:
        self._attention.kept, self._attention.graded = kept_attention, recorded or torch.is_grad_enabled()
        return self._run(hidden_BLD, *rest)

    def unread(self, hidden_BLD: Tensor, *rest: Any, **arguments: Any) -> Any:
        return self(hidden_BLD, *rest, **{**arguments, "recorded": True})


def set_activations(transformer: Any, how: Activations = AS_IN_DIFFUSERS) -> tuple[str, ...]:
    """See ``Family.set_activations``. All but the self-attention is diffusers' own arithmetic: ``slices`` and ``rows``
    are not used."""
    attentions = how.attention or sdpa_attention(), how.rollout_attention, how.graded_attention
    blocks = list(transformer.transformer_blocks)
    for block in blocks:
        if _positional not in block._forward_pre_hooks.values():
            block.register_forward_pre_hook(_positional, with_kwargs=True)
    set_blocks(transformer, blocks, lambda block, weights: _Forward(block, _SelfAttention(*attentions)), how)
    fused = how.rows is not None and how.rows.name == "fused"
    unused = {"kernels.ops": fused, "memory.token_slices": how.slices > 1}
    return tuple(name for name, is_set in unused.items() if is_set)


def _positional(block: Any, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """diffusers names the arguments of a block, unless it checkpoints."""
    return (*given, *(named[name] for name in _ORDER if name in named)), {}


def as_velocity(transformer: Any, recorder: Recorder | None = None, call: Any = None, fps: float = 24.0) -> Velocity:
    """``f(x_BCFhw, sigma, text_BLD) -> v_BCFhw`` in the dtype of ``x``, computed in the transformer's dtype.
    Differentiable in ``x`` and the LoRA. Text embeddings that are zero are padding, and masked.

    Args:
        call: called in place of the transformer.
        fps: frames a second of the clips: positions in time are seconds.
    """
    call = transformer if call is None else call
    scale, newer = (TEMPORAL / fps, SPATIAL, SPATIAL), is_13b(transformer.config)

    def velocity(x_BCFhw: Tensor, sigma: float, cond: Any) -> Tensor:
        dtype, (frames, height, width) = transformer.proj_in.weight.dtype, x_BCFhw.shape[2:]
        timestep_B = torch.full((len(x_BCFhw),), sigma * TRAIN_TIMESTEPS, dtype=torch.float32, device=x_BCFhw.device)
        text_BLD = cond.to(x_BCFhw.device, dtype)
        coordinates = _coordinates(x_BCFhw, fps) if newer else None
        with nullcontext() if recorder is None else recorder.during(cond):
            (v_BND,) = call(
                x_BCFhw.to(dtype).flatten(2).transpose(1, 2), text_BLD, timestep_B, (text_BLD != 0).any(dim=2),
                frames, height, width, scale, coordinates, return_dict=False,
            )  # fmt: skip
        return v_BND.transpose(1, 2).unflatten(2, (frames, height, width)).to(x_BCFhw.dtype)

    return velocity


def _coordinates(x_BCFhw: Tensor, fps: float) -> Tensor:
    """Seconds and pixels of each token, (B, 3, N), fp32. A latent frame begins where its frames do: the first one has
    one frame."""
    axes = [torch.arange(size, dtype=torch.float32, device=x_BCFhw.device) for size in x_BCFhw.shape[2:]]
    axes = [(axes[0] * TEMPORAL + 1 - TEMPORAL).clamp(min=0) / fps, *(axis * SPATIAL for axis in axes[1:])]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1).expand(len(x_BCFhw), -1, -1)
