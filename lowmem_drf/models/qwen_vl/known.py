"""Published configurations of critics, to build them at true size without a download.

From config.json and (video_)preprocessor_config.json of the repositories on huggingface.co, as of 2026. ``parameters``
is the count of the weights' index; a tied lm_head counts once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_TOKENS = {
    "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
}  # fmt: skip
_TEXT_TOKENS = {"bos_token_id": 151643, "eos_token_id": 151645}


@dataclass(frozen=True)
class KnownCritic:
    """A critic without its weights and tokenizer."""

    config: dict[str, Any]
    settings: dict[str, Any]
    """Video preprocessor settings."""
    parameters: int


def _qwen2_5_vl(
    parameters: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool
) -> KnownCritic:
    text = {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
        "max_position_embeddings": 128000, "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": tied, **_TEXT_TOKENS,
    }  # fmt: skip
    vision = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": hidden,
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "tokens_per_second": 2, "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }  # fmt: skip
    settings = {
        "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 3136, "max_pixels": 12845056,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    models = {"text_config": text, "vision_config": vision, "tie_word_embeddings": tied}
    return KnownCritic({"model_type": "qwen2_5_vl", **models, **_TOKENS}, settings, parameters)


def _qwen3_vl(parameters: int, hidden: int, intermediate: int, tied: bool, vision: dict[str, Any]) -> KnownCritic:
    text = {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 5000000.0, "mrope_section": [24, 20, 20], "mrope_interleaved": True,
        },
        "tie_word_embeddings": tied, **_TEXT_TOKENS,
    }  # fmt: skip
    common = {
        "num_heads": 16, "out_hidden_size": hidden, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "num_position_embeddings": 2304,
    }  # fmt: skip
    settings = {
        "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2,
        "size": {"shortest_edge": 4096, "longest_edge": 25165824}, "fps": 2, "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }  # fmt: skip
    models = {"text_config": text, "vision_config": common | vision, "tie_word_embeddings": tied}
    return KnownCritic({"model_type": "qwen3_vl", **models, **_TOKENS}, settings, parameters)


def _smolvlm(parameters: int, text: dict[str, Any], vision: dict[str, Any], scale: int) -> KnownCritic:
    text = {
        "model_type": "llama", "vocab_size": 49280, "max_position_embeddings": 8192, "rms_norm_eps": 1e-05,
        "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 49279, "tie_word_embeddings": False, **text,
    }  # fmt: skip
    side = {"longest_edge": vision["image_size"]}
    settings = {
        "size": {"longest_edge": 4 * vision["image_size"]}, "max_image_size": side,
        "video_sampling": {"fps": 1, "max_frames": 64, "video_size": side},
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    }  # fmt: skip
    config = {
        "model_type": "smolvlm", "text_config": text, "vision_config": vision, "scale_factor": scale,
        "image_token_id": 49190, "tie_word_embeddings": False,
    }  # fmt: skip
    return KnownCritic(config, settings, parameters)


KNOWN: dict[str, KnownCritic] = {
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": _smolvlm(
        507_482_304,
        {
            "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15,
            "num_key_value_heads": 5, "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        },
        {
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
            "image_size": 512, "patch_size": 16,
        },
        4,
    ),
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": _smolvlm(
        2_246_784_880,
        {
            "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32,
            "num_key_value_heads": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 273768.0},
        },
        {
            "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
            "image_size": 384, "patch_size": 14,
        },
        3,
    ),
    "Qwen/Qwen2.5-VL-3B-Instruct": _qwen2_5_vl(
        3_754_622_976, 2048, 11008, layers=36, heads=16, kv_heads=2, vocab=151936, tied=True
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": _qwen2_5_vl(
        8_292_166_656, 3584, 18944, layers=28, heads=28, kv_heads=4, vocab=152064, tied=False
    ),
    "Qwen/Qwen3-VL-4B-Instruct": _qwen3_vl(
        4_437_815_808, 2560, 9728, True,
        {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]},
    ),
    "Qwen/Qwen3-VL-8B-Instruct": _qwen3_vl(
        8_767_123_696, 4096, 12288, False,
        {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]},
    ),
}  # fmt: skip
