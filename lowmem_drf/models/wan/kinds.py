"""Names the model that a file belongs to, by the names of its tensors, if that is no text-to-video transformer of Wan:
of single files that do not fit (``single_file``), and of LoRA files, where names may have underscores in place of
dots."""

from __future__ import annotations

import re
from collections.abc import Collection

_FROM_ID = "A run takes it from the folder of model.id"
OURS = "Of Wan's models this program trains text-to-video and image-to-video ones: give one of them"
ITS_OWN = "Let model.id name the model that it is a version of, and model.transformer the file"
_LORA = "Give it to model.base_lora, and leave model.transformer empty"

Kinds = tuple[tuple[str, str, str], ...]
"""(pattern in a tensor's name, what has it, what to do). No text-to-video transformer of Wan has any of them."""

_LORAS: Kinds = (
    (r"\.lora_(A|B|down|up|mid)(\.|$)|\.lora\.(down|up)\.|^lora_unet_", "a LoRA", _LORA),
    (r"\.(diff|diff_b|diff_m|hada_w1_a|lokr_w1|dora_scale)$", "a LoRA", _LORA),
)
_VARIANTS: Kinds = (
    (r"^vace_(blocks|patch_embedding)\.", "a VACE transformer", OURS),
    (r"^(face_adapter|face_encoder|motion_encoder|pose_patch_embedding)\.", "an Animate transformer", OURS),
    (r"^(casual_audio_encoder|audio_injector|audio_proj)\.", "a speech-to-video transformer", OURS),
    (r"^(ref_conv|control_adapter)\.", "a Fun-control transformer", OURS),
    (r"^(img_emb\.emb_pos|condition_embedder\.image_embedder\.pos_embed)$", "a transformer for two images", OURS),
    (r"^(img_emb|condition_embedder\.image_embedder)\.", "an image-to-video transformer", ITS_OWN),
    (r"\.attn2\.(add_[kv]_proj|norm_added_k)\.", "an image-to-video transformer", ITS_OWN),
    (r"\.cross_attn\.(k_img|v_img|norm_k_img)\.", "an image-to-video transformer", ITS_OWN),
)
"""Wan's other transformers: text-to-video ones with more tensors."""
_OTHERS: Kinds = (
    (r"(^|\.)((post_)?quant_conv|(en|de)coder\.(conv1|conv_in|mid|mid_block|middle))\.", "a VAE", _FROM_ID),
    (r"(^|\.)(shared|token_embedding|token_embd|embed_tokens)\.weight$", "a text encoder", _FROM_ID),
    (r"(^|\.)(text_model|vision_model|visual)\.", "a text or image encoder", _FROM_ID),
    (r"(^|\.)txt_in\.individual_token_refiner\.|(^|\.)context_embedder\.token_refiner\.", "a HunyuanVideo model", OURS),
    (r"(^|\.)(adaln_single|patchify_proj)\.", "an LTX-Video model", OURS),
    (r"(^|\.)transformer_blocks\.\d+\.img_mlp\.", "a Qwen-Image model", OURS),
    (r"(^|\.)single_transformer_blocks\.", "a Flux model", OURS),
    (r"(^|\.)(double|single)_blocks\.\d+\.", "a Flux or HunyuanVideo model", OURS),
    (r"(^|\.)joint_blocks\.\d+\.", "a Stable Diffusion 3 model", OURS),
    (r"(^|\.)((input|output|down|up)_blocks\.\d+|mid_block|middle_block)\.", "a Stable Diffusion model", OURS),
    (r"(^|\.)adaln_modulation_self_attn\.", "a Cosmos model", OURS),
    (r"(^|\.)patch_embed\.(text_proj|pos_embedding)", "a CogVideoX model", OURS),
    (r"(^|\.)(noise_refiner|cap_embedder)\.", "a Lumina or Z-Image model", OURS),
    (r"(^|\.)transformer_blocks\.\d+\.", "a model of another family (LTX-Video, CogVideoX, Qwen-Image, Flux)", OURS),
    (r"(^|\.)layers\.\d+\.", "a model of another family (Z-Image, Lumina, a language model)", OURS),
)


def kind_of(names: Collection[str], complete: bool) -> tuple[str, str] | None:
    """(what a file is, what to do) if a name tells.

    Args:
        names: without the prefix of the transformer.
        complete: a text-to-video transformer is among them.
    """
    for pattern, kind, cure in _VARIANTS if complete else _LORAS + _VARIANTS + _OTHERS:
        if any(map(re.compile(pattern.replace(r"\.", "[._]")).search, names)):
            return kind, cure
    return None
