"""Every layout of a LoRA file that is to be read, with what it changes.

Sources of the rules: ``comfy/lora.py`` and ``comfy/weight_adapter`` of ComfyUI, ``networks`` of musubi-tuner,
``lycoris/modules`` of LyCORIS, ``utils/lora_utils.py`` of VideoX-Fun, ``LoRAModule.py`` of OneTrainer,
``utils/lora/general.py`` of DiffSynth-Studio, ``utils/lora_loader.py`` of LightX2V, ``toolkit/lokr.py`` of ai-toolkit,
``models/base.py`` of diffusion-pipe. Files of peft and diffusers are written by the libraries (``libraries.py``).

Where tools differ, a file means what it meant in the tool that trained it. So no alpha means alpha = rank; DoRA divides
by the norm of the changed weight, on the axis of its ``dora_scale`` (ComfyUI divides by the base's norm on the output
axis); LoKr with two full factors has no scale, whatever its alpha.
"""

from __future__ import annotations

from typing import Literal

import torch

from bench.lora.facts import LoraFile
from bench.lora.names import (
    ATTENTION,
    BARE,
    BARE_WAN,
    COMFY,
    COMFY_DOWN,
    DIFFUSERS,
    DOWN_UP,
    LYCORIS,
    MUSUBI,
    ONETRAINER,
    OUTSIDE,
    PEFT,
    VIDEOX,
    Names,
    block,
    blocks,
)
from bench.lora.rows import FULL, Rows, pairs

ROWS = Rows()
layout = ROWS.layout
SS = {"ss_network_module": "networks.lora_wan", "ss_network_dim": "4", "ss_network_alpha": "2.0"}
for name, names, filler in (
    ("ComfyUI, A/B", COMFY, pairs(FULL)),
    ("ComfyUI, A/B, alpha", COMFY, pairs(FULL, alpha=2)),
    ("ComfyUI, down/up, alpha", COMFY_DOWN, pairs(FULL, alpha=2)),
    ("ComfyUI, A/B without .weight", COMFY.ending(".lora_A", ".lora_B"), pairs(FULL)),
    ("ComfyUI, .default.", COMFY.ending(".lora_A.default.weight", ".lora_B.default.weight"), pairs(FULL)),
    ("diffusion_model. with diffusers' names", Names("diffusion_model.", wan=False), pairs(FULL)),
    ("model.diffusion_model.", Names("model.diffusion_model.", wan=True), pairs(FULL, alpha=2)),
    ("musubi, ss_ metadata", MUSUBI, pairs(FULL, alpha=2, header=SS)),
    ("musubi, no alpha", MUSUBI, pairs(FULL)),
    ("musubi, no alpha but ss_network_alpha", MUSUBI, pairs(FULL, header=SS)),
    ("lora_unet_ with diffusers' names", Names("lora_unet_", False, True, *DOWN_UP), pairs(FULL, alpha=2)),
    ("VideoX-Fun, lora_unet__", VIDEOX, pairs(FULL, alpha=2)),
    ("VideoX-Fun, every Linear", VIDEOX, pairs([*FULL, *OUTSIDE], alpha=2)),
    ("LyCORIS (SimpleTuner)", LYCORIS, pairs(FULL, alpha=2)),
    ("LyCORIS, every Linear", LYCORIS, pairs([*FULL, *OUTSIDE], alpha=2)),
    ("LyCORIS with Wan's names", Names("lycoris_", True, True, *DOWN_UP), pairs(FULL, alpha=2)),
    ("OneTrainer, lora_transformer_", ONETRAINER, pairs(FULL, alpha=2)),
    ("diffusers, no header", DIFFUSERS, pairs(FULL)),
    ("diffusers, .alpha tensors", DIFFUSERS, pairs(FULL, alpha=2)),
    ("diffusers, .lora.down/.lora.up", DIFFUSERS.ending(".lora.down.weight", ".lora.up.weight"), pairs(FULL)),
    ("diffusers, lora_down/lora_up, alpha", DIFFUSERS.ending(*DOWN_UP), pairs(FULL, alpha=2)),
    ("diffusers, _lora.down/_lora.up", DIFFUSERS.ending("_lora.down.weight", "_lora.up.weight"), pairs(FULL)),
    ("transformer. with Wan's names", Names("transformer.", wan=True), pairs(FULL)),
    ("peft, no config", PEFT, pairs(FULL)),
    (
        "peft, .default., no config",
        PEFT.ending(".lora_A.default.weight", ".lora_B.default.weight"),
        pairs(FULL),
    ),
    ("peft with Wan's names", Names("base_model.model.", wan=True), pairs(FULL)),
    ("DiffSynth-Studio", BARE_WAN.ending(".lora_A.default.weight", ".lora_B.default.weight"), pairs(FULL)),
    ("DiffSynth-Studio, pipe.dit.", Names("pipe.dit.", wan=True), pairs(FULL)),
    ("model.", Names("model.", wan=True), pairs(FULL)),
    ("bare Wan names", BARE_WAN, pairs(FULL)),
    ("bare Wan names, down/up, alpha", BARE_WAN.ending(*DOWN_UP), pairs(FULL, alpha=2)),
    ("bare diffusers names", BARE, pairs(FULL)),
    ("bare diffusers names, .default.", BARE.ending(".lora_A.default.weight", ".lora_B.default.weight"), pairs(FULL)),
    ("attention only, ComfyUI", COMFY, pairs(blocks(2, ATTENTION))),
    ("attention only, musubi", MUSUBI, pairs(blocks(2, ATTENTION), alpha=2)),
    ("block 1 only, ComfyUI", COMFY_DOWN, pairs(block(1), alpha=2)),
    ("block 1 only, musubi", MUSUBI, pairs(block(1), alpha=2)),
    ("one module, diffusers", DIFFUSERS, pairs(["blocks.1.attn2.to_v"])),
    ("outside of the blocks only", DIFFUSERS, pairs(list(OUTSIDE))),
    ("rank 1", COMFY, pairs(FULL, rank=1)),
    ("rank above the module's width", COMFY_DOWN, pairs(FULL, rank=40, alpha=8)),
):
    layout(name, names)(filler)
for name, names in (("12 blocks, musubi", MUSUBI), ("12 blocks, ComfyUI", COMFY_DOWN), ("12 blocks, LyCORIS", LYCORIS)):
    layout(name, names, layers=12)(pairs(blocks(12), rank=2, alpha=1))
layout("blocks 1 and 11 of 12, musubi", MUSUBI, layers=12)(pairs([*block(1), *block(11)], rank=2, alpha=1))
for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2):
    short = str(dtype).removeprefix("torch.")
    layout(f"ComfyUI, alpha, {short}", COMFY_DOWN, dtype)(pairs(FULL, alpha=2))
    layout(f"diffusers, {short}", DIFFUSERS, dtype)(pairs())
for dtype in (torch.bfloat16, torch.float16):
    layout(f"musubi, alpha 3 of rank 7, {str(dtype).removeprefix('torch.')}", MUSUBI, dtype)(pairs(FULL, 7, alpha=3))


@layout("transformer_2. beside transformer., low expert", DIFFUSERS)
def low_expert(file: LoraFile) -> None:
    _two_experts(file, "low")


@layout("transformer_2. beside transformer., high expert", DIFFUSERS)
def high_expert(file: LoraFile) -> None:
    _two_experts(file, "high")


def _two_experts(file: LoraFile, expert: Literal["low", "high"]) -> None:
    """diffusers' pipelines: ``transformer`` is the expert for high noise, ``transformer_2`` the one for low noise."""
    file.expert, file.has_more = expert, True
    for name, prefix in (("high", "transformer."), ("low", "transformer_2.")):
        part = LoraFile(Names(prefix, wan=False), seed=len(prefix))
        pairs(FULL)(part)
        file.tensors.update(part.tensors)
        if name == expert:
            file.changes.update(part.changes)


@layout("transformer_2. alone", Names("transformer_2.", wan=False))
def second(file: LoraFile) -> None:
    file.expert = "low"
    pairs(FULL)(file)


@layout("a rank per layer, no alpha, ComfyUI", COMFY)
def ranks(file: LoraFile) -> None:
    for i, module in enumerate(FULL):
        file.pair(module, 1 + i % 7)


@layout("ranks 1 and 11 in blocks 1 and 11 of 12", COMFY, layers=12)
def ranks_like_numbers(file: LoraFile) -> None:
    """A pattern for block 1 that fits block 11 too would be found."""
    for number in (1, 11):
        for module in block(number):
            file.pair(module, number)


@layout("a rank per layer, no alpha, diffusers", DIFFUSERS)
def ranks_diffusers(file: LoraFile) -> None:
    ranks(file)


@layout("a rank and an alpha per layer, musubi", MUSUBI)
def ranks_musubi(file: LoraFile) -> None:
    for i, module in enumerate(FULL):
        file.pair(module, 1 + i % 7, alpha=1 + i % 3)


@layout("alpha for some layers only", COMFY_DOWN)
def some_alphas(file: LoraFile) -> None:
    for i, module in enumerate(FULL):
        file.pair(module, alpha=2 if i % 2 else None)


for name, tensor in (
    ("alpha as integer", torch.tensor(2)),
    ("alpha as int32", torch.tensor(2, dtype=torch.int32)),
    ("alpha of shape [1]", torch.tensor([2.0])),
    ("alpha of shape [1, 1]", torch.tensor([[2.0]])),
    ("alpha in fp64", torch.tensor(2.5, dtype=torch.float64)),
    ("alpha 0-d in bf16", torch.tensor(3.0, dtype=torch.bfloat16)),
    ("alpha far below the rank", torch.tensor(1e-3)),
):

    def _alpha(file: LoraFile, tensor: torch.Tensor = tensor) -> None:
        for module in FULL:
            file.pair(module, alpha=tensor)

    layout(name, COMFY_DOWN)(_alpha)


@layout("header with alpha", DIFFUSERS)
def header(file: LoraFile) -> None:
    file.adapter_header(r=4, lora_alpha=2, target_modules=["to_q"])
    for module in FULL:
        file.pair(module, scale=0.5)


@layout("header with use_rslora", DIFFUSERS)
def rslora(file: LoraFile) -> None:
    file.adapter_header(r=4, lora_alpha=3, use_rslora=True, target_modules=["to_q"])
    for module in FULL:
        file.pair(module, scale=3 / 2)


@layout("header with rank_pattern, alpha_pattern, use_rslora", DIFFUSERS)
def patterns(file: LoraFile) -> None:
    file.adapter_header(
        r=4,
        lora_alpha=3,
        use_rslora=True,
        rank_pattern={"blocks.0.attn1.to_q": 2, "ffn.net.2": 6},
        alpha_pattern={"blocks.0.attn1.to_q": 5, "attn2.to_k": 7.5},
        target_modules=["to_q"],
    )
    for module in FULL:
        rank = 2 if module == "blocks.0.attn1.to_q" else 6 if module.endswith("ffn.net.2") else 4
        alpha = 5 if module == "blocks.0.attn1.to_q" else 7.5 if module.endswith("attn2.to_k") else 3
        file.pair(module, rank, scale=alpha / rank**0.5)


@layout("header with patterns as regular expressions", DIFFUSERS)
def expressions(file: LoraFile) -> None:
    """peft matches a pattern as ``(.*\\.)?(pattern)$``, and the first that matches counts."""
    file.adapter_header(
        r=4,
        lora_alpha=4,
        target_modules=["to_q"],
        rank_pattern={r"blocks\.1\..*": 2},
        alpha_pattern={"^blocks.0.attn1.to_q": 1.0, r".*\.to_k": 3.0, r"blocks\.\d+\.attn1\.to_k": 9.0},
    )
    for module in FULL:
        rank = 2 if module.startswith("blocks.1.") else 4
        alpha = 1.0 if module == "blocks.0.attn1.to_q" else 3.0 if module.endswith(".to_k") else 4
        file.pair(module, rank, scale=alpha / rank)


@layout("peft names, adapter_config.json beside", PEFT)
def beside(file: LoraFile) -> None:
    file.file = "adapter_model.safetensors"
    file.peft_config(r=4, lora_alpha=2, target_modules=["to_q"], use_rslora=False)
    for module in FULL:
        file.pair(module, scale=0.5)


@layout("diffusion-pipe: ComfyUI's names, adapter_config.json beside", COMFY)
def diffusion_pipe(file: LoraFile) -> None:
    file.file = "adapter_model.safetensors"
    file.peft_config(r=4, lora_alpha=4, target_modules=["blocks.0.self_attn.q"])
    pairs(FULL)(file)


@layout("4-D tensors of 1x1 convolutions", MUSUBI)
def four_d(file: LoraFile) -> None:
    for module in FULL:
        out, width = file.base[f"{module}.weight"].shape
        file.pair(module, alpha=2, shapes=((4, width, 1, 1), (out, 4, 1, 1)))


@layout("patch embedding as 5-D pair", COMFY_DOWN)
def five_d(file: LoraFile) -> None:
    out, *rest = file.base["patch_embedding.weight"].shape
    pairs(FULL)(file)
    file.pair("patch_embedding", alpha=2, shapes=((4, *rest), (out, 4, 1, 1, 1)))


@layout("patch embedding as flat pair", COMFY_DOWN)
def flat_patch(file: LoraFile) -> None:
    pairs(FULL)(file)
    file.pair("patch_embedding", alpha=2)


@layout("text encoder's keys beside, musubi", MUSUBI)
def beside_text(file: LoraFile) -> None:
    pairs(FULL, alpha=2)(file)
    _text_encoder(file, "lora_te_text_model_encoder_layers_0_mlp_fc1.")


@layout("text encoder's keys beside, diffusers", DIFFUSERS)
def beside_text_diffusers(file: LoraFile) -> None:
    pairs()(file)
    file.has_more = True
    for end, shape in (("lora_A.weight", (4, 16)), ("lora_B.weight", (16, 4))):
        file.tensors[f"text_encoder.encoder.block.0.layer.0.SelfAttention.q.{end}"] = file.random(*shape)


def _text_encoder(file: LoraFile, stem: str) -> None:
    file.tensors |= {
        f"{stem}lora_down.weight": file.random(4, 16),
        f"{stem}lora_up.weight": file.random(16, 4),
        f"{stem}alpha": torch.tensor(2.0),
    }
