"""A LoRA keeps its effective change through our formats, and through diffusers' loader and back."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from bench.lora.doors import by_base_lora, by_sample
from bench.lora.facts import LoraFile, base_model, worst
from bench.lora.names import ATTENTION, MUSUBI, blocks
from lowmem_drf.models.lora.formats import FORMATS, adapter_metadata, to_format
from lowmem_drf.models.lora.readers import attach_as_diffusers
from lowmem_drf.models.lora.reading import read_lora
from lowmem_drf.models.wan import family as wan

MODULES = {
    "full": blocks(2),
    "attention-only": blocks(2, ATTENTION),
    "partial": ["blocks.0.ffn.net.2", "blocks.1.attn1.to_q"],
    "mixed-rank": blocks(2),
}
KINDS = list(MODULES)


def source(kind: str) -> LoraFile:
    """A LoRA with an alpha that is not its rank; ``mixed-rank``: with a rank and an alpha for each layer."""
    file = LoraFile(MUSUBI)
    for i, module in enumerate(MODULES[kind]):
        rank, alpha = (1 + i % 7, 1 + i % 3) if kind == "mixed-rank" else (4, 2)
        file.pair(module, rank, alpha)
    return file


def exported(file: LoraFile, form: str, folder):
    """The LoRA as our exports write it."""
    lora = read_lora(file.write(folder / "source"))
    path = folder / "exported.safetensors"
    save_file(to_format(lora, form, torch.float32, wan), path, adapter_metadata(lora) if form == "diffusers" else None)
    return path


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_our_formats(kind: str, form: str, tmp_path) -> None:
    file = source(kind)
    path = exported(file, form, tmp_path)
    assert worst(by_base_lora(file, path), file) <= 1


def through_diffusers(path, folder, adapter: bool):
    """Loaded by diffusers' pipeline and saved by it, or by the model."""
    from diffusers import WanPipeline
    from peft import get_peft_model_state_dict

    model = base_model(2)
    attach_as_diffusers(model, path)
    (name,) = model.peft_config
    file = folder / "pytorch_lora_weights.safetensors"
    if adapter:
        model.save_lora_adapter(folder, adapter_name=name, weight_name=file.name)
    else:
        WanPipeline.save_lora_weights(
            folder,
            transformer_lora_layers=get_peft_model_state_dict(model, adapter_name=name),
            weight_name=file.name,
            transformer_lora_adapter_metadata=model.peft_config[name].to_dict(),
        )
    return file


# diffusers converts kohya's names if all modules are there; the other cases add no path of the reader
FAST = [("mixed-rank", "diffusers", False), ("mixed-rank", "comfyui", True)]
CASES = [
    (kind, form, adapter)
    for kind in KINDS
    for form in FORMATS
    for adapter in (False, True)
    if form != "kohya" or MODULES[kind] == blocks(2)
]


@pytest.mark.parametrize(
    ("kind", "form", "adapter"), [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in CASES]
)
def test_diffusers_and_back(kind: str, form: str, adapter: bool, tmp_path) -> None:
    file = source(kind)
    path = through_diffusers(exported(file, form, tmp_path), tmp_path, adapter)
    assert worst(by_base_lora(file, path), file) <= 1
    assert worst(by_sample(file, path), file) <= 1
