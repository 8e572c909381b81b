"""Stable Diffusion 3.5 as a ``models.family.Family``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lowmem_drf.models.family import GeneratorConfig, Images, LoraHeader, ModuleNames, Verdict
from lowmem_drf.models.lora.changes import LoraChanges
from lowmem_drf.models.sd3.decoder import SD3Decoder as decoder
from lowmem_drf.models.sd3.denoiser import as_velocity, set_activations
from lowmem_drf.models.sd3.loading import drop_encoder, load_file, load_text, load_transformer, load_vae, stream_text
from lowmem_drf.models.sd3.published import BLOCKS, KINDS, KNOWN, LINEARS, NAME, parameter_shapes, probe, refuse, sizes
from lowmem_drf.models.sd3.published import empty_text as empty_text
from lowmem_drf.models.sd3.published import empty_transformer as empty_transformer
from lowmem_drf.models.sd3.published import empty_vae as empty_vae

__all__ = [
    "BLOCKS", "IMAGES", "KINDS", "KNOWN", "NAME", "NAMES", "as_velocity", "decoder", "drop_encoder", "empty_text",
    "empty_transformer", "empty_vae", "kind_of", "load_file", "load_text", "load_transformer", "load_vae",
    "lora_header", "parameter_shapes", "pipeline", "probe", "refuse", "set_activations", "sizes", "stream_text",
    "verdicts",
]  # fmt: skip

_NORMS = ("attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k", "attn2.norm_q", "attn2.norm_k")
_TIME = (f"time_text_embed.{part}_embedder.linear_{i}" for part in ("timestep", "text") for i in (1, 2))
IMAGES: Images | None = None
NAMES = ModuleNames(
    linears={name: name for name in LINEARS},
    in_block={name: name for name in (*LINEARS, *_NORMS, "norm1.linear", "norm1_context.linear")},
    outside={name: name for name in (*_TIME, "pos_embed.proj", "context_embedder", "norm_out.linear", "proj_out")},
    comfyui="transformer",
    kohya=False,
)
"""diffusers' own: an original checkpoint has query, key and value in one layer. ComfyUI reads LoRAs of this model by
diffusers' names (``comfy/lora.py``), ``StableDiffusion3Pipeline`` no others."""


def pipeline(transformer: Any) -> Any:
    """``StableDiffusion3Pipeline`` around the transformer alone."""
    from diffusers import StableDiffusion3Pipeline

    absent = dict.fromkeys(
        f"{kind}{end}" for kind in ("text_encoder", "tokenizer") for end in ("", "_2", "_3")
    )  # fmt: skip
    pipe = StableDiffusion3Pipeline(transformer=transformer, vae=None, scheduler=None, **absent)
    pipe.load_lora_into_text_encoder = lambda *arguments, **options: None  # there is none, which it would warn of
    return pipe


def lora_header(generator: GeneratorConfig) -> LoraHeader:
    """The same for all."""
    return LoraHeader("stable-diffusion-3", "https://github.com/Stability-AI/sd3.5")


def kind_of(names: Collection[str], complete: bool) -> tuple[str, str] | None:
    """No names tell relatives apart yet."""
    return None


def verdicts(lora: LoraChanges, header: Mapping[str, Any]) -> list[Verdict]:
    """None yet: an export is verified with diffusers, and no other program's reader was compared."""
    return []
