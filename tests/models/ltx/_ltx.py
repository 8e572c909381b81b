"""A tiny LTX-Video generator of the real classes, with random weights."""

import json
from pathlib import Path
from typing import Any

import torch
from _tiny import TEXT_DIM, _seeded, _spread, tiny_prompt_tokenizer, tiny_t5

CHANNELS = 4


def tiny_ltx_transformer(dtype: torch.dtype = torch.float32, seed: int = 0, layers: int = 2) -> Any:
    """Latents (B, 4, F, h, w), text (B, L, 16). Frozen, eval."""
    from diffusers import LTXVideoTransformer3DModel

    with _seeded(seed) as generator:
        model = LTXVideoTransformer3DModel(
            in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=2, attention_head_dim=12,
            cross_attention_dim=24, num_layers=layers, caption_channels=TEXT_DIM,
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


def save_tiny_ltx(folder: Path) -> Path:
    """Writes a complete diffusers folder and returns it."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    models = {"transformer": tiny_ltx_transformer(), "vae": tiny_ltx_vae(), "text_encoder": tiny_t5()}
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, max_image_seq_len=4096,
        shift_terminal=0.1,
    )  # fmt: skip
    models |= {"tokenizer": tiny_prompt_tokenizer(), "scheduler": scheduler}
    index: dict[str, Any] = {"_class_name": "LTXPipeline", "_diffusers_version": "0.42.1"}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        index[name] = [type(model).__module__.split(".")[0], type(model).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
