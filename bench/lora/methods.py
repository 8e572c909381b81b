"""Adapters of other methods than LoRA, LoKr, LoHa and DoRA, and settings of peft that make it compute something else
than B A: each is to be refused by its name."""

from __future__ import annotations

import torch

from bench.lora.facts import LoraFile
from bench.lora.names import COMFY, DIFFUSERS, LYCORIS, PEFT, Names
from bench.lora.rows import FULL, Rows, add_pair, pairs

ROWS = Rows()
refused = ROWS.refused
Q = "blocks.1.attn1.to_q"


@refused("modules_to_save of peft", PEFT, "modules_to_save")
def modules_to_save(file: LoraFile) -> None:
    pairs()(file)
    file.peft_config(r=4, lora_alpha=4, modules_to_save=["proj_out"])
    file.tensors["base_model.model.proj_out.weight"] = file.random(16, 24)
    file.tensors["base_model.model.proj_out.bias"] = file.random(16)


@refused("modules_to_save, in-memory name", PEFT, "modules_to_save")
def modules_to_save_name(file: LoraFile) -> None:
    pairs()(file)
    file.tensors["base_model.model.proj_out.modules_to_save.default.weight"] = file.random(16, 24)


for kind, key, shape in (
    ("OFT", "base_model.model.{}.oft_R.weight", (3, 28)),
    ("OFT", "lycoris_blocks_1_attn1_to_q.oft_blocks", (3, 8, 8)),
    ("BOFT", "lycoris_blocks_1_attn1_to_q.oft_blocks", (2, 3, 8, 8)),
    ("GLoRA", "diffusion_model.blocks.1.self_attn.q.a1.weight", (4, 24)),
    ("IA3", "base_model.model.{}.ia3_l", (24, 1)),
    ("IA3", "lycoris_blocks_1_attn1_to_q.on_input", ()),
    ("VeRA", "base_model.model.{}.vera_lambda_d", (4,)),
    ("AdaLoRA", "base_model.model.{}.lora_E", (4, 1)),
):

    def _other(file: LoraFile, key: str = key, shape: tuple[int, ...] = shape) -> None:
        file.tensors[key.format(Q)] = file.random(*shape) if shape else torch.tensor(True)
        if "a1" in key:
            for name, size in (("a2", (24, 4)), ("b1", (4, 24)), ("b2", (24, 4))):
                file.tensors[key.replace("a1", name)] = file.random(*size)
        if "lora_E" in key:
            add_pair(file, f"base_model.model.{Q}", (".lora_A", ".lora_B"))

    refused(f"{kind}: {key.rsplit('.', 2 if key.endswith('weight') else 1)[1]}", COMFY, kind.removeprefix("B"))(_other)


@refused("peft_type of another method in adapter_config.json", PEFT, "OFT")
def peft_type(file: LoraFile) -> None:
    file.beside["adapter_config.json"] = '{"peft_type": "OFT", "r": 4}'
    file.tensors[f"base_model.model.{Q}.oft_R.weight"] = file.random(3, 28)


for method in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"):

    def _residual(file: LoraFile, method: str = method) -> None:
        """These take the LoRA's first values out of the base, so that A and B alone are another change."""
        pairs()(file)
        file.peft_config(r=4, lora_alpha=4, init_lora_weights=method)

    refused(f"peft: init_lora_weights = {method}", PEFT, method)(_residual)


for key, setting in (
    ("alora_invocation_tokens", [1, 2]),
    ("arrow_config", {"top_k": 2}),
    ("kasa_config", {"beta": 1e-4}),
    ("layer_replication", [[0, 1], [0, 1]]),
    ("use_bdlora", {"nblocks": 2}),
    ("use_qalora", True),
):

    def _variant(file: LoraFile, key: str = key, setting: object = setting) -> None:
        """With these peft computes something else than B A."""
        pairs()(file)
        file.peft_config(r=4, lora_alpha=4, **{key: setting})

    refused(f"peft: {key}", PEFT, key)(_variant)


@refused("peft: biases of the base, bias = lora_only", PEFT, "bias")
def bias_only(file: LoraFile) -> None:
    pairs()(file)
    file.peft_config(r=4, lora_alpha=4, bias="lora_only")
    file.tensors[file.names.key(Q, ".bias")] = file.random(24)


@refused("Tucker: lora_mid", LYCORIS, "lora_mid", "Tucker", module="patch_embedding")
def tucker(file: LoraFile) -> None:
    pairs()(file)
    for end, shape in (("down", (4, 4, 1, 1, 1)), ("mid", (4, 4, 1, 2, 2)), ("up", (24, 4, 1, 1, 1))):
        file.put("patch_embedding", f".lora_{end}.weight", file.random(*shape))


@refused("Tucker: LoKr with t2", LYCORIS, "lokr_t2", "Tucker", module="patch_embedding")
def tucker_lokr(file: LoraFile) -> None:
    for end, shape in (("w1", (4, 2)), ("t2", (2, 2, 1, 2, 2)), ("w2_a", (2, 6)), ("w2_b", (2, 2))):
        file.put("patch_embedding", f".lokr_{end}", file.random(*shape))


@refused("a whole model with its adapter inside", Names("", False), "base_layer", "model")
def with_base(file: LoraFile) -> None:
    file.tensors = {f"{module}.base_layer.weight": file.base[f"{module}.weight"].float() for module in FULL}
    for module in FULL:
        for end, tensor in (
            (".lora_A.default.weight", file.random(4, 24)),
            (".lora_B.default.weight", file.random(24, 4)),
        ):
            file.tensors[module + end] = tensor


@refused("settings with a pattern that may never end", DIFFUSERS, "pattern")
def endless(file: LoraFile) -> None:
    file.adapter_header(r=4, lora_alpha=4, target_modules=["to_q"], alpha_pattern={"(a+)+(b|c)*": 2})
    pairs()(file)


@refused("control LoRA: reshape_weight", COMFY, "reshape_weight", "control")
def reshaped(file: LoraFile) -> None:
    pairs()(file)
    file.put("patch_embedding", ".lora_A.weight", file.random(4, 32))
    file.put("patch_embedding", ".lora_B.weight", file.random(24, 4))
    file.put("patch_embedding", ".reshape_weight", torch.tensor([24, 8, 1, 2, 2]))


@refused("set_weight", COMFY, "set_weight", module="blocks.1.norm2")
def set_weight(file: LoraFile) -> None:
    pairs()(file)
    file.put("blocks.1.norm2", ".set_weight", file.random(24))
