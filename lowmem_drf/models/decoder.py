"""The Wan video VAE as a ``types.Decoder``: whole, or one latent frame at a time with its caches as values.

diffusers 0.42.1, ``AutoencoderKLWan._decode``, already decodes one latent frame at a time; between chunks it keeps, in a mutable list, the
last two input frames of every causal convolution. Here that list is an argument and a result, so that any chunk can be computed again from
what entered it. Encoding is not needed by the method and not here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lowmem_drf.models.sources import complete, loading

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan
    from torch import Tensor

Caches = tuple[Any, ...]
"""An entry per causal convolution of the decoder: a tensor (B, C, 1 or 2, H, W), ``None`` (nothing yet) or the marker ``"Rep"``
(upsampling in time skips the first latent frame)."""


def load_vae(folder_or_id: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> AutoencoderKLWan:
    """The VAE in subfolder ``vae`` of a diffusers model: frozen, eval. Raises BadInputError if it cannot be loaded."""
    from diffusers import AutoencoderKLWan

    with loading("the VAE", folder_or_id):
        vae = complete(AutoencoderKLWan.from_pretrained(folder_or_id, subfolder="vae", torch_dtype=dtype, output_loading_info=True))
    return vae.to(device).eval().requires_grad_(False)


class WanDecoder:
    """``types.Decoder`` on an ``AutoencoderKLWan``. Latents are the transformer's; frames are in [0, 1], in the VAE's dtype."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

        self.vae = vae
        self.temporal_factor: int = vae.config.scale_factor_temporal
        self.spatial_factor: int = vae.config.scale_factor_spatial
        self._cache_slots = sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())

    def decode(self, latents_BCFhw: Tensor) -> Tensor:
        """(B, C, F, h, w) -> (B, T, 3, H, W) in [0, 1], by ``vae.decode``. Differentiable."""
        return self._to_frames(self.vae.decode(self._to_vae(latents_BCFhw), return_dict=False)[0])

    def start(self, batch: int) -> Caches:
        """The caches that enter the first chunk. ``batch`` is part of the contract; Wan's caches start empty whatever it is."""
        return (None,) * self._cache_slots

    def chunk(self, latents_BC1hw: Tensor, caches: Caches) -> tuple[Tensor, Caches]:
        """(B, C, 1, h, w) and the caches that enter -> frames (B, 1 or 4, 3, H, W) in [0, 1] and the caches handed on.

        Pure: ``caches`` is not changed. Differentiable in the latents and in every tensor of ``caches``. Bitwise the frames of ``decode``.
        """
        handed_on = list(caches)
        x = self.vae.post_quant_conv(self._to_vae(latents_BC1hw))
        x = self.vae.decoder(x, feat_cache=handed_on, feat_idx=[0], first_chunk=all(cache is None for cache in caches))
        if self.vae.config.patch_size is not None:
            from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

            x = unpatchify(x, patch_size=self.vae.config.patch_size)
        return self._to_frames(torch.clamp(x, min=-1.0, max=1.0)), tuple(handed_on)

    def _to_vae(self, latents_BCFhw: Tensor) -> Tensor:
        """Undoes the normalisation, in WanPipeline's own arithmetic (division by the inverse), so that its clips are reproduced to the
        bit."""
        x = latents_BCFhw.to(self.vae.dtype)
        mean = torch.tensor(self.vae.config.latents_mean).view(1, -1, 1, 1, 1).to(x)
        inverse_std = (1.0 / torch.tensor(self.vae.config.latents_std).view(1, -1, 1, 1, 1)).to(x)
        return x / inverse_std + mean

    @staticmethod
    def _to_frames(x_BCTHW: Tensor) -> Tensor:
        return (x_BCTHW * 0.5 + 0.5).transpose(1, 2)
