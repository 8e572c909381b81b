"""The CogVideoX transformer as a ``types.Velocity``: flow-matching velocity v = eps - x_0 at noise level sigma.

The model predicts alpha eps - s x_0 at an integer timestep. ``sampling/levels.py`` has the change of variables. It is
exact at any sigma: alpha and s are those of sigma, and the timestep is the one whose own sigma is nearest. At the
default ``sampler.timesteps`` they agree, and a rollout is that of ``CogVideoXPipeline`` with its DDIM scheduler.

Text and clip are one sequence for all blocks, whose attention is over both: so blocks have one tensor to keep, to
record and to replay. Else as in ``CogVideoXTransformer3DModel`` of diffusers 0.42.1.
"""

from __future__ import annotations

from bisect import bisect_left
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lowmem_drf.errors import BadInputError
from lowmem_drf.models.blocks import AS_IN_DIFFUSERS, Activations, set_blocks, without_effect
from lowmem_drf.models.cogvideox.published import NAME, snr_shift
from lowmem_drf.sampling.levels import diffusion_sigmas

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem_drf.memory.recorded_rollout import Recorder
    from lowmem_drf.types import Velocity


class _Forward:
    """A block's own ``forward``, of text and clip as one sequence."""

    def __init__(self, block: Any, text_tokens: int) -> None:
        self._run, self._text = type(block).forward.__get__(block), text_tokens

    def __call__(self, joint_BLD: Tensor, *rest: Any, kept_attention: None = None, recorded: bool = False) -> Tensor:
        clip_BND, text_BLD = self._run(joint_BLD[:, self._text :], joint_BLD[:, : self._text], *rest)
        return torch.cat([text_BLD, clip_BND], dim=1)

    unread = __call__


def set_activations(transformer: Any, how: Activations = AS_IN_DIFFUSERS) -> tuple[str, ...]:
    """See ``Family.set_activations``. The blocks are diffusers' own: ``slices``, ``rows`` and ``attention``, which
    change no results, are not used.

    Raises BadInputError: kept attentions, or an attention in 8 bit.
    """
    unused, tokens = without_effect(NAME, how), transformer.config.max_text_seq_length
    transformer.forward = partial(_forward, transformer)
    set_blocks(transformer, list(transformer.transformer_blocks), lambda block, weights: _Forward(block, tokens), how)
    return unused


def _forward(
    transformer: Any, x_BFChw: Tensor, text_BLD: Tensor, timestep_B: Tensor, image_rotary_emb: Any = None,
    return_dict: bool = False,
) -> tuple[Tensor]:  # fmt: skip
    """The transformer's ``forward``, with blocks of one sequence."""
    time_BE = transformer.time_embedding(transformer.time_proj(timestep_B).to(x_BFChw.dtype))
    joint_BLD = transformer.patch_embed(text_BLD, x_BFChw)
    shared = (time_BE,) if image_rotary_emb is None else (time_BE, image_rotary_emb)
    for block in transformer.transformer_blocks:
        if torch.is_grad_enabled() and transformer.gradient_checkpointing:
            joint_BLD = transformer._gradient_checkpointing_func(block, joint_BLD, *shared)
        else:
            joint_BLD = block(joint_BLD, *shared)
    clip_BND = transformer.norm_final(joint_BLD[:, text_BLD.shape[1] :])
    tokens_BND = transformer.proj_out(transformer.norm_out(clip_BND, temb=time_BE))
    side, (_, frames, _, height, width) = transformer.config.patch_size, x_BFChw.shape
    made = tokens_BND.unflatten(1, (frames, height // side, width // side)).unflatten(4, (-1, side, side))
    return (made.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4),)


def as_velocity(transformer: Any, recorder: Recorder | None = None, call: Any = None, fps: float = 24.0) -> Velocity:
    """``f(x_BCFhw, sigma, text_BLD) -> v_BCFhw`` in the dtype of ``x``, computed in the transformer's dtype.
    Differentiable in ``x`` and the LoRA.

    Args:
        call: called in place of the transformer.
        fps: not used: positions in time are latent frames.

    The function raises BadInputError for a text of another length than the transformer was trained with.
    """
    call, config = transformer if call is None else call, transformer.config
    sigmas = diffusion_sigmas(snr_shift(config))

    def velocity(x_BCFhw: Tensor, sigma: float, cond: Any) -> Tensor:
        dtype, tokens = transformer.proj_out.weight.dtype, config.max_text_seq_length
        if cond.shape[1] != tokens:
            raise BadInputError(
                f"{NAME} has texts of {tokens} tokens, padding included, and these have {cond.shape[1]}: "
                f"-s model.text_tokens={tokens}"
            )
        size = ((1 - sigma) ** 2 + sigma**2) ** 0.5
        timestep_B = torch.full((len(x_BCFhw),), _nearest(sigmas, sigma), device=x_BCFhw.device)
        with nullcontext() if recorder is None else recorder.during(cond):
            (v_BFChw,) = call(
                (x_BCFhw / size).to(dtype).transpose(1, 2), cond.to(x_BCFhw.device, dtype), timestep_B,
                image_rotary_emb=_rotary(config, x_BCFhw), return_dict=False,
            )  # fmt: skip
        return (2 * sigma - 1) / size**2 * x_BCFhw + v_BFChw.transpose(1, 2).to(x_BCFhw.dtype) / size

    return velocity


def _nearest(sigmas: tuple[float, ...], sigma: float) -> int:
    """The timestep whose sigma is nearest."""
    after = min(bisect_left(sigmas, sigma), len(sigmas) - 1)
    return after - (after > 0 and sigma - sigmas[after - 1] < sigmas[after] - sigma)


def _rotary(config: Any, x_BCFhw: Tensor) -> tuple[Tensor, Tensor] | None:
    """5B's (cos, sin) of each token, in fp32, as ``CogVideoXPipeline`` makes them. 2B has none."""
    if not config.use_rotary_positional_embeddings:
        return None
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    side, (frames, height, width) = config.patch_size, x_BCFhw.shape[2:]
    grid = height // side, width // side
    crop = get_resize_crop_region_for_grid(grid, config.sample_width // side, config.sample_height // side)
    cos, sin = get_3d_rotary_pos_embed(config.attention_head_dim, crop, grid, frames, device=x_BCFhw.device)
    return cos, sin
