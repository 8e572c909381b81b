"""The Wan transformer as a ``types.Velocity``: flow matching velocity v = eps - x_0 at a noise level sigma."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from lowmem_drf.memory.activations import BlockPolicy
from lowmem_drf.models.sources import complete, loading
from lowmem_drf.models.wan_block import SlicedForward

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel
    from torch import Tensor

    from lowmem_drf.memory.host import HostStore
    from lowmem_drf.types import Velocity

TRAIN_TIMESTEPS = 1000


def load_denoiser(folder_or_id: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> WanTransformer3DModel:
    """The transformer in subfolder ``transformer`` of a diffusers model: frozen, eval. In 16 bits diffusers keeps norms and the time
    embedding in fp32. Raises BadInputError if it cannot be loaded."""
    from diffusers import WanTransformer3DModel

    with loading("the transformer", folder_or_id):
        transformer = complete(WanTransformer3DModel.from_pretrained(folder_or_id, subfolder="transformer", torch_dtype=dtype, output_loading_info=True))
    return transformer.to(device).eval().requires_grad_(False)


def set_activations(
    transformer: WanTransformer3DModel,
    checkpoint: bool | Literal["host"] = True,
    keep_blocks: int = 0,
    slices: int = 1,
    store: HostStore | None = None,
) -> None:
    """What the blocks keep of a forward with gradient. May be called again, with or without a LoRA on. No setting changes what is computed
    but for the rounding of matrix products over ``slices``.

    Diffusers checkpoints whenever gradients are enabled, in ``eval`` too (unlike transformers), so nothing else has to be switched.

    Args:
        checkpoint: ``True``: each block keeps its input, and is computed again in its backward. ``"host"``: and the inputs wait in ``store``.
            ``False``: each block keeps all it needs.
        keep_blocks: so many blocks at the end keep all in any case.
        slices: what a block does token by token is done in so many slices of tokens, with gradient and without (see ``wan_block``). 1: as in
            diffusers.
        store: of ``"host"``.

    Raises:
        BadInputError: slices of an image-to-video transformer.
    """
    for block in transformer.blocks:
        block.__dict__.pop("forward", None)
        if slices > 1:
            block.forward = SlicedForward(block, slices)
    if checkpoint is False:
        transformer.disable_gradient_checkpointing()
        return
    if checkpoint == "host" and store is None:
        raise ValueError('checkpoint = "host" needs a store')
    transformer.enable_gradient_checkpointing(BlockPolicy(list(transformer.blocks), keep_blocks, store if checkpoint == "host" else None))


def timestep_of(sigma: float) -> int:
    """The integer timestep that WanPipeline passes for ``sigma`` in (0, 1]: UniPC stores 1000 sigma in an int64, which truncates."""
    return int(sigma * TRAIN_TIMESTEPS)


def as_velocity(transformer: WanTransformer3DModel) -> Velocity:
    """``f(x_BCFhw, sigma, text_BLD) -> v_BCFhw`` in the dtype of ``x``; computed in the dtype of the transformer. Differentiable in ``x``
    and the LoRA."""

    def velocity(x_BCFhw: Tensor, sigma: float, cond: Any) -> Tensor:
        # patch_embedding's, not transformer.dtype: that answers with the dtype of whatever parameter comes last, an fp32 LoRA's for one
        dtype = transformer.patch_embedding.weight.dtype
        timestep = torch.full((x_BCFhw.shape[0],), timestep_of(sigma), dtype=torch.int64, device=x_BCFhw.device)
        v = transformer(x_BCFhw.to(dtype), timestep, cond.to(x_BCFhw.device, dtype), return_dict=False)[0]
        return v.to(x_BCFhw.dtype)

    return velocity
