"""Tiny Wan models whose clips begin with an image, of the three published kinds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from _tiny import (
    BOUNDARY,
    GENERATORS,
    TEMPORAL,
    Z_DIM,
    _seeded,
    _spread,
    save_tiny_generator,
    tiny_transformer,
    tiny_vae,
)
from PIL import Image

Kind = Literal["wan2.1-i2v", "wan2.2-i2v", "wan2.2-ti2v"]
KINDS: tuple[Kind, ...] = ("wan2.1-i2v", "wan2.2-i2v", "wan2.2-ti2v")
CLIP = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 8}
TOKENS = 5
"""Of the tiny image encoder: a class and 2 x 2 patches."""
_MORE = {"in_channels": 2 * Z_DIM + TEMPORAL, "out_channels": Z_DIM}
_WIDTH = 24  # two heads of 12
MODELS: dict[Kind, tuple[dict[str, Any], dict[str, Any]]] = {
    "wan2.1-i2v": (_MORE | {"image_dim": CLIP["hidden_size"], "added_kv_proj_dim": _WIDTH}, {}),
    "wan2.2-i2v": (_MORE, {}),
    "wan2.2-ti2v": GENERATORS["wan2.2-5b"],
}
"""(settings of the transformer, of the VAE)."""


def tiny_image_encoder(dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """CLIPVisionModel: images of 8 x 8 -> 5 tokens of width 16. Frozen, eval."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    with _seeded(seed) as generator:
        model = CLIPVisionModel(CLIPVisionConfig(**CLIP, patch_size=4))
        _spread(model, 1.0, generator)
    return model.to(dtype).eval().requires_grad_(False)


def tiny_image_processor() -> Any:
    """CLIP's, for ``tiny_image_encoder``."""
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})


def tiny_image(width: int = 16, height: int = 16, seed: int = 0) -> Image.Image:
    """Noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def save_tiny_i2v(folder: Path, kind: Kind, seed: int = 0) -> Path:
    """Writes a complete diffusers folder and returns it. Clips are of 4 pixels for each of the latents, or 16
    (TI2V)."""
    of_transformer, of_vae = MODELS[kind]
    save_tiny_generator(folder, seed)
    tiny_transformer(seed=seed, **of_transformer).save_pretrained(folder / "transformer")
    tiny_vae(seed=seed, **of_vae).save_pretrained(folder / "vae")
    index = json.loads((folder / "model_index.json").read_text()) | {
        "_class_name": "WanPipeline" if kind == "wan2.2-ti2v" else "WanImageToVideoPipeline",
        "image_encoder": [None, None],
        "image_processor": [None, None],
        "transformer_2": [None, None],
        "boundary_ratio": None,
        "expand_timesteps": kind == "wan2.2-ti2v",
    }
    if kind == "wan2.1-i2v":
        tiny_image_encoder(seed=seed).save_pretrained(folder / "image_encoder")
        tiny_image_processor().save_pretrained(folder / "image_processor")
        index |= {
            "image_encoder": ["transformers", "CLIPVisionModel"],
            "image_processor": ["transformers", "CLIPImageProcessor"],
        }
    if kind == "wan2.2-i2v":
        tiny_transformer(seed=seed + 50, **of_transformer).save_pretrained(folder / "transformer_2")
        index |= {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": BOUNDARY}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder
