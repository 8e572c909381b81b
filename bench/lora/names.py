"""How tools name the modules of a Wan transformer in LoRA files. Written from the tools' sources and independent of the
package, whose reader is measured with it.

    ComfyUI, ai-toolkit, diffusion-pipe, LightX2V   diffusion_model.blocks.0.self_attn.q.lora_A.weight, or lora_down
    musubi-tuner                                    lora_unet_blocks_0_self_attn_q.lora_down.weight
    VideoX-Fun                                      lora_unet__blocks_0_self_attn_q.lora_down.weight
    SimpleTuner with LyCORIS                        lycoris_blocks_0_attn1_to_q.lora_down.weight
    OneTrainer                                      lora_transformer_blocks_0_attn1_to_q.lora_down.weight
    diffusers                                       transformer.blocks.0.attn1.to_q.lora_A.weight
    peft                                            base_model.model.blocks.0.attn1.to_q.lora_A.weight
    DiffSynth-Studio                                blocks.0.self_attn.q.lora_A.default.weight
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

_IN_BLOCK = {
    "norm2": "norm3",
    "scale_shift_table": "modulation",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    **{
        f"{theirs}.{one}": f"{own}.{other}"
        for theirs, own in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for one, other in (
            *(("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o")),
            *(("norm_q", "norm_q"), ("norm_k", "norm_k")),
        )
    },
}
_OUTSIDE = {
    "patch_embedding": "patch_embedding",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}


def wan(module: str) -> str:
    """diffusers' name of a module -> the name in Wan's own code, which ComfyUI has taken over."""
    if block := re.fullmatch(r"(blocks\.\d+)\.(.+)", module):
        return f"{block[1]}.{_IN_BLOCK[block[2]]}"
    return _OUTSIDE[module]


@dataclass(frozen=True)
class Names:
    """The keys of one tool."""

    prefix: str
    wan: bool
    flat: bool = False
    """Dots in a module's name are underscores."""
    a: str = ".lora_A.weight"
    b: str = ".lora_B.weight"

    def key(self, module: str, end: str) -> str:
        name = wan(module) if self.wan else module
        return self.prefix + (name.replace(".", "_") if self.flat else name) + end

    def ending(self, a: str, b: str) -> Names:
        return replace(self, a=a, b=b)


DOWN_UP = (".lora_down.weight", ".lora_up.weight")
COMFY = Names("diffusion_model.", wan=True)
COMFY_DOWN = COMFY.ending(*DOWN_UP)
MUSUBI = Names("lora_unet_", True, True, *DOWN_UP)
VIDEOX = Names("lora_unet__", True, True, *DOWN_UP)
LYCORIS = Names("lycoris_", False, True, *DOWN_UP)
ONETRAINER = Names("lora_transformer_", False, True, *DOWN_UP)
DIFFUSERS = Names("transformer.", wan=False)
PEFT = Names("base_model.model.", wan=False)
BARE = Names("", wan=False)
BARE_WAN = Names("", wan=True)

ATTENTION = tuple(f"attn{i}.{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0"))
LINEARS = (*ATTENTION, "ffn.net.0.proj", "ffn.net.2")
EMBEDDERS = tuple(
    f"condition_embedder.{name}"
    for name in ("text_embedder.linear_1", "text_embedder.linear_2", "time_embedder.linear_1", "time_embedder.linear_2")
)
OUTSIDE = (*EMBEDDERS, "condition_embedder.time_proj", "proj_out")


def block(number: int, names: tuple[str, ...] = LINEARS) -> list[str]:
    return [f"blocks.{number}.{name}" for name in names]


def blocks(count: int, names: tuple[str, ...] = LINEARS) -> list[str]:
    return [module for number in range(count) for module in block(number, names)]
