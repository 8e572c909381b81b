"""Damaged and contradictory LoRA files: each is to be refused with the name of the module."""

from __future__ import annotations

import math

import torch

from bench.lora.facts import LoraFile
from bench.lora.names import COMFY, COMFY_DOWN, DIFFUSERS, LYCORIS, MUSUBI, PEFT
from bench.lora.rows import Rows, add_pair, pairs

ROWS = Rows()
refused = ROWS.refused
Q = "blocks.1.attn1.to_q"

for what, value in (("NaN", math.nan), ("infinity", math.inf)):
    for names, end in ((COMFY, ".lora_A.weight"), (MUSUBI, ".lora_up.weight"), (LYCORIS, ".diff")):

        def _lost(file: LoraFile, value: float = value, end: str = end) -> None:
            pairs()(file)
            if end == ".diff":
                file.whole("blocks.1.norm2", ".diff", "weight")
                file.tensors[file.names.key("blocks.1.norm2", end)].view(-1)[0] = value
            else:
                file.tensors[file.names.key(Q, end)].view(-1)[0] = value

        refused(
            f"{what} in {names.prefix}…{end}", names, "NaN", "infin", module="blocks.1.norm2" if end == ".diff" else Q
        )(_lost)


for dtype, word in (
    *((torch.int8, "I8"), (torch.int64, "I64"), (torch.uint8, "U8")),
    *((torch.bool, "BOOL"), (torch.complex64, "C64")),
):
    short = str(dtype).removeprefix("torch.")

    def _dtype(file: LoraFile, dtype: torch.dtype = dtype) -> None:
        pairs()(file)
        key = file.names.key(Q, ".lora_A.weight")
        file.tensors[key] = (file.tensors[key] * 100).to(dtype)

    refused(f"weights in {short}", COMFY, short, word, module=Q)(_dtype)


@refused("half a pair: no lora_B", COMFY, "half", module=Q)
def no_b(file: LoraFile) -> None:
    pairs()(file)
    del file.tensors[file.names.key(Q, ".lora_B.weight")]


@refused("half a pair: no lora_down, musubi", MUSUBI, "half", module=Q)
def no_down(file: LoraFile) -> None:
    pairs(alpha=2)(file)
    del file.tensors[file.names.key(Q, ".lora_down.weight")]


@refused("an alpha without a pair", MUSUBI, "half", "alpha", module=Q)
def lone_alpha(file: LoraFile) -> None:
    pairs(alpha=2)(file)
    for end in (".lora_down.weight", ".lora_up.weight"):
        del file.tensors[file.names.key(Q, end)]


@refused("half a LoKr: no w2", LYCORIS, "LoKr", "half", module=Q)
def half_lokr(file: LoraFile) -> None:
    file.put(Q, ".lokr_w1", file.random(4, 4))


@refused("half a LoHa: no w2_b", LYCORIS, "LoHa", "half", module=Q)
def half_loha(file: LoraFile) -> None:
    for end, shape in (("w1_a", (24, 3)), ("w1_b", (3, 24)), ("w2_a", (24, 3))):
        file.put(Q, f".hada_{end}", file.random(*shape))


@refused("dora_scale without a pair", LYCORIS, "DoRA", "half", "dora_scale", module=Q)
def lone_dora(file: LoraFile) -> None:
    file.put(Q, ".dora_scale", file.random(24, 1))


@refused("dora_scale of neither axis", LYCORIS, "DoRA", "dora_scale", "shape", module=Q, of_model=True)
def odd_dora(file: LoraFile) -> None:
    pairs()(file)
    file.put(Q, ".dora_scale", file.random(7, 1))


@refused("ranks of A and B differ", COMFY, "rank", module=Q)
def two_ranks(file: LoraFile) -> None:
    pairs()(file)
    file.put(Q, ".lora_B.weight", file.random(24, 3))


@refused("A of another width", COMFY, "shape", "fit", module=Q, of_model=True)
def odd_width(file: LoraFile) -> None:
    pairs()(file)
    file.put(Q, ".lora_A.weight", file.random(4, 25))


@refused("LoKr factors of another size", LYCORIS, "LoKr", "shape", "fit", module=Q, of_model=True)
def odd_lokr(file: LoraFile) -> None:
    file.put(Q, ".lokr_w1", file.random(4, 4))
    file.put(Q, ".lokr_w2", file.random(5, 6))


@refused("a difference of another size", COMFY, "shape", "fit", module="blocks.1.norm2", of_model=True)
def odd_diff(file: LoraFile) -> None:
    pairs()(file)
    file.put("blocks.1.norm2", ".diff", file.random(25))


@refused("a difference of a bias that is not there", COMFY, "has no", module="blocks.1.attn1.norm_q", of_model=True)
def no_bias(file: LoraFile) -> None:
    pairs()(file)
    file.put("blocks.1.attn1.norm_q", ".diff_b", file.random(24))


@refused("a module under ComfyUI's and diffusers' names", COMFY, "twice", "two names", module=Q)
def two_names(file: LoraFile) -> None:
    pairs()(file)
    add_pair(file, f"transformer.{Q}")


@refused("a module under lora_down and lora_A", COMFY, "twice", "two names", module=Q)
def two_ends(file: LoraFile) -> None:
    pairs()(file)
    add_pair(file, file.names.key(Q, ""), (".lora_down.weight", ".lora_up.weight"))


@refused("a module with and without .default.", PEFT, "twice", "two names", module=Q)
def two_adapters(file: LoraFile) -> None:
    pairs()(file)
    add_pair(file, file.names.key(Q, ""), (".lora_A.default.weight", ".lora_B.default.weight"))


@refused("a module flat and dotted", MUSUBI, "twice", "two names", module=Q)
def two_seps(file: LoraFile) -> None:
    pairs()(file)
    add_pair(file, COMFY.key(Q, ""), (".lora_down.weight", ".lora_up.weight"))


@refused("a module as pair and LoKr", LYCORIS, "twice", "LoKr", module=Q)
def pair_and_lokr(file: LoraFile) -> None:
    pairs()(file)
    file.put(Q, ".lokr_w1", file.random(4, 4))
    file.put(Q, ".lokr_w2", file.random(6, 6))


@refused("rank 0", COMFY, "rank", "no numbers", module=Q)
def rank_zero(file: LoraFile) -> None:
    pairs()(file)
    file.put(Q, ".lora_A.weight", torch.zeros(0, 24))
    file.put(Q, ".lora_B.weight", torch.zeros(24, 0))


@refused("the header's rank contradicts the tensors", DIFFUSERS, "rank")
def header_rank(file: LoraFile) -> None:
    file.adapter_header(r=8, lora_alpha=8, target_modules=["to_q"])
    pairs()(file)


@refused("adapter_config.json's rank contradicts the tensors", PEFT, "rank")
def config_rank(file: LoraFile) -> None:
    file.peft_config(r=8, lora_alpha=8)
    pairs()(file)


@refused("the header is no JSON", DIFFUSERS, "header")
def header_damaged(file: LoraFile) -> None:
    pairs()(file)
    file.header["lora_adapter_metadata"] = "{"


@refused("adapter_config.json is no JSON", PEFT, "adapter_config.json")
def config_damaged(file: LoraFile) -> None:
    file.beside["adapter_config.json"] = "{"
    pairs()(file)


@refused("an unknown key", COMFY, "lora_magic")
def unknown(file: LoraFile) -> None:
    pairs()(file)
    file.tensors["diffusion_model.blocks.0.self_attn.q.lora_magic"] = file.random(4)


@refused("an unknown module", COMFY, "self_attn.w")
def unknown_module(file: LoraFile) -> None:
    pairs()(file)
    add_pair(file, "diffusion_model.blocks.0.self_attn.w")


@refused("no tensors", COMFY, "no LoRA", "no tensor", "empty")
def empty(file: LoraFile) -> None:
    from safetensors.torch import save

    file.beside[file.file] = save({})


@refused("cut off", COMFY, "damaged", "incomplete", "cut", "ends", "bytes")
def cut(file: LoraFile) -> None:
    from safetensors.torch import save

    file.beside[file.file] = save({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(64, 64)})[:-100]


for name, number in (
    ("of two numbers", torch.tensor([1.0, 2.0])),
    ("NaN", torch.tensor(math.nan)),
    ("infinite", torch.tensor(math.inf)),
    ("0", torch.tensor(0.0)),
    ("negative", torch.tensor(-1.0)),
    ("empty", torch.zeros(0)),
):

    def _alpha(file: LoraFile, number: torch.Tensor = number) -> None:
        pairs()(file)
        file.tensors[file.names.key(Q, ".alpha")] = number

    refused(f"alpha {name}", COMFY_DOWN, "alpha", module=Q)(_alpha)

for name, said in (
    ("negative", -2),
    ("a word", "two"),
    ("a list", [2]),
    ("NaN", math.nan),
):

    def _header(file: LoraFile, said: object = said) -> None:
        file.adapter_header(r=4, lora_alpha=said, target_modules=["to_q"])
        pairs()(file)

    refused(f"the header's alpha is {name}", DIFFUSERS, "alpha", "header")(_header)
