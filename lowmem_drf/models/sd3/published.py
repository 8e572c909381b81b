"""Stable Diffusion 3.5 medium, at true size without a download, and its empty models.

Written down from its publishers' ``config.json`` files; ``parameters`` counts each tensor once. The table of positions,
a buffer in diffusers, is in the checkpoint and a frozen parameter here, so that it is read, moved and counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lowmem_drf.errors import BadInputError
from lowmem_drf.models.family import GeneratorConfig, GeneratorSizes, KnownGenerator
from lowmem_drf.models.t5 import T5_XXL
from lowmem_drf.models.weights.quant import Quant, check_quantised, lay_out, require_library

NAME = "Stable Diffusion 3.5"
BLOCKS = "transformer_blocks"
KINDS: Mapping[str, str] = {
    "transformer": "SD3Transformer2DModel",
    "vae": "AutoencoderKL",
    "text_encoder": "clip_text_model",
    "text_encoder_2": "clip_text_model",
    "text_encoder_3": "t5",
}
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_OF_TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_FEED = ("net.0.proj", "net.2")
LINEARS = (
    *(f"{attention}.{name}" for attention in ("attn", "attn2") for name in _ATTENTION),
    *(f"attn.{name}" for name in _OF_TEXT),
    *(f"{feed}.{name}" for feed in ("ff", "ff_context") for name in _FEED),
)
"""The linear layers of a block that has all of them: some have one attention, and the last passes no text on."""

_TRANSFORMER = {
    "_class_name": KINDS["transformer"], "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16,
    "num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
    "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)), "qk_norm": "rms_norm",
}  # fmt: skip

_VAE = {
    "_class_name": KINDS["vae"], "in_channels": 3, "out_channels": 3, "latent_channels": 16, "sample_size": 1024,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "act_fn": "silu", "norm_num_groups": 32,
    "scaling_factor": 1.5305, "shift_factor": 0.0609, "force_upcast": True, "use_quant_conv": False,
    "use_post_quant_conv": False,
}  # fmt: skip

_CLIP = {
    "architectures": ["CLIPTextModelWithProjection"], "model_type": KINDS["text_encoder"], "vocab_size": 49408,
    "max_position_embeddings": 77, "layer_norm_eps": 1e-05, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip
_CLIP_L = {
    "hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12, "hidden_act": "quick_gelu",
}  # fmt: skip
_CLIP_G = {
    "hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1280, "num_hidden_layers": 32,
    "num_attention_heads": 20, "hidden_act": "gelu",
}  # fmt: skip

_MEDIUM = KnownGenerator(
    GeneratorConfig(
        _TRANSFORMER, _VAE, _CLIP | _CLIP_L, more_text={"text_encoder_2": _CLIP | _CLIP_G, "text_encoder_3": T5_XXL}
    ),
    {
        "transformer": 2_469_663_936, "vae": 83_819_683, "text": 123_650_304, "text_encoder_2": 694_659_840,
        "text_encoder_3": 4_762_310_656,
    },
)  # fmt: skip
KNOWN: Mapping[str, KnownGenerator] = {
    "stabilityai/stable-diffusion-3.5-medium": _MEDIUM,
    "tensorart/stable-diffusion-3.5-medium-turbo": _MEDIUM,
}


def refuse(generator: GeneratorConfig, place: str) -> None:
    """Raises BadInputError for a transformer without a table of positions or with text of another width than its own,
    and for a VAE with a layer before its decoder: those of other models."""
    transformer, vae = generator.transformer, generator.vae
    cure = "Take Stable Diffusion 3 or 3.5, such as tensorart/stable-diffusion-3.5-medium-turbo."
    text = transformer["caption_projection_dim"]
    width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    if not transformer.get("pos_embed_max_size") or text != width:
        raise BadInputError(
            f"The transformer of {place} has no table of positions, or its text has {text} numbers a token "
            f"and its image {width}, which is not trained here. {cure}"
        )
    if vae.get("use_post_quant_conv", True):
        raise BadInputError(f"The VAE of {place} has a layer before its decoder, which is not trained here. {cure}")


def sizes(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> GeneratorSizes:
    """See ``GeneratorSizes``."""
    heads, head_dim = transformer["num_attention_heads"], transformer["attention_head_dim"]
    patch = transformer["patch_size"]
    return GeneratorSizes(
        channels=transformer["in_channels"], spatial=2 ** (len(vae["block_out_channels"]) - 1), temporal=0,
        patch=(1, patch, patch), positions=transformer["pos_embed_max_size"], heads=heads, head_dim=head_dim,
        hidden=4 * heads * head_dim, text_dim=transformer["joint_attention_dim"],
        vae_widths=tuple(vae["block_out_channels"]), vae_patch=1,
    )  # fmt: skip


def probe(transformer: Mapping[str, Any], side: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of latents and of text embeddings."""
    pixels = side * transformer["patch_size"]
    return (1, transformer["in_channels"], 1, pixels, pixels), (1, 16, transformer["joint_attention_dim"])


def parameter_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the transformer's parameters by name, from its ``config.json``."""
    head, patch, last = config["attention_head_dim"], config["patch_size"], config["num_layers"] - 1
    width, dual = config["num_attention_heads"] * head, set(config.get("dual_attention_layers") or ())
    layers: dict[str, tuple[int, ...]] = {
        "pos_embed.proj": (width, config["in_channels"], patch, patch),
        "time_text_embed.timestep_embedder.linear_1": (width, 256),
        "time_text_embed.timestep_embedder.linear_2": (width, width),
        "time_text_embed.text_embedder.linear_1": (width, config["pooled_projection_dim"]),
        "time_text_embed.text_embedder.linear_2": (width, width),
        "context_embedder": (width, config["joint_attention_dim"]),
        "norm_out.linear": (2 * width, width),
        "proj_out": (patch * patch * config["out_channels"], width),
    }
    shapes: dict[str, tuple[int, ...]] = {"pos_embed.pos_embed": (1, config["pos_embed_max_size"] ** 2, width)}
    norms = ("q", "k", "added_q", "added_k") if config.get("qk_norm") else ()
    for i in range(last + 1):
        block = f"{BLOCKS}.{i}"
        layers[f"{block}.norm1.linear"] = ((9 if i in dual else 6) * width, width)
        layers[f"{block}.norm1_context.linear"] = ((2 if i == last else 6) * width, width)
        absent = (*(() if i in dual else ("attn2.",)), *(("attn.to_add_out", "ff_context.") if i == last else ()))
        for name in LINEARS:
            if not name.startswith(absent):
                out, into = (4 if name.endswith("proj") and "net" in name else 1), 4 if name.endswith("net.2") else 1
                layers[f"{block}.{name}"] = (out * width, into * width)
        shapes |= {f"{block}.attn.norm_{x}.weight": (head,) for x in norms}
        shapes |= {f"{block}.attn2.norm_{x}.weight": (head,) for x in norms[:2] if i in dual}
    shapes |= {f"{name}.weight": shape for name, shape in layers.items()}
    return shapes | {f"{name}.bias": shape[:1] for name, shape in layers.items()}


def empty_transformer(config: Mapping[str, Any], layers: int | None = None, quant: Quant = "none") -> Any:
    """The transformer on ``meta``. Raises BadInputError if bitsandbytes is missing."""
    from diffusers import SD3Transformer2DModel

    require_library(quant, "model.quant", ("none", "nf4", "int8"))
    fewer = {} if layers is None else {"num_layers": min(layers, config["num_layers"])}
    with torch.device("meta"):
        model = SD3Transformer2DModel.from_config({**config, **fewer})
        positions = model.pos_embed.pos_embed
        del model.pos_embed.pos_embed
        model.pos_embed.pos_embed = torch.nn.Parameter(torch.empty(positions.shape), requires_grad=False)
    lay_out(model, quant, _packed)
    check_quantised(model, quant, _packed, "transformer")
    return model


def _packed(name: str) -> bool:
    """True if a linear layer of this name is packed: those of the blocks."""
    block, _, inner = name.removeprefix(f"{BLOCKS}.").partition(".")
    return name.startswith(f"{BLOCKS}.") and block.isdecimal() and inner in LINEARS


def empty_vae(config: Mapping[str, Any]) -> Any:
    """The VAE on ``meta``."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        return AutoencoderKL.from_config(dict(config))


def empty_text(config: Mapping[str, Any], layers: int | None = None) -> Any:
    """A text encoder on ``meta``: CLIP's or T5, by its ``config.json``; CLIP's numbers of positions have values."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    name = "num_layers" if config["model_type"] == "t5" else "num_hidden_layers"
    fewer = {} if layers is None else {name: min(layers, config[name])}
    with torch.device("meta"):
        if config["model_type"] == "t5":
            return T5EncoderModel(T5Config.from_dict({**config, **fewer}))
        model = CLIPTextModelWithProjection(CLIPTextConfig.from_dict({**config, **fewer}))
    numbers = torch.arange(config["max_position_embeddings"]).expand(1, -1)
    model.text_model.embeddings.register_buffer("position_ids", numbers, persistent=False)
    return model
