"""The Wan transformer as a ``types.Velocity``: flow matching velocity v = eps - x_0 at a noise level sigma."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lowmem_drf.models.sources import complete, loading

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel
    from torch import Tensor

    from lowmem_drf.types import Velocity

TRAIN_TIMESTEPS = 1000


def load_denoiser(folder_or_id: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> WanTransformer3DModel:
    """The transformer in subfolder ``transformer`` of a diffusers model: frozen, eval. In 16 bits diffusers keeps norms and the time
    embedding in fp32. Raises BadInputError if it cannot be loaded."""
    from diffusers import WanTransformer3DModel

    with loading("the transformer", folder_or_id):
        transformer = complete(WanTransformer3DModel.from_pretrained(folder_or_id, subfolder="transformer", torch_dtype=dtype, output_loading_info=True))
    return transformer.to(device).eval().requires_grad_(False)


def set_checkpointing(transformer: WanTransformer3DModel, on: bool) -> None:
    """Block-wise gradient checkpointing: a graded step keeps one hidden state per block and recomputes the rest.

    Diffusers checkpoints whenever gradients are enabled, in ``eval`` too (unlike transformers), so nothing else has to be switched.
    """
    if on:
        transformer.enable_gradient_checkpointing()
    else:
        transformer.disable_gradient_checkpointing()


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
