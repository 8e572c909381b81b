"""Wan's published generators, at true size without a download.

They were written down from memory. A test compares Wan2.1-14B's transformer and Wan2.1's VAE to the defaults of
diffusers 0.42.1; the others are not checked offline. ``parameters`` counts each tensor once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lowmem_drf.errors import BadInputError
from lowmem_drf.models.family import GeneratorConfig, GeneratorSizes, KnownGenerator

TINY_DECODERS = {16: "Kijai/WanVideo_comfy/taew2_1.safetensors", 48: "Kijai/WanVideo_comfy/taew2_2.safetensors"}
"""By the latents' channels: TAEHV's files for the VAEs of Wan 2.1 (which Wan2.2-A14B has too) and Wan2.2-TI2V-5B."""

KINDS: Mapping[str, str] = {
    "transformer": "WanTransformer3DModel",
    "vae": "AutoencoderKLWan",
    "text_encoder": "umt5",
    "image_encoder": "clip_vision_model",
}


def _transformer(heads: int, ffn: int, layers: int, channels: int) -> dict[str, Any]:
    return {
        "_class_name": KINDS["transformer"], "patch_size": [1, 2, 2], "num_attention_heads": heads,
        "attention_head_dim": 128, "in_channels": channels, "out_channels": channels, "text_dim": 4096, "freq_dim": 256,
        "ffn_dim": ffn, "num_layers": layers, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-06,
        "added_kv_proj_dim": None, "image_dim": None, "rope_max_seq_len": 1024,
    }  # fmt: skip


_UMT5_XXL = {
    "architectures": ["UMT5EncoderModel"], "model_type": KINDS["text_encoder"], "vocab_size": 256384, "d_model": 4096,
    "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_decoder_layers": 24, "num_heads": 64,
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-06, "feed_forward_proj": "gated-gelu", "pad_token_id": 0, "eos_token_id": 1,
    "decoder_start_token_id": 0,
}  # fmt: skip

_VAE = {
    "_class_name": KINDS["vae"], "base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
    "attn_scales": [], "temperal_downsample": [False, True, True], "dropout": 0.0,
    "latents_mean": [
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    ],
    "latents_std": [
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916),
    ],
}  # fmt: skip

_VAE_2_2 = _VAE | {
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12,
    "patch_size": 2, "scale_factor_spatial": 16, "scale_factor_temporal": 4,
    "latents_mean": [
        *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891),
        *(0.157, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
        *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.123, -0.0313, -0.1649, 0.0117, 0.0723),
        *(-0.2839, -0.2083, -0.052, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
    ],
    "latents_std": [
        *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901),
        *(0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
        *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944),
        *(0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.06, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
    ],
}  # fmt: skip

_WAN_14B = _transformer(heads=40, ffn=13824, layers=40, channels=16)
_WAN_14B_IMAGE = _WAN_14B | {"in_channels": 36}
_WAN_14B_TOKENS = _WAN_14B_IMAGE | {"image_dim": 1280, "added_kv_proj_dim": 5120}

_CLIP_H = {
    "architectures": ["CLIPVisionModel"], "model_type": KINDS["image_encoder"], "hidden_size": 1280,
    "intermediate_size": 5120, "projection_dim": 1024, "num_hidden_layers": 32, "num_attention_heads": 16,
    "num_channels": 3, "image_size": 224, "patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-05,
}  # fmt: skip

_TRAINED = "Take a text-to-video model, or an image-to-video one that takes a first image (2.1-I2V, 2.2-I2V, TI2V)."

_TEXT_PARAMETERS = 5_680_910_336

KNOWN: Mapping[str, KnownGenerator] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": KnownGenerator(
        GeneratorConfig(_transformer(heads=12, ffn=8960, layers=30, channels=16), _VAE, _UMT5_XXL),
        {"transformer": 1_418_996_800, "vae": 126_892_531, "text": _TEXT_PARAMETERS},
    ),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": KnownGenerator(
        GeneratorConfig(_WAN_14B, _VAE, _UMT5_XXL),
        {"transformer": 14_288_491_584, "vae": 126_892_531, "text": _TEXT_PARAMETERS},
    ),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": KnownGenerator(
        GeneratorConfig(
            _transformer(heads=24, ffn=14336, layers=30, channels=48), _VAE_2_2, _UMT5_XXL, first_frame=True
        ),
        {"transformer": 4_999_787_712, "vae": 704_688_668, "text": _TEXT_PARAMETERS},
    ),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": KnownGenerator(
        GeneratorConfig(_WAN_14B, _VAE, _UMT5_XXL, _WAN_14B, boundary=0.875),
        {"transformer": 14_288_491_584, "transformer_2": 14_288_491_584, "vae": 126_892_531, "text": _TEXT_PARAMETERS},
    ),
    **dict.fromkeys(
        ("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"),
        KnownGenerator(
            GeneratorConfig(_WAN_14B_TOKENS, _VAE, _UMT5_XXL, image=_CLIP_H),
            {"transformer": 16_394_878_784, "vae": 126_892_531, "text": _TEXT_PARAMETERS, "image": 630_766_080},
        ),
    ),
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": KnownGenerator(
        GeneratorConfig(_WAN_14B_IMAGE, _VAE, _UMT5_XXL, _WAN_14B_IMAGE, boundary=0.9),
        {"transformer": 14_288_901_184, "transformer_2": 14_288_901_184, "vae": 126_892_531, "text": _TEXT_PARAMETERS},
    ),
}


def sizes(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> GeneratorSizes:
    """See ``GeneratorSizes``."""
    width = vae.get("decoder_base_dim") or vae["base_dim"]
    first, second, third = transformer["patch_size"]
    return GeneratorSizes(
        channels=vae["z_dim"],
        spatial=vae.get("scale_factor_spatial", 8),
        temporal=vae.get("scale_factor_temporal", 4),
        patch=(first, second, third),
        positions=transformer.get("rope_max_seq_len", 1024),
        heads=transformer["num_attention_heads"],
        head_dim=transformer["attention_head_dim"],
        hidden=transformer["ffn_dim"],
        text_dim=transformer["text_dim"],
        vae_widths=tuple(width * factor for factor in vae["dim_mult"]),
        vae_patch=vae.get("patch_size") or 1,
        tiny_decoder=TINY_DECODERS.get(vae["z_dim"], ""),
    )


def probe(transformer: Mapping[str, Any], side: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of latents, text embeddings, and an image's latents and tokens. Where there are tokens, diffusers takes
    the last 512 rows for the text."""
    frames, height, width = transformer["patch_size"]
    sides, width_of_tokens = (2 * frames, side * height, side * width), transformer.get("image_dim")
    made, taken = transformer["out_channels"], transformer["in_channels"]
    text = (1, 512 if width_of_tokens else 16, transformer["text_dim"])
    image = [(1, taken - made, *sides)] if taken > made else []
    return (1, made, *sides), text, *image, *([(1, 4, width_of_tokens)] if width_of_tokens else [])


def parameter_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of a transformer's parameters by name, from its ``config.json``. To make the model, also
    without memory, takes the seconds in which diffusers is imported."""
    width, hidden, patch = (
        config["num_attention_heads"] * config["attention_head_dim"],
        config["ffn_dim"],
        config["patch_size"],
    )
    embedder, taken, made = "condition_embedder", config["in_channels"], config["out_channels"]
    attention = {f"attn{i}.{x}": (width, width) for i in (1, 2) for x in ("to_q", "to_k", "to_v", "to_out.0")}
    in_block = {**attention, "ffn.net.0.proj": (hidden, width), "ffn.net.2": (width, hidden)}
    numbers = range(config["num_layers"])
    layers = {
        "patch_embedding": (width, taken, *patch),
        f"{embedder}.time_embedder.linear_1": (width, config["freq_dim"]),
        f"{embedder}.time_embedder.linear_2": (width, width),
        f"{embedder}.time_proj": (6 * width, width),
        f"{embedder}.text_embedder.linear_1": (width, config["text_dim"]),
        f"{embedder}.text_embedder.linear_2": (width, width),
        "proj_out": (made * math.prod(patch), width),
        **{f"blocks.{i}.{name}": shape for i in numbers for name, shape in in_block.items()},
        **({f"blocks.{i}.norm2": (width,) for i in numbers} if config["cross_attn_norm"] else {}),
    }
    shapes: dict[str, tuple[int, ...]] = {"scale_shift_table": (1, 2, width)}
    shapes |= {f"blocks.{i}.scale_shift_table": (1, 6, width) for i in numbers}
    shapes |= {f"blocks.{i}.attn{j}.norm_{x}.weight": (width,) for i in numbers for j in (1, 2) for x in "qk"}
    if tokens := config.get("image_dim"):
        image = f"{embedder}.image_embedder"
        layers |= {f"{image}.norm1": (tokens,), f"{image}.norm2": (width,)}
        layers |= {f"{image}.ff.net.0.proj": (tokens, tokens), f"{image}.ff.net.2": (width, tokens)}
    if added := config.get("added_kv_proj_dim"):
        layers |= {f"blocks.{i}.attn2.add_{x}_proj": (width, added) for i in numbers for x in "kv"}
        shapes |= {f"blocks.{i}.attn2.norm_added_k.weight": (width,) for i in numbers}
    shapes |= {f"{name}.weight": shape for name, shape in layers.items()}
    return shapes | {f"{name}.bias": shape[:1] for name, shape in layers.items()}


def refuse(generator: GeneratorConfig, place: str) -> None:
    """Raises BadInputError for a model that takes something else than noise, text and a first image."""
    transformer, made = generator.transformer, generator.vae.get("z_dim")
    taken, tokens = transformer.get("in_channels"), transformer.get("image_dim")
    image = 2 * made + generator.vae.get("scale_factor_temporal", 4) if made else None
    if transformer.get("pos_embed_seq_len"):
        raise BadInputError(f"{place} makes clips between a first and a last image. {_TRAINED}")
    if taken not in ((image,) if tokens else (made, image)) or (generator.first_frame and taken != made):
        raise BadInputError(
            f"The transformer of {place} takes {taken} channels, and its VAE's latents have {made}: it is a control "
            f"model, or an image-to-video model of another kind. {_TRAINED}"
        )
    if tokens and generator.image is None:
        raise BadInputError(f"{place} lacks image_encoder, which its transformer needs: give the complete folder.")
