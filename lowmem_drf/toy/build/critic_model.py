"""ToyWorld's critic, untrained: ``Qwen2_5_VLForConditionalGeneration`` in small, its tokenizer and its preprocessor
files."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from lowmem_drf.models.qwen_vl.critic import VLMCritic, video_geometry
from lowmem_drf.toy.build.words import critic_tokenizer
from lowmem_drf.toy.scenes import FPS

PREPROCESSOR = {
    "fps": FPS,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "min_pixels": 32 * 32,
    "max_pixels": 32 * 32,
    # not [0.5] * 3: the patch embedding has no bias, so a flat patch of the mean's colour becomes the zero vector, and
    # the RMSNorm behind it blows up the gradient. This colour is the furthest from the three shades of the background
    # (docs/decisions.md).
    "image_mean": [1.0, 0.0, 1.0],
    "image_std": [0.5, 0.5, 0.5],
    "rescale_factor": 1 / 255,
    "do_resize": True,
    "do_normalize": True,
    "do_convert_rgb": True,
}


def build_critic(seed: int) -> VLMCritic:
    """1.1M parameters: vision 96 x 3 (patch 4, 2 frames a slice, merge 2), language 128 x 3.

    The language model is initialised with a standard deviation of 0.08 (embeddings 0.3) instead of the library's 0.02:
    from small weights it stays at chance.
    """
    tok = critic_tokenizer()

    def token(name: str) -> int:
        return tok.convert_tokens_to_ids(f"<|{name}|>")

    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tok), hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
            pad_token_id=token("endoftext"), bos_token_id=token("endoftext"), eos_token_id=token("im_end"),
        ),
        vision_config=dict(
            depth=3, hidden_size=96, intermediate_size=256, num_heads=4, out_hidden_size=128, patch_size=4,
            temporal_patch_size=2, spatial_merge_size=2, window_size=32, fullatt_block_indexes=[0, 1, 2],
            tokens_per_second=4,
        ),
        image_token_id=token("image_pad"), video_token_id=token("video_pad"),
        vision_start_token_id=token("vision_start"), vision_end_token_id=token("vision_end"), tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    for name, p in model.named_parameters():
        if "language_model" in name and p.ndim == 2:
            nn.init.normal_(p, std=0.3 if "embed_tokens" in name else 0.08)
        elif "visual" in name and p.ndim >= 2:
            nn.init.normal_(p, std=0.6 / p.flatten(1).shape[1] ** 0.5)
    return VLMCritic(model, tok, video_geometry(PREPROCESSOR), fps=FPS)


def save_critic(model: Qwen2_5_VLForConditionalGeneration, folder: Path, reader: bool = False) -> None:
    """Writes a folder in transformers' layout with the files of the real models. Weights in fp16: half the bytes, and
    no measured rate changes."""
    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).half().save_pretrained(folder)
    critic_tokenizer(reader).save_pretrained(folder)
    for name, role in (("preprocessor_config.json", "image"), ("video_preprocessor_config.json", "video")):
        kind = f"Qwen2VL{role.capitalize()}Processor"
        (folder / name).write_text(
            json.dumps({**PREPROCESSOR, f"{role}_processor_type": kind}, indent=2) + "\n", encoding="utf-8"
        )
