"""Configurations of video generators: published ones at true size without a download, and any that is on this machine.

The published ones were written down from memory. A test compares Wan2.1-14B's transformer and Wan2.1's VAE to the
defaults of diffusers 0.42.1; the others are not checked offline. They serve random and fake weights, the plan, and
single-file transformers, which must fit tensor by tensor. ``parameters`` counts each tensor once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem_drf.errors import BadInputError, quoted
from lowmem_drf.models.weights.files import MODEL_INDEX, SECOND, has_second, read_model_index
from lowmem_drf.models.weights.sources import resolve
from lowmem_drf.texts import parse_json

SUBFOLDERS = {"transformer": "transformer", "vae": "vae", "text": "text_encoder"}
"""Field of ``GeneratorConfig`` -> subfolder of a diffusers model."""
_KINDS = {
    "transformer": "WanTransformer3DModel",
    SECOND: "WanTransformer3DModel",
    "vae": "AutoencoderKLWan",
    "text_encoder": "umt5",
}
"""Subfolder -> ``_class_name`` (diffusers) or ``model_type`` (transformers)."""


@dataclass(frozen=True)
class GeneratorConfig:
    """The ``config.json`` files of a generator's models, and its ``model_index.json``."""

    transformer: dict[str, Any]
    vae: dict[str, Any]
    text: dict[str, Any]
    transformer_2: dict[str, Any] | None = None
    """The low-noise expert if there are two (``wan/experts.py``); ``transformer`` is then the high-noise one."""
    boundary: float | None = None
    """``boundary_ratio`` between two experts, in (0, 1)."""


@dataclass(frozen=True)
class KnownGenerator:
    """A published generator: its configuration, and the parameters of each model by field name."""

    config: GeneratorConfig
    parameters: Mapping[str, int]


def _transformer(heads: int, ffn: int, layers: int, channels: int) -> dict[str, Any]:
    return {
        "_class_name": _KINDS["transformer"], "patch_size": [1, 2, 2], "num_attention_heads": heads,
        "attention_head_dim": 128, "in_channels": channels, "out_channels": channels, "text_dim": 4096, "freq_dim": 256,
        "ffn_dim": ffn, "num_layers": layers, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-06,
        "added_kv_proj_dim": None, "image_dim": None, "rope_max_seq_len": 1024,
    }  # fmt: skip


_UMT5_XXL = {
    "architectures": ["UMT5EncoderModel"], "model_type": _KINDS["text_encoder"], "vocab_size": 256384, "d_model": 4096,
    "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_decoder_layers": 24, "num_heads": 64,
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-06, "feed_forward_proj": "gated-gelu", "pad_token_id": 0, "eos_token_id": 1,
    "decoder_start_token_id": 0,
}  # fmt: skip

_VAE = {
    "_class_name": _KINDS["vae"], "base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
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

_TEXT_PARAMETERS = 5_680_910_336

KNOWN_GENERATORS: dict[str, KnownGenerator] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": KnownGenerator(
        GeneratorConfig(_transformer(heads=12, ffn=8960, layers=30, channels=16), _VAE, _UMT5_XXL),
        {"transformer": 1_418_996_800, "vae": 126_892_531, "text": _TEXT_PARAMETERS},
    ),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": KnownGenerator(
        GeneratorConfig(_WAN_14B, _VAE, _UMT5_XXL),
        {"transformer": 14_288_491_584, "vae": 126_892_531, "text": _TEXT_PARAMETERS},
    ),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": KnownGenerator(
        GeneratorConfig(_transformer(heads=24, ffn=14336, layers=30, channels=48), _VAE_2_2, _UMT5_XXL),
        {"transformer": 4_999_787_712, "vae": 704_688_668, "text": _TEXT_PARAMETERS},
    ),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": KnownGenerator(
        GeneratorConfig(_WAN_14B, _VAE, _UMT5_XXL, _WAN_14B, boundary=0.875),
        {"transformer": 14_288_491_584, "transformer_2": 14_288_491_584, "vae": 126_892_531, "text": _TEXT_PARAMETERS},
    ),
}


def transformer_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of a text-to-video transformer's parameters by name, from its ``config.json``. To make the model, also
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
    shapes |= {f"{name}.weight": shape for name, shape in layers.items()}
    return shapes | {f"{name}.bias": shape[:1] for name, shape in layers.items()}


def generator_config(folder_or_id: str) -> GeneratorConfig:
    """The configuration of a generator, without its weights and without the network.

    ``folder_or_id``: ``toyworld``, a diffusers folder, or a hub id that is in the hub's cache or in
    ``KNOWN_GENERATORS``.

    Raises BadInputError: the configuration is not on this machine, cannot be read, or is not that of a Wan generator.
    """
    place = resolve(folder_or_id, "generator")

    def find(name: str) -> Path | None:
        return Path(place) / name if Path(place).is_dir() else _cached(place, name)

    files = [find(f"{subfolder}/config.json") for subfolder in SUBFOLDERS.values()]
    index = find(MODEL_INDEX)
    if index is not None and None not in files:
        pairs = zip(SUBFOLDERS.items(), files, strict=True)
        models = {field: _read(subfolder, file, place) for (field, subfolder), file in pairs if file is not None}
        _refuse_image_to_video(models, place)
        boundary = _boundary(read_model_index(index))
        second = find(f"{SECOND}/config.json") if boundary is not None else None
        if boundary is None or second is not None:
            expert = None if second is None else _read(SECOND, second, place)
            return GeneratorConfig(models["transformer"], models["vae"], models["text"], expert, boundary)
    if place in KNOWN_GENERATORS:
        return KNOWN_GENERATORS[place].config
    raise BadInputError(
        f"No configuration of {place!r} is on this machine, neither as a folder nor in the hub's cache. If it is an id "
        "on the Hugging Face hub, get its configuration (a few kilobytes): "
        f"hf download {quoted(place)} --include '*.json'\n"
        f"Or give a folder in diffusers layout, or one of: {', '.join(KNOWN_GENERATORS)}."
    )


def _cached(hub_id: str, name: str) -> Path | None:
    """A file in the hub's cache, or ``None``."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(hub_id, name)
    except HFValidationError:  # not an id, so a folder that does not exist
        return None
    return Path(cached) if isinstance(cached, str) else None


def _refuse_image_to_video(models: Mapping[str, dict[str, Any]], place: str) -> None:
    taken, made = models["transformer"].get("in_channels"), models["vae"].get("z_dim")
    if taken != made:
        raise BadInputError(
            f"The transformer of {place} takes {taken} channels, and its VAE's latents have {made}: it is an "
            "image-to-video model. Take a text-to-video one."
        )


def _boundary(index: Mapping[str, Any]) -> float | None:
    """``boundary_ratio`` if there are two experts. Without it diffusers never calls a second transformer."""
    ratio = index.get("boundary_ratio")
    if ratio is None:
        return None
    if not isinstance(ratio, float) or not 0 < ratio < 1 or not has_second(index):
        raise BadInputError(
            f"{MODEL_INDEX} has boundary_ratio = {ratio!r}: it is to be a number between 0 and 1, beside a {SECOND}."
        )
    return ratio


def _read(subfolder: str, file: Path, place: str) -> dict[str, Any]:
    if not file.is_file():
        raise BadInputError(f"{place} lacks {subfolder}/config.json: give the complete folder of a diffusers model.")
    try:
        config: dict[str, Any] = parse_json(file.read_bytes())
        kind = config.get("_class_name") or config.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise BadInputError(f"{file} cannot be read as a configuration ({error}). Get it anew.") from error
    if kind != _KINDS[subfolder]:
        raise BadInputError(
            f"{place} holds a {kind} in {subfolder}, and a {_KINDS[subfolder]} is expected there: this program trains "
            "Wan's text-to-video models."
        )
    return config
