"""LTX-Video as a ``models.family.Family``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lowmem_drf.models.family import GeneratorConfig, Images, LoraHeader, ModuleNames, Verdict
from lowmem_drf.models.lora.changes import LoraChanges
from lowmem_drf.models.ltx.decoder import LTXDecoder as decoder
from lowmem_drf.models.ltx.denoiser import as_velocity, set_activations
from lowmem_drf.models.ltx.loading import drop_encoder, load_file, load_text, load_transformer, load_vae, stream_text
from lowmem_drf.models.ltx.published import BLOCKS, KINDS, KNOWN, LINEARS, NAME, parameter_shapes, probe, refuse, sizes
from lowmem_drf.models.ltx.published import empty_text as empty_text
from lowmem_drf.models.ltx.published import empty_transformer as empty_transformer
from lowmem_drf.models.ltx.published import empty_vae as empty_vae

__all__ = [
    "BLOCKS", "IMAGES", "KINDS", "KNOWN", "NAME", "NAMES", "as_velocity", "decoder", "drop_encoder", "empty_text",
    "empty_transformer", "empty_vae", "kind_of", "load_file", "load_text", "load_transformer", "load_vae",
    "lora_header", "parameter_shapes", "pipeline", "probe", "refuse", "set_activations", "sizes", "stream_text",
    "verdicts",
]  # fmt: skip

_NORMS = {f"attn{i}.norm_{x}": f"attn{i}.{x}_norm" for i in (1, 2) for x in "qk"}
_TIME = ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear")
_SAME = ("caption_projection.linear_1", "caption_projection.linear_2", "proj_out", "scale_shift_table")
IMAGES: Images | None = None
NAMES = ModuleNames(
    linears={name: name for name in LINEARS},
    in_block={name: name for name in (*LINEARS, "scale_shift_table")} | _NORMS,
    outside={name: name for name in _SAME}
    | {"proj_in": "patchify_proj"}
    | {f"time_embed.{name}": f"adaln_single.{name}" for name in _TIME},
    kohya=False,
)
"""Lightricks' own by ``scripts/convert_ltx_to_diffusers.py`` of diffusers. ``LTXPipeline`` reads no kohya files."""


def pipeline(transformer: Any) -> Any:
    """``LTXPipeline`` around the transformer alone."""
    from diffusers import LTXPipeline

    return LTXPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=transformer)


def lora_header(generator: GeneratorConfig) -> LoraHeader:
    """The same for all."""
    return LoraHeader("ltxv", "https://github.com/Lightricks/LTX-Video")


def kind_of(names: Collection[str], complete: bool) -> tuple[str, str] | None:
    """No names tell relatives apart yet."""
    return None


def verdicts(lora: LoraChanges, header: Mapping[str, Any]) -> list[Verdict]:
    """None yet: an export is verified with diffusers, and no other program's reader was compared."""
    return []
