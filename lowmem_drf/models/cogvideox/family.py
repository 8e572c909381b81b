"""CogVideoX as a ``models.family.Family``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lowmem_drf.models.cogvideox.decoder import CogVideoXDecoder as decoder
from lowmem_drf.models.cogvideox.denoiser import as_velocity, set_activations
from lowmem_drf.models.cogvideox.loading import (
    drop_encoder,
    load_file,
    load_text,
    load_transformer,
    load_vae,
    stream_text,
)
from lowmem_drf.models.cogvideox.published import (
    BLOCKS,
    KINDS,
    KNOWN,
    LINEARS,
    MODULATIONS,
    NAME,
    empty_text,
    empty_transformer,
    empty_vae,
    parameter_shapes,
    probe,
    refuse,
    sizes,
)
from lowmem_drf.models.family import GeneratorConfig, Images, LoraHeader, ModuleNames, Verdict
from lowmem_drf.models.lora.changes import LoraChanges

__all__ = [
    "BLOCKS", "IMAGES", "KINDS", "KNOWN", "NAME", "NAMES", "as_velocity", "decoder", "drop_encoder", "empty_text",
    "empty_transformer", "empty_vae", "kind_of", "load_file", "load_text", "load_transformer", "load_vae",
    "lora_header", "parameter_shapes", "pipeline", "probe", "refuse", "set_activations", "sizes", "stream_text",
    "verdicts",
]  # fmt: skip

_IN_BLOCK = (*LINEARS, *MODULATIONS, "attn1.norm_q", "attn1.norm_k", "norm1.norm", "norm2.norm")
_OUTSIDE = (
    *("patch_embed.proj", "patch_embed.text_proj", "time_embedding.linear_1", "time_embedding.linear_2"),
    *("norm_final", "norm_out.linear", "norm_out.norm", "proj_out"),
)
IMAGES: Images | None = None
NAMES = ModuleNames(
    linears={name: name for name in LINEARS},
    in_block={name: name for name in _IN_BLOCK},
    outside={name: name for name in _OUTSIDE},
    kohya=False,
    comfyui="",
)
"""diffusers' own: its publishers' code has one layer for query, key and value, so no LoRA has their names. Nor does
``CogVideoXPipeline`` read another form than diffusers'."""


def pipeline(transformer: Any) -> Any:
    """``CogVideoXPipeline`` around the transformer alone."""
    from diffusers import CogVideoXPipeline

    return CogVideoXPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=transformer)


def lora_header(generator: GeneratorConfig) -> LoraHeader:
    """The same for all."""
    return LoraHeader("cogvideox", "https://github.com/zai-org/CogVideo")


def kind_of(names: Collection[str], complete: bool) -> tuple[str, str] | None:
    """No names tell relatives apart yet."""
    return None


def verdicts(lora: LoraChanges, header: Mapping[str, Any]) -> list[Verdict]:
    """None yet: an export is verified with diffusers, and no other program's reader was compared."""
    return []
