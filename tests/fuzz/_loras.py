"""LoRA files in the layouts of many tools, with names, parts, shapes, kinds and settings that do not fit together."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from _mutations import TEXTS, Bytes, changed, dumped, files_of, safetensors
from hypothesis import strategies as st

from bench.allocated import Allocated

_DIM = 24
_MODULES = {
    **{f"blocks.{block}.self_attn.q": f"blocks.{block}.attn1.to_q" for block in (0, 1, 7)},
    "blocks.0.cross_attn.o": "blocks.0.attn2.to_out.0",
    "blocks.1.ffn.0": "blocks.1.ffn.net.0.proj",
    "blocks.0.norm3": "blocks.0.norm2",
    "blocks.0": "blocks.0",
    "head.head": "proj_out",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "patch_embedding": "patch_embedding",
}
"""Wan's name -> diffusers'."""
_STRANGE = (
    "blocks.0.cross_attn.k_img",
    "img_emb.proj.1",
    "double_blocks.0.img_attn.qkv",
    "down_blocks.0.x",
    "text_model.q",
)
_PREFIXES = (
    "diffusion_model.",
    "transformer.",
    "transformer_2.",
    "base_model.model.",
    "model.diffusion_model.",
    "",
    "dit.",
)
_FLAT = ("lora_unet_", "lora_unet__", "lycoris_", "lora_transformer_", "lora_te_")
_SPELLINGS = {
    "A": ("lora_A.weight", "lora_down.weight", "lora.down.weight", "lora_A.default.weight", "lora_A"),
    "B": ("lora_B.weight", "lora_up.weight", "lora.up.weight", "lora_B.default.weight", "lora_B"),
}
_PARTS: tuple[dict[str, tuple[int, ...]], ...] = (
    {"A": (2, _DIM), "B": (_DIM, 2)},
    {"A": (2, _DIM), "B": (_DIM, 2), "alpha": ()},
    {"A": (2, _DIM, 1, 1), "B": (_DIM, 2, 1, 1)},
    {"A": (3, 4, 1, 2, 2), "B": (_DIM, 3, 1, 1, 1)},
    {"A": (2, _DIM), "B": (_DIM, 2), "dora_scale": (_DIM, 1)},
    {"A": (2, _DIM), "B": (_DIM, 2), "lora_magnitude_vector": (_DIM,)},
    {"A": (2, _DIM), "B": (_DIM, 2), "lora_B.bias": (_DIM,)},
    {"lokr_w1": (4, 4), "lokr_w2": (6, 6), "alpha": ()},
    {"lokr_w1": (4, 4), "lokr_w2_a": (6, 2), "lokr_w2_b": (2, 6)},
    {"hada_w1_a": (_DIM, 2), "hada_w1_b": (2, _DIM), "hada_w2_a": (_DIM, 2), "hada_w2_b": (2, _DIM), "alpha": (1,)},
    {"diff": (_DIM,), "diff_b": (_DIM,)},
    {"diff": (_DIM, _DIM)},
    {"diff_m": (1, 6, _DIM)},
    {"w_norm": (_DIM,), "b_norm": (_DIM,)},
    {"oft_blocks": (2, 2)},
    {"weight": (_DIM, _DIM)},
)
_SETTINGS: dict[str, Any] = {
    "r": 2,
    "lora_alpha": 4.0,
    "peft_type": "LORA",
    "use_rslora": True,
    "rank_pattern": {"blocks.0.attn1.to_q": 2, ".*to_out.0": 2},
    "alpha_pattern": {"^blocks.1": 1, "blocks.0.self_attn.q": 8},
    "bias": "none",
    "modules_to_save": None,
    "fan_in_fan_out": False,
}


@st.composite
def lora_files(draw: st.DrawFn) -> bytes:
    prefix = draw(st.sampled_from((*_PREFIXES, *_FLAT)))
    in_wan = draw(st.booleans())
    tensors: dict[str, tuple[int, ...]] = {}
    for _ in range(draw(st.integers(1, 4))):
        stem = draw(st.sampled_from([*_MODULES] * 3 + [*_STRANGE]))
        named = stem if in_wan or draw(st.integers(0, 9)) == 0 else _MODULES.get(stem, stem)
        before = prefix if draw(st.integers(0, 9)) else draw(st.sampled_from((*_PREFIXES, *_FLAT)))
        if before in _FLAT:
            named = named.replace(".", "_")
        spelling = draw(st.integers(0, 4))
        for part, shape in draw(st.sampled_from(_PARTS[:3] * 4 + _PARTS)).items():
            ending = _SPELLINGS[part][spelling] if part in _SPELLINGS else part
            tensors[f"{before}{named}.{ending}"] = shape
    settings = {f"transformer.{key}": value for key, value in _SETTINGS.items()}
    header = draw(
        st.sampled_from([{}, {"alpha": "2"}, {"lora_adapter_metadata": dumped(settings)}])
        | changed(settings).map(lambda inner: {"lora_adapter_metadata": dumped(inner)})
        | TEXTS.map(lambda text: {"lora_adapter_metadata": text, "alpha": text})
    )
    return draw(safetensors(tensors, header))


def loras() -> Bytes:
    return files_of(lora_files())


@cache
def _transformer() -> Any:
    from _tiny import tiny_transformer

    return tiny_transformer()


@cache
def _shapes() -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in _transformer().named_parameters()}


def read_as_every_door(path: Path) -> None:
    """As ``sample --lora``, ``model.base_lora``, ``train --init-lora`` and ``inspect-lora`` read it."""
    from lowmem_drf.models.lora.adapter import attach_lora, lora_layers, remove_lora
    from lowmem_drf.models.lora.base import lora_changes
    from lowmem_drf.models.lora.init import init_targets
    from lowmem_drf.models.lora.reading import read_lora
    from lowmem_drf.models.lora.report import make_report

    with Allocated() as counted:
        lora = read_lora(path)
    if counted.peak > 3 * path.stat().st_size:
        raise AssertionError(f"{counted.peak} bytes of tensors for a file of {path.stat().st_size}")
    json.dumps(make_report(path, lora).as_json())
    adapters, _ = lora.split(_shapes())
    for name, added in lora_changes(lora).items():
        added(torch.ones(_shapes()[name]))
    if not lora.merged():
        init_targets(lora, 2)
    try:
        attach_lora(_transformer(), adapters)
    finally:
        if lora_layers(_transformer()):
            remove_lora(_transformer())


def valid_lora() -> bytes:
    from safetensors.torch import save

    return save(
        {
            f"transformer.blocks.0.attn1.to_q.lora_{side}.weight": torch.ones(*sizes)
            for side, sizes in (("A", (2, _DIM)), ("B", (_DIM, 2)))
        }
    )
