"""A tiny Stable Diffusion 3.5 generator of the real classes, with random weights."""

import json
from pathlib import Path
from typing import Any

import torch
from _tiny import TEXT_DIM, _seeded, _spread, tiny_prompt_tokenizer, tiny_t5

CHANNELS = 4
CLIP_TOKENS = 7
"""Both CLIP's."""
POOLED = TEXT_DIM // 2 + 2
"""Numbers of the pooled text: those of both CLIPs."""


def tiny_sd3_transformer(dtype: torch.dtype = torch.float32, seed: int = 0, layers: int = 2) -> Any:
    """Latents (B, 4, 1, h, w) with even h and w, text (B, L, 16). One block has a second attention, the last no text
    after it. Frozen, eval."""
    from diffusers import SD3Transformer2DModel

    with _seeded(seed) as generator:
        model = SD3Transformer2DModel(
            sample_size=8, in_channels=CHANNELS, out_channels=CHANNELS, num_layers=layers, attention_head_dim=12,
            num_attention_heads=2, joint_attention_dim=TEXT_DIM, caption_projection_dim=24,
            pooled_projection_dim=POOLED, pos_embed_max_size=24, dual_attention_layers=(0,), qk_norm="rms_norm",
        )  # fmt: skip
        _spread(model, 0.8, generator)
    return model.to(dtype).eval().requires_grad_(False)


def tiny_sd3_vae(dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Latents (B, 4, h, w) <-> images (B, 3, 8h, 8w). Frozen, eval."""
    from diffusers import AutoencoderKL

    with _seeded(seed) as generator:
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(4, 4, 8, 8), layers_per_block=1, latent_channels=CHANNELS, norm_num_groups=2,
            sample_size=32, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False,
        )  # fmt: skip
        _spread(model, 1.0, generator)
    return model.to(dtype).eval().requires_grad_(False)


def tiny_clip(width: int, seed: int) -> Any:
    """CLIPTextModelWithProjection, for ``tiny_prompt_tokenizer``. Frozen, eval."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    with _seeded(seed) as generator:
        words = len(tiny_prompt_tokenizer())
        model = CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=words, hidden_size=width, intermediate_size=2 * width, projection_dim=width,
                num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=CLIP_TOKENS, pad_token_id=0,
                bos_token_id=2, eos_token_id=1,
            )
        )  # fmt: skip
        _spread(model, 1.0, generator)
    return model.eval().requires_grad_(False)


def save_tiny_sd3(folder: Path) -> Path:
    """Writes a complete diffusers folder and returns it."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    short, long = tiny_prompt_tokenizer(), tiny_prompt_tokenizer()
    short.model_max_length = CLIP_TOKENS
    models = {
        "transformer": tiny_sd3_transformer(), "vae": tiny_sd3_vae(), "text_encoder": tiny_clip(4, 1),
        "text_encoder_2": tiny_clip(POOLED - 4, 2), "text_encoder_3": tiny_t5(), "tokenizer": short,
        "tokenizer_2": short, "tokenizer_3": long, "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }  # fmt: skip
    index: dict[str, Any] = {"_class_name": "StableDiffusion3Pipeline", "_diffusers_version": "0.42.1"}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        index[name] = [type(model).__module__.split(".")[0], type(model).__name__]
    index |= {"image_encoder": [None, None], "feature_extractor": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
