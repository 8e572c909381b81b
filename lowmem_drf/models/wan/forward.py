"""The ``forward`` of a Wan transformer whose clip begins with an image, around blocks with ``BlockForward``.

Two things differ from ``WanTransformer3DModel.forward`` of diffusers 0.42.1, and no result does. Where the first latent
frame is given (TI2V-5B), diffusers has a timestep for every token, and so a modulation of (B, L, 6, D) in fp32: 2 GB
for 121 frames of 1280 x 704. There are two timesteps: here is a modulation of (B, 2, 6, D), for the tokens of the first
frame and for the others. And where blocks attend to tokens of an image (2.1-I2V), diffusers puts them before the
text, and cuts before the last 512; here they are an argument of their own.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor


class ImageForward:
    """Replaces a transformer's ``forward``. Takes timesteps (B,), or (B, 2): of the first latent frame and of the
    others. Without an image it is diffusers'."""

    def __init__(self, transformer: Any) -> None:
        self._transformer, self._plain = transformer, MethodType(type(transformer).forward, transformer)

    def __call__(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        image, text = encoder_hidden_states_image, encoder_hidden_states
        if image is None and timestep.ndim == 1:
            return self._plain(hidden_states, timestep, text, None, return_dict, **others)
        if return_dict or others:
            raise ValueError("with an image the transformer returns a tuple, and takes no other arguments")
        return (self._with_image(hidden_states, timestep, text, image),)

    def _with_image(self, x_BCFhw: Tensor, timestep: Tensor, text_BLD: Tensor, image_BLD: Tensor | None) -> Tensor:
        model, two = self._transformer, timestep.ndim == 2
        patch = model.config.patch_size
        grid = [side // of_patch for side, of_patch in zip(x_BCFhw.shape[2:], patch, strict=True)]
        rotary = model.rope(x_BCFhw)
        hidden_BLD = model.patch_embedding(x_BCFhw).flatten(2).transpose(1, 2).contiguous()
        embedded, time, text_BLD, image_BLD = model.condition_embedder(
            timestep.flatten(), text_BLD, image_BLD, timestep_seq_len=timestep.shape[1] if two else None
        )
        texts = text_BLD if image_BLD is None else (image_BLD, text_BLD)
        if two:
            rotary = tuple(part.unflatten(1, (grid[0], -1)) for part in rotary)
        arguments = (texts, time.unflatten(-1, (6, -1)), rotary)
        recomputed = torch.is_grad_enabled() and model.gradient_checkpointing
        for block in model.blocks:
            if recomputed:
                hidden_BLD = model._gradient_checkpointing_func(block, hidden_BLD, *arguments)
            else:
                hidden_BLD = block(hidden_BLD, *arguments)
        out_BLc = self._projected(hidden_BLD, embedded if two else embedded[:, None], grid[1] * grid[2])
        out = out_BLc.unflatten(1, grid).unflatten(-1, (*patch, -1))  # (B, F, H, W, p, p, p, C)
        return out.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def _projected(self, hidden_BLD: Tensor, embedded_BTD: Tensor, first: int) -> Tensor:
        """The norm of the output and its projection, for each timestep's tokens."""
        model = self._transformer
        table_BT2D = model.scale_shift_table[:, None] + embedded_BTD.unsqueeze(2)
        tokens = hidden_BLD.shape[1]
        lengths = [tokens] if embedded_BTD.shape[1] == 1 else [first, tokens - first]
        parts = []
        for part, table_B2D in zip(hidden_BLD.split(lengths, dim=1), table_BT2D.unbind(1), strict=True):
            shift, scale = table_B2D.chunk(2, dim=1)
            parts.append(model.proj_out((model.norm_out(part.float()) * (1 + scale) + shift).type_as(part)))
        return torch.cat(parts, dim=1)
