"""LTX-Video's published generators, at true size without a download, and their empty models: the 2B of 0.9.0, and the
13B of 0.9.7.

Transformer and VAE of 0.9.0 are the defaults of diffusers 0.42.1, to which a test compares them; those of 0.9.7 are
from ``scripts/convert_ltx_to_diffusers.py`` in its repository. The text encoder is T5 v1.1 XXL, written down from
memory. ``parameters`` counts each tensor once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lowmem_drf.errors import BadInputError
from lowmem_drf.models.family import GeneratorConfig, GeneratorSizes, KnownGenerator
from lowmem_drf.models.t5 import T5_XXL
from lowmem_drf.models.weights.quant import Quant, check_quantised, lay_out, require_library

NAME = "LTX-Video"
BLOCKS = "transformer_blocks"
SPATIAL, TEMPORAL = 32, 8
"""Pixels and frames of a latent, for which the transformer's positions are made: ``LTXPipeline``."""
KINDS: Mapping[str, str] = {
    "transformer": "LTXVideoTransformer3DModel",
    "vae": "AutoencoderKLLTXVideo",
    "text_encoder": "t5",
}
LINEARS = (
    *(f"attn{i}.{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *("ff.net.0.proj", "ff.net.2"),
)
"""The linear layers of a block."""

_TRANSFORMER = {
    "_class_name": KINDS["transformer"], "in_channels": 128, "out_channels": 128, "patch_size": 1, "patch_size_t": 1,
    "num_attention_heads": 32, "attention_head_dim": 64, "cross_attention_dim": 2048, "num_layers": 28,
    "activation_fn": "gelu-approximate", "qk_norm": "rms_norm_across_heads", "norm_elementwise_affine": False,
    "norm_eps": 1e-06, "caption_channels": 4096, "attention_bias": True, "attention_out_bias": True,
}  # fmt: skip

_VAE = {
    "_class_name": KINDS["vae"], "in_channels": 3, "out_channels": 3, "latent_channels": 128,
    "block_out_channels": [128, 256, 512, 512], "decoder_block_out_channels": [128, 256, 512, 512],
    "layers_per_block": [4, 3, 3, 3, 4], "decoder_layers_per_block": [4, 3, 3, 3, 4],
    "spatio_temporal_scaling": [True, True, True, False], "decoder_spatio_temporal_scaling": [True, True, True, False],
    "decoder_inject_noise": [False] * 5, "upsample_residual": [False] * 4, "upsample_factor": [1] * 4,
    "timestep_conditioning": False, "patch_size": 4, "patch_size_t": 1, "resnet_norm_eps": 1e-06,
    "scaling_factor": 1.0, "encoder_causal": True, "decoder_causal": False,
}  # fmt: skip

_TRANSFORMER_13B = _TRANSFORMER | {"attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48}

_VAE_097 = _VAE | {
    "block_out_channels": [128, 256, 512, 1024, 2048], "decoder_block_out_channels": [256, 512, 1024],
    "down_block_types": ["LTXVideo095DownBlock3D"] * 4, "layers_per_block": [4, 6, 6, 2, 2],
    "downsample_type": ["spatial", "temporal", "spatiotemporal", "spatiotemporal"],
    "decoder_layers_per_block": [5, 5, 5, 5], "spatio_temporal_scaling": [True] * 4,
    "decoder_spatio_temporal_scaling": [True] * 3, "decoder_inject_noise": [False] * 4,
    "upsample_residual": [True] * 3, "upsample_factor": [2, 2, 2], "timestep_conditioning": True,
    "spatial_compression_ratio": 32, "temporal_compression_ratio": 8,
}  # fmt: skip

_13B = KnownGenerator(
    GeneratorConfig(_TRANSFORMER_13B, _VAE_097, T5_XXL),
    {"transformer": 13_042_569_344, "vae": 1_246_913_522, "text": 4_762_310_656},
)
KNOWN: Mapping[str, KnownGenerator] = {
    "Lightricks/LTX-Video": KnownGenerator(
        GeneratorConfig(_TRANSFORMER, _VAE, T5_XXL),
        {"transformer": 1_923_385_472, "vae": 419_193_649, "text": 4_762_310_656},
    ),
    "Lightricks/LTX-Video-0.9.7-dev": _13B,
    "Lightricks/LTX-Video-0.9.7-distilled": _13B,
}


def is_13b(transformer: Mapping[str, Any]) -> bool:
    """Whether it is one of those that ``LTXConditionPipeline`` calls: in their positions the first latent frame lasts
    one frame."""
    return bool(transformer["attention_head_dim"] == _TRANSFORMER_13B["attention_head_dim"])


def refuse(generator: GeneratorConfig, place: str) -> None:
    """Raises BadInputError for the 2B of versions after 0.9.0, whose VAE decodes with a timestep (and, in 0.9.1, noise
    in its layers), for other factors than ``SPATIAL`` and ``TEMPORAL``, and for a transformer that packs several
    latents into a token."""
    transformer, vae = generator.transformer, generator.vae
    cure = "Take the first version's, in the main branch of Lightricks/LTX-Video, or the 13B of 0.9.7."
    newer = bool(vae.get("timestep_conditioning"))
    if any(vae.get("decoder_inject_noise", [])) or newer != is_13b(transformer):
        raise BadInputError(
            f"{place} is neither the 2B of 0.9.0 nor the 13B of 0.9.7: the VAEs of versions between them decode with a "
            f"timestep and noise, and are not trained here yet. {cure}"
        )
    if (factors := _factors(vae)) != (SPATIAL, TEMPORAL):
        raise BadInputError(
            f"The VAE of {place} makes {factors[1]} frames of {factors[0]} pixels of a latent, and the transformer's "
            f"positions are those of {TEMPORAL} frames of {SPATIAL} pixels. {cure}"
        )
    if (transformer.get("patch_size", 1), transformer.get("patch_size_t", 1), vae.get("patch_size_t", 1)) != (1, 1, 1):
        raise BadInputError(
            f"The transformer of {place} has tokens of several latents, which is not trained here. {cure}"
        )


def _factors(vae: Mapping[str, Any]) -> tuple[int, int]:
    doubled = 2 ** sum(vae["spatio_temporal_scaling"])
    spatial = vae.get("spatial_compression_ratio") or vae["patch_size"] * doubled
    return spatial, vae.get("temporal_compression_ratio") or vae["patch_size_t"] * doubled


def sizes(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> GeneratorSizes:
    """See ``GeneratorSizes``. Positions are real numbers, of seconds and pixels: there is no table that ends, and
    ``positions`` only keeps typing errors out."""
    heads, head_dim = transformer["num_attention_heads"], transformer["attention_head_dim"]
    (spatial, temporal), ones = _factors(vae), [1] * len(vae["decoder_block_out_channels"])
    return GeneratorSizes(
        channels=transformer["in_channels"], spatial=spatial, temporal=temporal, patch=(1, 1, 1), positions=1024,
        heads=heads, head_dim=head_dim, hidden=4 * heads * head_dim, text_dim=transformer["caption_channels"],
        vae_widths=tuple(
            width // factor
            for width, factor in zip(vae["decoder_block_out_channels"], vae.get("upsample_factor", ones), strict=True)
        ),
        vae_patch=vae["patch_size"],
    )  # fmt: skip


def probe(transformer: Mapping[str, Any], side: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of latents and of text embeddings."""
    return (1, transformer["in_channels"], 2, side, side), (1, 16, transformer["caption_channels"])


def parameter_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the transformer's parameters by name, from its ``config.json``."""
    width, text = config["num_attention_heads"] * config["attention_head_dim"], config["cross_attention_dim"]
    layers: dict[str, tuple[int, int]] = {
        "proj_in": (width, config["in_channels"]),
        "time_embed.emb.timestep_embedder.linear_1": (width, 256),
        "time_embed.emb.timestep_embedder.linear_2": (width, width),
        "time_embed.linear": (6 * width, width),
        "caption_projection.linear_1": (width, config["caption_channels"]),
        "caption_projection.linear_2": (width, width),
        "proj_out": (config["out_channels"], width),
    }
    shapes: dict[str, tuple[int, ...]] = {"scale_shift_table": (2, width)}
    for i in range(config["num_layers"]):
        block = f"{BLOCKS}.{i}"
        shapes |= {f"{block}.scale_shift_table": (6, width)}
        shapes |= {f"{block}.attn{j}.norm_{x}.weight": (width,) for j in (1, 2) for x in "qk"}
        into = {"attn2.to_k": text, "attn2.to_v": text, "ff.net.2": 4 * width}
        layers |= {
            f"{block}.{name}": (4 * width if name == "ff.net.0.proj" else width, into.get(name, width))
            for name in LINEARS
        }
    shapes |= {f"{name}.weight": shape for name, shape in layers.items()}
    return shapes | {f"{name}.bias": shape[:1] for name, shape in layers.items()}


def empty_transformer(config: Mapping[str, Any], layers: int | None = None, quant: Quant = "none") -> Any:
    """The transformer on ``meta``. Raises BadInputError if bitsandbytes is missing."""
    from diffusers import LTXVideoTransformer3DModel

    require_library(quant, "model.quant", ("none", "nf4", "int8"))
    with torch.device("meta"):
        model = LTXVideoTransformer3DModel.from_config(_with_layers(config, layers))
    lay_out(model, quant, _packed)
    check_quantised(model, quant, _packed, "transformer")
    return model


def _packed(name: str) -> bool:
    """True if a linear layer of this name is packed: those of the blocks."""
    block, _, inner = name.removeprefix(f"{BLOCKS}.").partition(".")
    return name.startswith(f"{BLOCKS}.") and block.isdecimal() and inner in LINEARS


def empty_vae(config: Mapping[str, Any]) -> Any:
    """The VAE on ``meta``, except mean and standard deviation of the latents, which are buffers: 0 and 1."""
    from diffusers import AutoencoderKLLTXVideo

    with torch.device("meta"):
        model = AutoencoderKLLTXVideo.from_config(dict(config))
    channels = model.config.latent_channels
    model.latents_mean, model.latents_std = torch.zeros(channels), torch.ones(channels)
    return model


def empty_text(config: Mapping[str, Any], layers: int | None = None) -> Any:
    """The text encoder on ``meta``."""
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        return T5EncoderModel(T5Config.from_dict(_with_layers(config, layers)))


def _with_layers(config: Mapping[str, Any], most: int | None) -> dict[str, Any]:
    return {**config, **({} if most is None else {"num_layers": min(most, config["num_layers"])})}
