"""Clips that begin with an image: what a Wan transformer takes of it, as ``WanImageToVideoPipeline`` of diffusers
0.42.1 makes it.

Image-to-video models (2.1-I2V, 2.2-I2V-A14B) take more channels: a mask of the frames that are given, and the latents
of the image with empty frames after it; those of 2.1 also tokens of CLIP. TI2V-5B takes the image's latents as the
clip's first latent frame (``denoiser``), and makes clips without an image too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from lowmem_drf.models.family import EncodedImage, GeneratorConfig
from lowmem_drf.models.weights.finite import refuse_model
from lowmem_drf.models.weights.sources import complete, loading

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


def use(generator: GeneratorConfig) -> Literal["no", "may", "must"]:
    """See ``Images``."""
    if generator.first_frame:
        return "may"
    return "must" if generator.transformer["in_channels"] > generator.vae["z_dim"] else "no"


@dataclass(frozen=True)
class WanImageEncoder:
    """``ImageEncoder``. ``latents_CFhw`` is the mask (4, F, h, w) and the latents (z, F, h, w); for ``first_frame`` it
    is the latents (z, 1, h, w), in fp32: the clip has them as they are. ``tokens_LD``: the last layer but one of CLIP,
    if there is one.

    Args:
        clip: (its model, its image processor).
        dtype: of the other results.
    """

    vae: Any
    clip: tuple[Any, Any] | None
    first_frame: bool
    dtype: torch.dtype

    @torch.no_grad()
    def encode(self, image: Image, frames: int) -> EncodedImage:
        from diffusers.video_processor import VideoProcessor

        config = self.vae.config
        processor = VideoProcessor(vae_scale_factor=config.scale_factor_spatial)
        clip_1CTHW = processor.preprocess(image, height=image.height, width=image.width).unsqueeze(2)
        if not self.first_frame:
            empty = clip_1CTHW.new_zeros(*clip_1CTHW.shape[:2], frames - 1, *clip_1CTHW.shape[3:])
            clip_1CTHW = torch.cat([clip_1CTHW, empty], dim=2)
        encoded = self.vae.encode(clip_1CTHW.to(self.vae.device, self.vae.dtype)).latent_dist.mode()[0].cpu().float()
        mean, std = (torch.tensor(config[f"latents_{name}"])[:, None, None, None] for name in ("mean", "std"))
        latents_CFhw = (encoded - mean) * (1 / std)
        if not self.first_frame:
            mask = latents_CFhw.new_zeros(config.scale_factor_temporal, *latents_CFhw.shape[1:])
            mask[:, 0] = 1
            latents_CFhw = torch.cat([mask, latents_CFhw])
        return EncodedImage(latents_CFhw if self.first_frame else latents_CFhw.to(self.dtype), self._tokens(image))

    def _tokens(self, image: Image) -> Tensor | None:
        if self.clip is None:
            return None
        model, processor = self.clip
        pixels = processor(images=image, return_tensors="pt")["pixel_values"].to(model.device)
        states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
        return states[-2][0].cpu().to(self.dtype)


def encoder(
    folder_or_id: str,
    generator: GeneratorConfig,
    vae: Any,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> WanImageEncoder:
    """See ``Images``. Pixels are CLIP's by Pillow: those of torchvision, where it is installed, differ by a level."""
    clip = _load_clip(folder_or_id, dtype, device) if generator.transformer.get("image_dim") else None
    return WanImageEncoder(vae, clip, generator.first_frame, dtype)


def _load_clip(folder_or_id: str, dtype: torch.dtype, device: str | torch.device) -> tuple[Any, Any]:
    from transformers import CLIPImageProcessorPil, CLIPVisionModel

    load = CLIPVisionModel.from_pretrained
    with loading("the image encoder", folder_or_id):
        model = complete(load(folder_or_id, subfolder="image_encoder", dtype=dtype, output_loading_info=True))
        processor = CLIPImageProcessorPil.from_pretrained(folder_or_id, subfolder="image_processor")
    model = model.to(device).eval().requires_grad_(False)
    refuse_model(model, f"the image encoder of {folder_or_id}")
    return model, processor


def blank(generator: GeneratorConfig, latents: Sequence[int], dtype: torch.dtype) -> EncodedImage:
    """See ``Images``."""
    channels, (frames, *sides) = generator.vae["z_dim"], latents
    if generator.first_frame:
        return EncodedImage(torch.zeros(channels, 1, *sides))
    masked = channels + generator.vae.get("scale_factor_temporal", 4)
    tokens_LD = None
    if clip := generator.image:
        tokens_LD = torch.zeros((clip["image_size"] // clip["patch_size"]) ** 2 + 1, clip["hidden_size"], dtype=dtype)
    return EncodedImage(torch.zeros(masked, frames, *sides, dtype=dtype), tokens_LD)
