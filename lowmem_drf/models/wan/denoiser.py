"""The Wan transformer as a ``types.Velocity``: flow-matching velocity v = eps - x_0 at noise level sigma.

Of clips that begin with an image the condition is an ``ImageCondition`` (``images``), and the velocity that of
``WanImageToVideoPipeline``.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lowmem_drf.method.schedule import timestep_of
from lowmem_drf.models import folders
from lowmem_drf.models.attention import attention_named
from lowmem_drf.models.blocks import AS_IN_DIFFUSERS, Activations, set_blocks
from lowmem_drf.models.family import ImageCondition
from lowmem_drf.models.wan.block import BlockForward
from lowmem_drf.models.wan.forward import ImageForward
from lowmem_drf.models.wan.random_generator import empty_transformer
from lowmem_drf.ops import naive_ops

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel
    from torch import Tensor

    from lowmem_drf.memory.recorded_rollout import Recorder
    from lowmem_drf.memory.streaming import Layer
    from lowmem_drf.types import Velocity


load_denoiser = partial(folders.load_transformer, "WanTransformer3DModel", empty_transformer, "blocks")
"""``Family.load_transformer``. In 16 bits norms and the time embedding stay in fp32, as in ``from_pretrained``."""


def set_activations(transformer: WanTransformer3DModel, how: Activations = AS_IN_DIFFUSERS) -> None:
    """See ``Family.set_activations``; ``slices``: see ``block``."""
    rows, attention = how.rows or naive_ops(), how.attention or attention_named("sdpa")

    def forward_of(block: Any, weights: Layer | None) -> BlockForward:
        return BlockForward(block, rows, attention, how.slices, how.rollout_attention, weights, how.graded_attention)

    transformer.forward = ImageForward(transformer)
    set_blocks(transformer, list(transformer.blocks), forward_of, how)


def as_velocity(
    transformer: WanTransformer3DModel, recorder: Recorder | None = None, call: Any = None, fps: float = 24.0
) -> Velocity:
    """``f(x_BCFhw, sigma, text_BLD) -> v_BCFhw`` in the dtype of ``x``, computed in the transformer's dtype.
    Differentiable in ``x`` and the LoRA. ``call``: called in place of the transformer. ``fps``: not used, Wan counts
    frames.

    The condition may be an ``ImageCondition``. If its latents have the channels of ``x``, they are the clip's first
    frame (TI2V-5B; after ``set_activations``).
    """
    call = transformer if call is None else call

    def velocity(x_BCFhw: Tensor, sigma: float, cond: Any) -> Tensor:
        # not transformer.dtype: it returns the dtype of the last parameter, which may be an fp32 LoRA's
        dtype, device = transformer.patch_embedding.weight.dtype, x_BCFhw.device
        timestep = torch.full((x_BCFhw.shape[0],), timestep_of(sigma), dtype=torch.int64, device=device)
        text_BLD, taken_BCFhw, first, tokens = cond, x_BCFhw, None, {}
        if isinstance(cond, ImageCondition):
            text_BLD, image = cond.text_BLD, cond.latents_BCFhw.to(device, x_BCFhw.dtype)
            if image.shape[1] == x_BCFhw.shape[1]:
                first, taken_BCFhw = image, torch.cat([image, x_BCFhw[:, :, 1:]], dim=2)
                timestep = torch.stack([torch.zeros_like(timestep), timestep], dim=1)
            else:
                taken_BCFhw = torch.cat([x_BCFhw, image], dim=1)
            if cond.tokens_BLD is not None:
                tokens = {"encoder_hidden_states_image": cond.tokens_BLD.to(device, dtype)}
        with nullcontext() if recorder is None else recorder.during(cond):
            v = call(taken_BCFhw.to(dtype), timestep, text_BLD.to(device, dtype), **tokens, return_dict=False)[0]
        v = v.to(x_BCFhw.dtype)
        if first is None:
            return v
        # Nothing is made of the first frame: it is on the straight line from its noise to the image, where every
        # sampler ends, so no sampler has to know. The transformer does not read it: no gradient of the LoRA is lost.
        return torch.cat([(x_BCFhw[:, :, :1] - first) / sigma, v[:, :, 1:]], dim=2)

    return velocity
