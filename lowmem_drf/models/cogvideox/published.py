"""CogVideoX's published text-to-video generators of the first version, at true size without a download, and their empty
models.

2B's transformer and VAE are the defaults of diffusers 0.42.1, to which a test compares them. 5B differs from it as
``scripts/convert_cogvideox_to_diffusers.py`` of diffusers says. ``parameters`` counts each tensor once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lowmem_drf.errors import BadInputError
from lowmem_drf.models.family import GeneratorConfig, GeneratorSizes, KnownGenerator
from lowmem_drf.models.t5 import T5_XXL
from lowmem_drf.models.weights.quant import Quant, check_quantised, lay_out, require_library

NAME = "CogVideoX"
BLOCKS = "transformer_blocks"
KINDS: Mapping[str, str] = {
    "transformer": "CogVideoXTransformer3DModel",
    "vae": "AutoencoderKLCogVideoX",
    "text_encoder": "t5",
}
LINEARS = (*(f"attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")), "ff.net.0.proj", "ff.net.2")
"""The linear layers of a block that take a LoRA, and are packed."""
MODULATIONS = ("norm1.linear", "norm2.linear")
"""Those that make scales and shifts of the time."""

_TRANSFORMER = {
    "_class_name": KINDS["transformer"], "num_attention_heads": 30, "attention_head_dim": 64, "in_channels": 16,
    "out_channels": 16, "flip_sin_to_cos": True, "freq_shift": 0, "time_embed_dim": 512, "ofs_embed_dim": None,
    "text_embed_dim": 4096, "num_layers": 30, "dropout": 0.0, "attention_bias": True, "sample_width": 90,
    "sample_height": 60, "sample_frames": 49, "patch_size": 2, "patch_size_t": None, "temporal_compression_ratio": 4,
    "max_text_seq_length": 226, "activation_fn": "gelu-approximate", "timestep_activation_fn": "silu",
    "norm_elementwise_affine": True, "norm_eps": 1e-05, "spatial_interpolation_scale": 1.875,
    "temporal_interpolation_scale": 1.0, "use_rotary_positional_embeddings": False,
    "use_learned_positional_embeddings": False, "patch_bias": True,
}  # fmt: skip
_5B = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}

_VAE = {
    "_class_name": KINDS["vae"], "in_channels": 3, "out_channels": 3, "block_out_channels": [128, 256, 256, 512],
    "latent_channels": 16, "layers_per_block": 3, "act_fn": "silu", "norm_eps": 1e-06, "norm_num_groups": 32,
    "temporal_compression_ratio": 4, "sample_height": 480, "sample_width": 720, "scaling_factor": 1.15258426,
    "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip

_OTHERS = {"vae": 215_583_907, "text": 4_762_310_656}
KNOWN: Mapping[str, KnownGenerator] = {
    "zai-org/CogVideoX-2b": KnownGenerator(
        GeneratorConfig(_TRANSFORMER, _VAE, T5_XXL), {"transformer": 1_693_783_872, **_OTHERS}
    ),
    "zai-org/CogVideoX-5b": KnownGenerator(
        GeneratorConfig(_TRANSFORMER | _5B, _VAE | {"scaling_factor": 0.7}, T5_XXL),
        {"transformer": 5_570_283_072, **_OTHERS},
    ),
}


def snr_shift(transformer: Mapping[str, Any]) -> float:
    """``snr_shift_scale`` of the scheduler that 2B or 5B was trained with. They are told apart by their positions."""
    return 1.0 if transformer.get("use_rotary_positional_embeddings") else 3.0


def refuse(generator: GeneratorConfig, place: str) -> None:
    """Raises BadInputError for image-to-video models, for version 1.5, whose tokens hold two latent frames, and for a
    VAE with a layer before the decoder."""
    transformer = generator.transformer
    cure = f"Take a text-to-video model of the first version: {' or '.join(KNOWN)}."
    channels = (transformer.get("in_channels", 16), transformer.get("out_channels", 16))
    if channels[0] != channels[1] or transformer.get("use_learned_positional_embeddings"):
        raise BadInputError(f"The transformer of {place} takes an image, which is not trained here. {cure}")
    if transformer.get("patch_size_t"):
        raise BadInputError(
            f"The transformer of {place} has tokens of several latent frames, as CogVideoX 1.5: it is not trained here "
            f"yet. {cure}"
        )
    if generator.vae.get("use_post_quant_conv"):
        raise BadInputError(f"The VAE of {place} has a post_quant_conv, which is not decoded here. {cure}")


def sizes(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> GeneratorSizes:
    """See ``GeneratorSizes``. 2B's positions are made for any size, 5B's turn by any angle: there is no table that
    ends, and ``positions`` only keeps typing errors out."""
    heads, head_dim = transformer["num_attention_heads"], transformer["attention_head_dim"]
    patch = transformer["patch_size"]
    return GeneratorSizes(
        channels=transformer["in_channels"], spatial=2 ** (len(vae["block_out_channels"]) - 1),
        temporal=vae["temporal_compression_ratio"], patch=(1, patch, patch), positions=1024, heads=heads,
        head_dim=head_dim, hidden=4 * heads * head_dim, text_dim=transformer["text_embed_dim"],
        vae_widths=tuple(vae["block_out_channels"]), vae_patch=1, vae_group=2,
    )  # fmt: skip


def probe(transformer: Mapping[str, Any], side: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of latents and of text embeddings."""
    patch, channels = transformer["patch_size"], transformer["in_channels"]
    text = (1, transformer["max_text_seq_length"], transformer["text_embed_dim"])
    return (1, channels, 2, patch * side, patch * side), text


def parameter_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the transformer's parameters by name, from its ``config.json``."""
    head_dim, time, patch = config["attention_head_dim"], config["time_embed_dim"], config["patch_size"]
    width = config["num_attention_heads"] * head_dim
    layers: dict[str, tuple[int, ...]] = {
        "patch_embed.proj": (width, config["in_channels"], patch, patch),
        "patch_embed.text_proj": (width, config["text_embed_dim"]),
        "time_embedding.linear_1": (time, width),
        "time_embedding.linear_2": (time, time),
        "norm_out.linear": (2 * width, time),
        "proj_out": (patch**2 * config["out_channels"], width),
    }
    norms = {"norm_final": width, "norm_out.norm": width}
    for i in range(config["num_layers"]):
        block = f"{BLOCKS}.{i}"
        norms |= {f"{block}.attn1.norm_{x}": head_dim for x in "qk"} | {f"{block}.norm{j}.norm": width for j in (1, 2)}
        layers |= {f"{block}.{name}": (6 * width, time) for name in MODULATIONS}
        layers |= {f"{block}.{name}": (width, width) for name in LINEARS}
        layers |= {f"{block}.ff.net.0.proj": (4 * width, width), f"{block}.ff.net.2": (width, 4 * width)}
    shapes = {f"{name}.weight": shape for name, shape in layers.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    return shapes | {f"{name}.{x}": (size,) for name, size in norms.items() for x in ("weight", "bias")}


def empty_transformer(config: Mapping[str, Any], layers: int | None = None, quant: Quant = "none") -> Any:
    """The transformer on ``meta``, except 2B's table of positions, which no checkpoint holds. Raises BadInputError if
    bitsandbytes is missing."""
    from diffusers import CogVideoXTransformer3DModel

    require_library(quant, "model.quant", ("none", "nf4", "int8"))
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel.from_config(_with_layers(config, layers))
    embed: Any = model.patch_embed
    if embed.use_positional_embeddings:
        table = embed._get_positional_embeddings(embed.sample_height, embed.sample_width, embed.sample_frames)
        embed.pos_embedding = table.float()
    lay_out(model, quant, _packed)
    check_quantised(model, quant, _packed, "transformer")
    return model


def _packed(name: str) -> bool:
    """True if a linear layer of this name is packed: attention and feed-forward of the blocks."""
    block, _, inner = name.removeprefix(f"{BLOCKS}.").partition(".")
    return name.startswith(f"{BLOCKS}.") and block.isdecimal() and inner in LINEARS


def empty_vae(config: Mapping[str, Any]) -> Any:
    """The VAE on ``meta``."""
    from diffusers import AutoencoderKLCogVideoX

    with torch.device("meta"):
        return AutoencoderKLCogVideoX.from_config(dict(config))


def empty_text(config: Mapping[str, Any], layers: int | None = None) -> Any:
    """The text encoder on ``meta``."""
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        return T5EncoderModel(T5Config.from_dict(_with_layers(config, layers)))


def _with_layers(config: Mapping[str, Any], most: int | None) -> dict[str, Any]:
    return {**config, **({} if most is None else {"num_layers": min(most, config["num_layers"])})}
