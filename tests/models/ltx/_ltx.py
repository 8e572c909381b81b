"""A tiny LTX-Video generator of the real classes, with random weights."""

import json
from pathlib import Path
from typing import Any

import torch
from _tiny import TEXT_DIM, _seeded, _spread, tiny_prompt_tokenizer, tiny_t5

CHANNELS = 4


NEWER_VAE: dict[str, Any] = {
    "decoder_block_out_channels": (8, 16, 32), "decoder_layers_per_block": (1, 1, 1, 1),
    "decoder_spatio_temporal_scaling": (True,) * 3, "decoder_inject_noise": (False,) * 4,
    "upsample_residual": (True,) * 3, "upsample_factor": (2,) * 3, "timestep_conditioning": True,
}  # fmt: skip
"""As of version 0.9.7."""


def tiny_ltx_transformer(
    dtype: torch.dtype = torch.float32, seed: int = 0, layers: int = 2, heads: tuple[int, int] = (2, 12)
) -> Any:
    """Latents (B, 4, F, h, w), text (B, L, 16). ``heads``: how many, and their size: 128 in the 13B. Frozen, eval."""
    from diffusers import LTXVideoTransformer3DModel

    with _seeded(seed) as generator:
        model = LTXVideoTransformer3DModel(
            in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=heads[0], attention_head_dim=heads[1],
            cross_attention_dim=heads[0] * heads[1], num_layers=layers, caption_channels=TEXT_DIM,
        )  # fmt: skip
        _spread(model, 0.8, generator)
    return model.to(dtype).eval().requires_grad_(False)


def tiny_ltx_vae(dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any) -> Any:
    """Latents (B, 4, F, h, w) <-> frames (B, 3, 8F - 7, 32h, 32w), as all of LTX-Video's. Frozen, eval."""
    from diffusers import AutoencoderKLLTXVideo

    with _seeded(seed) as generator:
        widths = {"block_out_channels": (4, 4, 8, 8), "decoder_block_out_channels": (4, 4, 8, 8)}
        layers = {"layers_per_block": (1,) * 5, "decoder_layers_per_block": (2, 1, 1, 1, 1)}
        model = AutoencoderKLLTXVideo(**({"latent_channels": CHANNELS} | widths | layers | config))
        _spread(model, 1.0, generator)
        model.latents_mean.copy_(0.3 * torch.randn(CHANNELS, generator=generator))
        model.latents_std.copy_(1 + torch.rand(CHANNELS, generator=generator))
        with torch.no_grad():
            model.decoder.conv_out.conv.weight.mul_(0.7)
    return model.to(dtype).eval().requires_grad_(False)


def save_tiny_ltx(folder: Path, newer: bool = False) -> Path:
    """Writes a complete diffusers folder and returns it. ``newer``: like the 13B of 0.9.7."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    models = {"transformer": tiny_ltx_transformer(heads=(1, 128) if newer else (2, 12)), "text_encoder": tiny_t5()}
    models |= {"vae": tiny_ltx_vae(**(NEWER_VAE if newer else {}))}
    shifts = {"base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024, "max_image_seq_len": 4096}
    scheduler = FlowMatchEulerDiscreteScheduler(
        **({} if newer else {"use_dynamic_shifting": True, "shift_terminal": 0.1, **shifts})
    )
    models |= {"tokenizer": tiny_prompt_tokenizer(), "scheduler": scheduler}
    kind = "LTXConditionPipeline" if newer else "LTXPipeline"
    index: dict[str, Any] = {"_class_name": kind, "_diffusers_version": "0.42.1"}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        index[name] = [type(model).__module__.split(".")[0], type(model).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
