"""The two names of every module of a Wan transformer: diffusers', and Wan's own, which ComfyUI, LoRA files and original
checkpoints use.

    blocks.0.attn1.to_q                            blocks.0.self_attn.q
    condition_embedder.time_embedder.linear_1      time_embedding.0
    proj_out                                       head.head

The renaming is that of ``convert_wan_transformer_to_diffusers`` in diffusers 0.42.1 (``loaders/single_file_utils.py``).
Note that ``norm2`` and ``norm3`` swap.
"""

from __future__ import annotations

import re

BLOCK_LINEARS = {
    **{f"attn1.to_{x}": f"self_attn.{x}" for x in "qkv"},
    **{f"attn2.to_{x}": f"cross_attn.{x}" for x in "qkv"},
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
"""diffusers' name inside a block -> Wan's own."""
IMAGE_LINEARS = {f"attn2.add_{x}_proj": f"cross_attn.{x}_img" for x in "kv"}
"""In the blocks that attend to an image too (2.1-I2V)."""

IN_BLOCK = {
    **BLOCK_LINEARS,
    **IMAGE_LINEARS,
    **{f"attn1.norm_{x}": f"self_attn.norm_{x}" for x in "qk"},
    **{f"attn2.norm_{x}": f"cross_attn.norm_{x}" for x in "qk"},
    "attn2.norm_added_k": "cross_attn.norm_k_img",
    "norm2": "norm3",
    "norm3": "norm2",
    "scale_shift_table": "modulation",
}
OUTSIDE = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "patch_embedding": "patch_embedding",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}


def wan_name(name: str) -> str:
    """diffusers' name of a module or parameter -> Wan's own. Raises KeyError if no model of Wan that is
    trained here has it."""
    if block := re.fullmatch(r"(blocks\.\d+)\.(.+)", name):
        return f"{block[1]}.{_renamed(block[2], IN_BLOCK)}"
    return _renamed(name, OUTSIDE)


def in_transformer(name: str) -> bool:
    """True if a linear layer of this name (diffusers') is packed: those of attention and feed-forward of a block."""
    block, _, inner = name.partition(".")[2].partition(".")
    return name.startswith("blocks.") and block.isdecimal() and inner in BLOCK_LINEARS | IMAGE_LINEARS


def _renamed(name: str, names: dict[str, str]) -> str:
    for theirs, own in names.items():
        if name == theirs or name.startswith(f"{theirs}."):
            return own + name[len(theirs) :]
    raise KeyError(name)
