"""A tiny CogVideoX generator of the real classes, with random weights."""

import json
from pathlib import Path
from typing import Any

import torch
from _tiny import TEXT_DIM, _seeded, _spread, tiny_prompt_tokenizer, tiny_t5

CHANNELS, TOKENS = 4, 12


def tiny_cogvideox_transformer(
    dtype: torch.dtype = torch.float32, seed: int = 0, layers: int = 2, rotary: bool = False
) -> Any:
    """Latents (B, 4, F, h, w), text (B, 12, 16). ``rotary``: as 5B, else as 2B. Frozen, eval."""
    from diffusers import CogVideoXTransformer3DModel

    with _seeded(seed) as generator:
        model = CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=CHANNELS, out_channels=CHANNELS,
            time_embed_dim=8, text_embed_dim=TEXT_DIM, num_layers=layers, sample_width=4, sample_height=4,
            sample_frames=9, max_text_seq_length=TOKENS, use_rotary_positional_embeddings=rotary,
        )  # fmt: skip
        _spread(model, 0.8, generator)
    return model.to(dtype).eval().requires_grad_(False)


def tiny_cogvideox_vae(dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Latents (B, 4, F, h, w) <-> frames (B, 3, 4F - 3, 4h, 4w): CogVideoX's have one level more. Frozen, eval."""
    from diffusers import AutoencoderKLCogVideoX

    with _seeded(seed) as generator:
        model = AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 3, up_block_types=("CogVideoXUpBlock3D",) * 3,
            block_out_channels=(4, 8, 8), latent_channels=CHANNELS, layers_per_block=1, norm_num_groups=2,
            scaling_factor=0.7, sample_height=32, sample_width=32,
        )  # fmt: skip
        _spread(model, 1.0, generator)
    return model.to(dtype).eval().requires_grad_(False)


def tiny_cogvideox_scheduler(snr_shift: float = 3.0) -> Any:
    """With the published settings."""
    from diffusers import CogVideoXDDIMScheduler

    return CogVideoXDDIMScheduler(
        beta_start=0.00085, beta_end=0.012, clip_sample=False, prediction_type="v_prediction",
        rescale_betas_zero_snr=True, timestep_spacing="trailing", snr_shift_scale=snr_shift,
    )  # fmt: skip


def save_tiny_cogvideox(folder: Path, rotary: bool = False) -> Path:
    """Writes a complete diffusers folder and returns it."""
    transformer, vae = tiny_cogvideox_transformer(rotary=rotary), tiny_cogvideox_vae()
    models = {"transformer": transformer, "vae": vae, "text_encoder": tiny_t5(), "tokenizer": tiny_prompt_tokenizer()}
    models |= {"scheduler": tiny_cogvideox_scheduler(1.0 if rotary else 3.0)}
    index: dict[str, Any] = {"_class_name": "CogVideoXPipeline", "_diffusers_version": "0.42.1"}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        index[name] = [type(model).__module__.split(".")[0], type(model).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
