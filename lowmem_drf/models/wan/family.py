"""Wan as a ``models.family.Family``."""

from __future__ import annotations

from typing import Any

from lowmem_drf.models.family import GeneratorConfig, Images, LoraHeader, ModuleNames
from lowmem_drf.models.wan import images
from lowmem_drf.models.wan.denoiser import as_velocity, set_activations
from lowmem_drf.models.wan.denoiser import load_denoiser as load_transformer
from lowmem_drf.models.wan.kinds import kind_of
from lowmem_drf.models.wan.names import BLOCK_LINEARS, IMAGE_LINEARS, IN_BLOCK, OUTSIDE
from lowmem_drf.models.wan.programs import verdicts
from lowmem_drf.models.wan.published import KINDS, KNOWN, parameter_shapes, probe, refuse, sizes
from lowmem_drf.models.wan.random_generator import empty_text, empty_transformer, empty_vae
from lowmem_drf.models.wan.single_file import load_single_file as load_file
from lowmem_drf.models.wan.text import load_text, stream_text
from lowmem_drf.models.wan.vae.decoder import WanDecoder as decoder
from lowmem_drf.models.wan.vae.decoder import drop_encoder, load_vae

__all__ = [
    "BLOCKS", "IMAGES", "KINDS", "KNOWN", "NAME", "NAMES", "as_velocity", "decoder", "drop_encoder", "empty_text",
    "empty_transformer", "empty_vae", "kind_of", "load_file", "load_text", "load_transformer", "load_vae",
    "lora_header", "parameter_shapes", "pipeline", "probe", "refuse", "set_activations", "sizes", "stream_text",
    "verdicts",
]  # fmt: skip

NAME = "Wan"
BLOCKS = "blocks"
IMAGES: Images | None = images
NAMES = ModuleNames(BLOCK_LINEARS, IN_BLOCK, OUTSIDE, image_linears=IMAGE_LINEARS)


def pipeline(transformer: Any) -> Any:
    """``WanPipeline``, or the one for image-to-video models, around the transformer alone."""
    import diffusers

    image = transformer.config.in_channels != transformer.config.out_channels
    kind: Any = diffusers.WanImageToVideoPipeline if image else diffusers.WanPipeline
    return kind(tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=transformer)


def lora_header(generator: GeneratorConfig) -> LoraHeader:
    """Models with two experts, or with 48 latent channels (TI2V-5B), are 2.2."""
    second = generator.boundary is not None or generator.transformer["in_channels"] == 48
    version = "wan2.2" if second else "wan2.1"
    return LoraHeader(version, f"https://github.com/Wan-Video/{version.capitalize()}", "networks.lora_wan")
