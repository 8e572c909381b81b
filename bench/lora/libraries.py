"""Files that peft and diffusers write themselves, with the change that they compute themselves."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.lora.facts import LoraFile, base_model, quiet
from bench.lora.names import LINEARS, PEFT
from bench.lora.rows import Row

TARGETS = [name.removeprefix("attn1.").removeprefix("attn2.") for name in LINEARS]
RANKS = {"blocks.0.attn1.to_q": 2, "ffn.net.2": 7}
ALPHAS = {"blocks.0.attn1.to_q": 5, "attn2.to_k": 9}


def _filled(model: Any, seed: int) -> None:
    """Random values that fp32 holds for every trainable parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                # a magnitude of DoRA starts as a norm and stays near it
                near = 0.2 * noise.double() if parameter.ndim == 1 and bool((parameter > 0).all()) else None
                parameter.copy_((parameter + near).float() if near is not None else 0.3 * noise)


def _taken(file: LoraFile, folder: Path, merged: dict[str, torch.Tensor]) -> LoraFile:
    from safetensors import safe_open

    with safe_open(folder / file.file, "pt") as opened:
        file.header = dict(opened.metadata() or {})
        file.tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (it is no mapping)
    is_dora = any("magnitude" in key for key in file.tensors)
    file.trainable = not is_dora
    if (config := folder / "adapter_config.json").exists():
        file.beside[config.name] = config.read_text(encoding="utf-8")
    for name, weight in merged.items():
        if not torch.equal(weight, file.base[name]):
            delta = weight - file.base[name]
            size = (2 * delta.abs().max() + file.base[name].abs().max()).expand(delta.shape)
            file.changed(name, delta, size, roundings=40)
            file.relative |= {name} if is_dora else set()
    return file


def _peft(kind: str, give_folder: bool, seed: int, **config: Any) -> LoraFile:
    import peft

    file = LoraFile(PEFT)
    file.file, file.give_folder = "adapter_model.safetensors", give_folder
    settings = dict(target_modules=TARGETS) | config
    model = peft.get_peft_model(base_model(2), getattr(peft, kind)(**settings))
    _filled(model, seed)
    state = {key: value.float() for key, value in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, state_dict=state)
        merged = model.merge_and_unload()
        return _taken(file, Path(folder), dict(merged.named_parameters()))


def _diffusers(header: bool, adapter: bool, seed: int, **config: Any) -> LoraFile:
    """``adapter``: written by the model's ``save_lora_adapter``, else by the pipeline's ``save_lora_weights``."""
    from diffusers import WanPipeline
    from peft import LoraConfig, get_peft_model_state_dict

    file = LoraFile(PEFT)
    model = base_model(2)
    model.add_adapter(LoraConfig(**(dict(target_modules=TARGETS) | config)))
    _filled(model, seed)
    with quiet(), tempfile.TemporaryDirectory() as folder:
        state = {key: value.float() for key, value in get_peft_model_state_dict(model).items()}
        if adapter:
            file.file = "pytorch_lora_weights.safetensors"
            model.save_lora_adapter(folder, weight_name=file.file)
        else:
            metadata = model.peft_config["default"].to_dict() if header else None
            WanPipeline.save_lora_weights(
                folder,
                transformer_lora_layers=state,
                weight_name=file.file,
                transformer_lora_adapter_metadata=metadata,
            )
        model.fuse_lora()
        merged = {name.replace(".base_layer.", "."): value for name, value in model.named_parameters()}
        return _taken(file, Path(folder), {name: value for name, value in merged.items() if ".lora_" not in name})


LORA = dict(r=4, lora_alpha=2)
PATTERNS: dict[str, Any] = dict(rank_pattern=RANKS, alpha_pattern=ALPHAS)
_OF_PEFT: tuple[tuple[str, str, bool, dict[str, Any]], ...] = (
    ("adapter's folder", "LoraConfig", True, LORA),
    ("the file in its folder", "LoraConfig", False, LORA),
    ("rsLoRA", "LoraConfig", True, LORA | dict(use_rslora=True)),
    ("rank_pattern, alpha_pattern", "LoraConfig", True, LORA | PATTERNS),
    ("rank_pattern, alpha_pattern, rsLoRA", "LoraConfig", False, LORA | PATTERNS | dict(use_rslora=True)),
    ("lora_bias", "LoraConfig", True, LORA | dict(lora_bias=True)),
    ("DoRA", "LoraConfig", True, LORA | dict(use_dora=True)),
    ("DoRA, rsLoRA", "LoraConfig", False, LORA | dict(use_dora=True, use_rslora=True)),
    ("patch embedding too", "LoraConfig", True, LORA | dict(target_modules=[*TARGETS, "patch_embedding"])),
    ("target_modules as an expression", "LoraConfig", True, LORA | dict(target_modules=r".*\.to_(q|v)")),
    ("LoKr", "LoKrConfig", True, dict(r=2, alpha=3)),
    ("LoKr, both decomposed", "LoKrConfig", True, dict(r=1, alpha=3, decompose_both=True, decompose_factor=4)),
    ("LoKr, full factors", "LoKrConfig", True, dict(r=32, alpha=16)),
    ("LoKr, alpha_pattern", "LoKrConfig", True, dict(r=2, alpha=3, alpha_pattern={"attn2.to_k": 5})),
    ("LoHa", "LoHaConfig", True, dict(r=3, alpha=2)),
    ("LoHa, patterns", "LoHaConfig", False, dict(r=3, alpha=2) | PATTERNS),
)
"""Name, configuration, whether the folder is given, settings."""
_OF_DIFFUSERS: tuple[tuple[str, bool, bool, dict[str, Any]], ...] = (
    ("save_lora_weights with header", True, False, LORA),
    ("save_lora_weights with header, rsLoRA", True, False, LORA | dict(use_rslora=True)),
    ("save_lora_weights with header, patterns", True, False, LORA | PATTERNS),
    ("save_lora_weights, no header", False, False, dict(r=4, lora_alpha=4)),
    ("save_lora_weights, DoRA", True, False, LORA | dict(use_dora=True)),
    ("save_lora_adapter", True, True, LORA),
    ("save_lora_adapter, rsLoRA, patterns", True, True, LORA | PATTERNS | dict(use_rslora=True)),
)
"""Name, whether there is a header, whether the model or the pipeline saves, settings."""
ROWS = [
    *(Row(f"peft: {name}", partial(_peft, kind, folder, len(name), **more)) for name, kind, folder, more in _OF_PEFT),
    *(
        Row(f"diffusers: {name}", partial(_diffusers, header, adapter, len(name), **more))
        for name, header, adapter, more in _OF_DIFFUSERS
    ),
]
