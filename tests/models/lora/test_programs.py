"""Which programs take a LoRA file: diffusers' own loader decides whether the report is right about diffusers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from _tiny import tiny_transformer
from safetensors.torch import save_file
from torch import Tensor

from lowmem_drf.errors import LowmemError
from lowmem_drf.models.lora.adapter import lora_layers
from lowmem_drf.models.lora.readers import attach_as_diffusers
from lowmem_drf.models.lora.reading import read_lora
from lowmem_drf.models.wan.names import BLOCK_LINEARS, wan_name
from lowmem_drf.models.wan.programs import verdicts
from lowmem_drf.models.weights.reader import parameter_shapes

LINEARS = list(BLOCK_LINEARS)
ATTENTION = [name for name in LINEARS if "attn" in name]
SIDES, DOWN_UP = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
SHAPES = parameter_shapes(tiny_transformer())


def written(
    prefix: str,
    named: Callable[[str], str],
    sides: tuple[str, str],
    alpha: bool = False,
    modules: list[str] = LINEARS,
    outside: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """The tensors of a LoRA of rank 2."""
    made: dict[str, Tensor] = {}
    for module in (*(f"blocks.{i}.{name}" for i in range(2) for name in modules), *outside):
        out, *into = SHAPES[f"{module}.weight"]
        stem = prefix + named(module)
        made[f"{stem}.{sides[0]}"] = torch.ones(2, math.prod(into))
        made[f"{stem}.{sides[1]}"] = torch.ones(out, 2)
        if alpha:
            made[f"{stem}.alpha"] = torch.tensor(1.0)
    return made


def flat(module: str) -> str:
    return wan_name(module).replace(".", "_")


def same(module: str) -> str:
    return module


def comfy(*outside: str, **others: str) -> dict[str, Tensor]:
    """ComfyUI's layout; ``others``: the parameter that a key with double underscores for dots changes."""
    whole = {f"diffusion_model.{key.replace('__', '.')}": torch.ones(SHAPES[name]) for key, name in others.items()}
    return written("diffusion_model.", wan_name, SIDES, outside=outside) | whole


EMBEDDER = "condition_embedder"
FILES: dict[str, dict[str, Tensor]] = {
    "ComfyUI": comfy(),
    "ComfyUI, attention, down and up": written("diffusion_model.", wan_name, DOWN_UP, True, ATTENTION),
    "ComfyUI, outside": comfy("proj_out", f"{EMBEDDER}.time_proj", f"{EMBEDDER}.text_embedder.linear_1"),
    "ComfyUI, one bias": comfy(blocks__0__self_attn__q__diff_b="blocks.0.attn1.to_q.bias"),
    "ComfyUI, biases": comfy(
        **{
            f"{wan_name(f'blocks.{i}.{name}').replace('.', '__')}__diff_b": f"blocks.{i}.{name}.bias"
            for i in range(2)
            for name in LINEARS
        }
    ),
    "ComfyUI, norms": comfy(
        blocks__0__norm3__diff="blocks.0.norm2.weight", blocks__0__norm3__diff_b="blocks.0.norm2.bias"
    ),
    "ComfyUI, modulation": comfy(blocks__0__diff_m="blocks.0.scale_shift_table"),
    "ComfyUI, time bias alone": comfy(time_projection__1__diff_b=f"{EMBEDDER}.time_proj.bias"),
    "ComfyUI, text bias alone": comfy(text_embedding__0__diff_b=f"{EMBEDDER}.text_embedder.linear_1.bias"),
    "ComfyUI, patches": comfy("patch_embedding"),
    "ComfyUI, diffusers' names": written("diffusion_model.", same, SIDES),
    "kohya": written("lora_unet_", flat, DOWN_UP, True),
    "kohya, attention": written("lora_unet_", flat, DOWN_UP, True, ATTENTION),
    "kohya, no alpha": written("lora_unet_", flat, DOWN_UP),
    "VideoX-Fun": written("lora_unet__", flat, DOWN_UP, True),
    "diffusers": written("transformer.", same, SIDES, modules=ATTENTION),
    "diffusers, alpha": written("transformer.", same, SIDES, True),
    "diffusers, down and up": written("transformer.", same, DOWN_UP),
    "diffusers, Wan's names": written("transformer.", wan_name, SIDES),
    "diffusers, an adapter's name": written("transformer.", same, ("lora_A.default.weight", "lora_B.default.weight")),
    "no prefix": written("", same, SIDES),
    "peft": written("base_model.model.", same, SIDES),
    "LyCORIS": {
        f"lycoris_blocks_0_attn1_to_q.{part}": torch.ones(shape)
        for part, shape in (("lokr_w1", (2, 2)), ("lokr_w2", (12, 12)), ("alpha", ()))
    },
    "OneTrainer": written("lora_transformer_", lambda name: name.replace(".", "_"), DOWN_UP, True),
}


def header(tensors: dict[str, torch.Tensor]) -> dict[str, dict]:
    """A file's header, as far as it is looked at."""
    return {name: {"dtype": "F32", "shape": list(value.shape)} for name, value in tensors.items()}


@pytest.mark.slow
@pytest.mark.parametrize("layout", FILES)
def test_diffusers_takes_what_the_report_says(layout: str, tmp_path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file(FILES[layout], path)
    try:
        lora = read_lora(path)
    except LowmemError:
        pytest.skip("this program refuses it, and there is no report")
    transformer, taken = tiny_transformer(), set()
    try:
        attach_as_diffusers(transformer, path)
    except Exception:
        pass
    else:
        empty = any(parameter.is_meta for parameter in transformer.parameters())  # it fails when it is called
        for module, layer in () if empty else lora_layers(transformer).items():
            (adapter,) = layer.lora_A
            if layer.lora_B[adapter].weight.any():
                taken.add(f"{module}.weight")
            if layer.lora_B[adapter].bias is not None and layer.lora_B[adapter].bias.any():
                taken.add(f"{module}.bias")
    wanted = {f"{module}.weight" for module in lora.pairs} | set(lora.others)
    says = next(row for row in verdicts(lora, header(FILES[layout])) if row.program == "diffusers")
    assert says.takes == ("yes" if taken == wanted else "in part" if taken else "no"), says.why
    assert bool(says.why) == (says.takes != "yes")


@pytest.mark.parametrize(
    ("layout", "comfyui", "musubi"),
    [
        ("ComfyUI", "yes", "no"),
        ("ComfyUI, norms", "yes", "no"),
        ("ComfyUI, modulation", "in part", "no"),
        ("kohya", "yes", "yes"),
        ("kohya, no alpha", "yes", "yes"),
        ("VideoX-Fun", "yes", "no"),
        ("diffusers", "no", "no"),
        ("peft", "no", "no"),
    ],
)
def test_comfyui_and_musubi_tuner_know_these_names(layout: str, comfyui: str, musubi: str, tmp_path) -> None:
    """As their sources say; neither is installed here."""
    save_file(FILES[layout], tmp_path / "lora.safetensors")
    said = {row.program: row for row in verdicts(read_lora(tmp_path / "lora.safetensors"), header(FILES[layout]))}
    assert (said["ComfyUI"].takes, said["musubi-tuner"].takes) == (comfyui, musubi)
    assert ("convert_lora.py" in said["musubi-tuner"].why) == (layout == "ComfyUI")
