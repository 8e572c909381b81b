"""The transformer of Stable Diffusion 3 as a ``types.Velocity``: flow-matching velocity v = eps - x_0 at noise sigma.

As ``StableDiffusion3Pipeline`` of diffusers 0.42.1 calls it: timestep 1000 sigma, the encoders' pooled text beside the
tokens, and no mask: the transformer sees the text's padding.

A block has two streams, text and image. Here they are one sequence, text first, so that a block's input and output are
one tensor, as what checkpoints, streams and records blocks takes them.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lowmem_drf.method.schedule import TRAIN_TIMESTEPS
from lowmem_drf.models.blocks import AS_IN_DIFFUSERS, Activations, set_blocks, without_effect
from lowmem_drf.models.sd3.published import NAME

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem_drf.memory.recorded_rollout import Recorder
    from lowmem_drf.types import Velocity


class _Forward:
    """A block's own ``forward`` on text and image in one sequence; the last block gives the image alone.

    ``text_L0``: empty, as long as the text.
    """

    def __init__(self, block: Any) -> None:
        self._run = type(block).forward.__get__(block)

    def __call__(
        self, both_BND: Tensor, temb_BD: Tensor, text_L0: Tensor, kept_attention: None = None, recorded: bool = False
    ) -> Tensor:
        text, image = both_BND[:, : len(text_L0)], both_BND[:, len(text_L0) :]
        text, image = self._run(image, text, temb_BD)
        return image if text is None else torch.cat([text, image], dim=1)

    unread = __call__


def set_activations(transformer: Any, how: Activations = AS_IN_DIFFUSERS) -> tuple[str, ...]:
    """See ``Family.set_activations``. The blocks' arithmetic is diffusers' own: ``slices``, ``rows`` and ``attention``,
    which change no results, are not used.

    Raises BadInputError: kept attentions, or an attention in 8 bit.
    """
    unused = without_effect(NAME, how)
    set_blocks(transformer, list(transformer.transformer_blocks), lambda block, weights: _Forward(block), how)
    transformer.forward = partial(_forward, transformer)
    return unused


def _forward(
    model: Any, x_BChw: Tensor, text_BLD: Tensor, pooled_BD: Tensor, timestep_B: Tensor, return_dict: bool = False
) -> tuple[Tensor]:
    """The transformer's own ``forward``, with text and image in one sequence."""
    temb_BD = model.time_text_embed(timestep_B, pooled_BD)
    image, text = model.pos_embed(x_BChw), model.context_embedder(text_BLD)
    both, mark_L0 = torch.cat([text, image], dim=1), text.new_empty(text.shape[1], 0)
    keeps = torch.is_grad_enabled() and model.gradient_checkpointing
    for block in model.transformer_blocks:
        run = partial(model._gradient_checkpointing_func, block) if keeps else block
        both = run(both, temb_BD, mark_L0)
    image = model.proj_out(model.norm_out(both[:, -image.shape[1] :], temb_BD))
    side, (height, width) = model.config.patch_size, x_BChw.shape[2:]
    image = image.unflatten(2, (side, side, -1)).unflatten(1, (height // side, width // side))
    return (image.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3),)


def as_velocity(transformer: Any, recorder: Recorder | None = None, call: Any = None, fps: float = 24.0) -> Velocity:
    """``f(x_BC1hw, sigma, text_BLD) -> v_BC1hw`` in the dtype of ``x``, computed in the transformer's dtype.
    Differentiable in ``x`` and the LoRA. ``text_BLD``: as ``loading.TextEncoder`` makes it: the first row is pooled.

    Args:
        call: called in place of the transformer.
        fps: not used: an image has no time.
    """
    call = transformer if call is None else call

    def velocity(x_BC1hw: Tensor, sigma: float, cond: Any) -> Tensor:
        dtype, pooled = transformer.pos_embed.proj.weight.dtype, transformer.config.pooled_projection_dim
        timestep_B = torch.full((len(x_BC1hw),), sigma * TRAIN_TIMESTEPS, dtype=torch.float32, device=x_BC1hw.device)
        text_BLD = cond.to(x_BC1hw.device, dtype)
        with nullcontext() if recorder is None else recorder.during(cond):
            (v_BChw,) = call(
                x_BC1hw[:, :, 0].to(dtype), text_BLD[:, 1:], text_BLD[:, 0, :pooled], timestep_B, return_dict=False
            )
        return v_BChw[:, :, None].to(x_BC1hw.dtype)

    return velocity
