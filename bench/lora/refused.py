"""Files that are no LoRA of a text-to-video Wan transformer: each is to be refused by the name of its kind."""

from __future__ import annotations

import pickle

import torch

from bench.lora.facts import LoraFile
from bench.lora.names import COMFY, DIFFUSERS, MUSUBI, PEFT, Names
from bench.lora.rows import FULL, Rows, add_pair, pairs

ROWS = Rows()
refused = ROWS.refused
Q = "blocks.1.attn1.to_q"

IMAGE = ("not fit", "this model has no")
"""What a text-to-video model says to a LoRA of an image-to-video one."""
for name, names, stems in (
    (
        "image to video: k_img, v_img",
        COMFY,
        ("diffusion_model.blocks.0.cross_attn.k_img", "diffusion_model.blocks.0.cross_attn.v_img"),
    ),
    ("image to video: img_emb", COMFY, ("diffusion_model.img_emb.proj.1", "diffusion_model.img_emb.proj.3")),
    (
        "image to video: add_k_proj",
        DIFFUSERS,
        ("transformer.blocks.0.attn2.add_k_proj", "transformer.blocks.0.attn2.add_v_proj"),
    ),
    ("image to video: image_embedder", DIFFUSERS, ("transformer.condition_embedder.image_embedder.ff.net.0.proj",)),
    ("image to video: musubi's k_img", MUSUBI, ("lora_unet_blocks_0_cross_attn_k_img",)),
):

    def _image(file: LoraFile, stems: tuple[str, ...] = stems) -> None:
        pairs()(file)
        for stem in stems:
            add_pair(file, stem, (file.names.a, file.names.b))

    refused(name, names, *IMAGE, of_model=True)(_image)


@refused("image to video: norm_k_img alone", COMFY, *IMAGE, of_model=True)
def image_norm(file: LoraFile) -> None:
    pairs()(file)
    file.tensors["diffusion_model.blocks.0.cross_attn.norm_k_img.diff"] = file.random(24)


@refused("VACE: vace_blocks, ComfyUI", COMFY, "VACE")
def vace(file: LoraFile) -> None:
    pairs()(file)
    add_pair(file, "diffusion_model.vace_blocks.0.self_attn.q")


@refused("VACE: vace_blocks alone, diffusers", DIFFUSERS, "VACE")
def vace_alone(file: LoraFile) -> None:
    add_pair(file, "transformer.vace_blocks.0.attn1.to_q")


for name, family, keys in (
    (
        "Flux, kohya",
        "Flux",
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_{}.weight", "lora_unet_single_blocks_7_linear1.lora_{}.weight"),
    ),
    (
        "Flux, diffusers",
        "Flux",
        (
            "transformer.transformer_blocks.0.attn.add_q_proj.lora_{}.weight",
            "transformer.single_transformer_blocks.0.attn.to_q.lora_{}.weight",
        ),
    ),
    (
        "HunyuanVideo, musubi",
        "HunyuanVideo",
        (
            "lora_unet_double_blocks_0_img_attn_qkv.lora_{}.weight",
            "lora_unet_txt_in_individual_token_refiner_blocks_0_mlp_fc1.lora_{}.weight",
        ),
    ),
    (
        "HunyuanVideo, ComfyUI",
        "HunyuanVideo",
        (
            "diffusion_model.double_blocks.0.img_attn_qkv.lora_{}.weight",
            "diffusion_model.txt_in.individual_token_refiner.blocks.0.mlp.fc1.lora_{}.weight",
        ),
    ),
    (
        "SDXL, kohya",
        "Stable Diffusion",
        (
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_{}.weight",
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_{}.weight",
        ),
    ),
    (
        "SDXL, diffusers",
        "Stable Diffusion",
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_{}.weight",),
    ),
    (
        "Qwen-Image",
        "Qwen-Image",
        (
            "transformer.transformer_blocks.0.attn.add_q_proj.lora_{}.weight",
            "transformer.transformer_blocks.59.img_mod.1.lora_{}.weight",
        ),
    ),
):

    def _family(file: LoraFile, keys: tuple[str, ...] = keys) -> None:
        down, up = ("down", "up") if "lora_unet" in keys[0] else ("A", "B")
        for key in keys:
            file.tensors[key.format(down)], file.tensors[key.format(up)] = file.random(4, 24), file.random(24, 4)

    refused(f"another family: {name}", COMFY, family, "another model", "no LoRA of a Wan")(_family)


@refused("a wider Wan transformer", COMFY, "not fit", module="blocks.0.attn2.to_k", of_model=True)
def wider(file: LoraFile) -> None:
    for module in FULL:
        file.put(module, ".lora_A.weight", file.random(4, 5120))
        file.put(module, ".lora_B.weight", file.random(5120, 4))


@refused("more blocks than the model", COMFY, "blocks.5", of_model=True)
def more_blocks(file: LoraFile) -> None:
    pairs()(file)
    add_pair(file, "diffusion_model.blocks.5.self_attn.q")


@refused("text encoder only, kohya", MUSUBI, "text encoder")
def text_only(file: LoraFile) -> None:
    add_pair(file, "lora_te_text_model_encoder_layers_0_mlp_fc1", (".lora_down.weight", ".lora_up.weight"))


@refused("text encoder only, diffusers", DIFFUSERS, "text encoder")
def text_only_diffusers(file: LoraFile) -> None:
    add_pair(file, "text_encoder.encoder.block.0.layer.0.SelfAttention.q")


@refused("a whole transformer, diffusers' names", Names("", False), "model", "no LoRA")
def whole(file: LoraFile) -> None:
    file.tensors = {name: value.float() for name, value in file.base.items()}


@refused("a whole transformer, Wan's names", Names("", True), "model", "no LoRA")
def whole_wan(file: LoraFile) -> None:
    for module in FULL:
        for end in ("weight", "bias"):
            file.put(module, f".{end}", file.base[f"{module}.{end}"].float())


@refused("an all-in-one checkpoint", Names("model.diffusion_model.", True), "checkpoint", "model")
def all_in_one(file: LoraFile) -> None:
    whole_wan(file)
    for name in (
        "first_stage_model.encoder.conv1.weight",
        "cond_stage_model.t5xxl.shared.weight",
        "vae.decoder.conv1.weight",
    ):
        file.tensors[name] = file.random(4, 4)


@refused("a checkpoint's state", COMFY, "the optimizer's state of a checkpoint", "lora.safetensors beside it")
def state(file: LoraFile) -> None:
    key = "blocks.0.attn1.to_k.lora_A.weight"
    file.tensors = {f"{key}.{part}": file.random(4, 4) for part in ("exp_avg", "exp_avg_sq")} | {
        "rng.cpu": file.random(9)
    }


@refused("a VAE", COMFY, "no LoRA")
def vae(file: LoraFile) -> None:
    file.tensors = {
        f"encoder.{name}": file.random(4, 4, 3, 3, 3) for name in ("conv1.weight", "middle.0.residual.2.weight")
    }


for suffix in (".pt", ".ckpt", ".bin", ".pth"):

    def _pickle(file: LoraFile, suffix: str = suffix) -> None:
        file.file = f"lora{suffix}"
        file.beside[file.file] = pickle.dumps({"blocks.0.self_attn.q.lora_A.weight": [1.0]})

    refused(f"a pickle, {suffix}", COMFY, "pickle")(_pickle)


@refused("a pickle of torch.save (zip) named .safetensors", COMFY, "pickle")
def zipped(file: LoraFile) -> None:
    import io

    stream = io.BytesIO()
    torch.save({"blocks.0.self_attn.q.lora_A.weight": torch.zeros(2, 2)}, stream)
    file.beside[file.file] = stream.getvalue()


@refused("GGUF", COMFY, "GGUF")
def gguf(file: LoraFile) -> None:
    file.file = "lora.gguf"
    file.beside[file.file] = b"GGUF" + (3).to_bytes(4, "little") + bytes(64)


@refused("a peft folder with adapter_model.bin only", PEFT, "pickle", "adapter_model.safetensors")
def folder_of_pickle(file: LoraFile) -> None:
    file.give_folder = True
    file.peft_config(r=4, lora_alpha=2)
    file.beside["adapter_model.bin"] = pickle.dumps({})


@refused("a folder without an adapter", COMFY, "adapter")
def no_adapter(file: LoraFile) -> None:
    file.give_folder = True
    file.beside["readme.txt"] = "nothing"
