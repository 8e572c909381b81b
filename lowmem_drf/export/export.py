"""Writes a LoRA file for other tools, or the base model with the LoRA merged in; verifies it under a temporary name."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowmem_drf import __version__
from lowmem_drf.errors import BadInputError
from lowmem_drf.export.trained_with import header, public
from lowmem_drf.export.verify import (
    Verified,
    probe_lora,
    require_same_model,
    require_stored,
    verify_export,
    verify_merge,
)
from lowmem_drf.files import written_aside
from lowmem_drf.models.generators import family_of
from lowmem_drf.models.lora.changes import LoraChanges
from lowmem_drf.models.lora.formats import LoraFormat, adapter_metadata, model_hash, to_format

if TYPE_CHECKING:
    from lowmem_drf.models.family import GeneratorConfig
    from lowmem_drf.schema import Config


def host_bytes(transformer: Any, lora: LoraChanges) -> int:
    """Host memory for exporting or merging all blocks, without Python and libraries: the transformer in fp32; four
    copies of the LoRA in fp32 (read, attached, in the file's format, the file); four of the largest weight in fp64
    (its B A, and the addition)."""
    sizes = [parameter.numel() for parameter in transformer.parameters()]
    return (
        4 * sum(sizes)
        + 4 * 4 * sum(pair.a.numel() + pair.b.numel() for pair in lora.pairs.values())
        + 4 * 8 * max(sizes)
    )


def export_lora(
    lora: LoraChanges,
    form: LoraFormat,
    dtype: torch.dtype,
    output: Path,
    transformer: Any,
    metadata: Mapping[str, str],
) -> tuple[Path, Verified]:
    """Writes a temporary file, loads it onto ``transformer`` (the base, fp32, without LoRA; restored afterwards) as its
    readers would, compares, and only then renames it to ``output``.

    Raises:
        BadInputError: the format cannot hold this LoRA, or the file cannot be written.
        LowmemError: the file does not reproduce the tuned model. It is deleted.
    """
    from safetensors.torch import save

    tensors = to_format(lora, form, dtype, family_of(transformer))
    about = {
        "format": "pt",
        **metadata,
        "ss_network_dim": str(lora.rank),
        # describes the file: with alpha folded in, alpha equals the rank
        "ss_network_alpha": str(float(lora.rank) if form == "comfyui" else lora.alpha),
        "lowmem_drf.rank": str(lora.rank),
        "lowmem_drf.alpha": str(lora.alpha),
    }
    if form == "diffusers":
        about |= adapter_metadata(lora)
    about["sshs_model_hash"] = model_hash(save(tensors))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(output, ".part.safetensors") as aside:  # diffusers reads other suffixes as pickles
            aside.write_bytes(save(tensors, metadata=about))
            del tensors
            verified = verify_export(aside, lora, form, dtype, transformer)
    except OSError as error:
        problem = f"{output.parent} cannot be written to: {error.strerror}"
        raise BadInputError(f"{problem}. Give another file with --output.") from error
    return output, verified


def is_export(path: Path) -> bool:
    """True for a LoRA file that ``export_lora`` wrote. A checkpoint's LoRA has another header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return "lowmem_drf.rank" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def merge_lora(
    lora: LoraChanges,
    dtype: torch.dtype,
    folder: Path,
    transformer: Any,
    subfolder: str = "transformer",
) -> Verified:
    """Writes ``folder/subfolder`` (diffusers layout): W + (alpha / rank) B A in fp32, rounded to ``dtype`` except norms
    and time embedding, which diffusers keeps in fp32. ``transformer`` (the base, fp32, without LoRA) is consumed: its
    memory is freed before the merged model is read.

    Raises:
        BadInputError: a LoRA of another model, or the folder cannot be written.
        LowmemError: the model read back differs from the one written, or from the tuned one. It is deleted.
    """
    tuned = probe_lora(transformer, lora)
    kept = transformer._keep_in_fp32_modules or []
    with torch.no_grad():
        for name in lora.pairs:
            transformer.get_submodule(name).weight.add_(lora.delta(name))
        require_same_model(transformer, tuned)
        for name, parameter in transformer.named_parameters():
            if not any(part in kept for part in name.split(".")):
                parameter.data = parameter.data.to(dtype)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(folder) as aside:
            transformer.save_pretrained(aside / subfolder)
            require_stored(aside / subfolder, transformer)
            transformer.to("meta")
            verified = verify_merge(aside, dtype, type(transformer), tuned, subfolder)
            if folder.exists():
                os.rmdir(os.path.realpath(folder))  # export_run checked that it is empty
    except OSError as error:
        problem = f"{folder} cannot be written: {error.strerror or error}"
        raise BadInputError(f"{problem}. Give another folder with --merge.") from error
    return verified


def file_metadata(config: Config, checkpoint: str, generator: GeneratorConfig, expert: str) -> dict[str, str]:
    """A file's header: ``modelspec.*`` (Stability's specification), ``ss_*`` (kohya), and the training settings.
    ``expert``: empty for a model with one transformer."""
    family = family_of(generator).lora_header(generator)
    model, video, sampler, critic = config.model, config.video, config.sampler, config.critic
    step = str(int(checkpoint.removeprefix("step-")))
    training = {
        "version": __version__,
        "method": "Diffusion-DRF (arXiv 2601.04153)",
        "model": model.id,
        "quant": model.storage,
        **({"products": model.products} if model.products != "16bit" else {}),
        **({"expert": f"{expert} noise"} if expert else {}),
        **({"transformer": public(model.transformer)} if model.transformer else {}),
        "base_lora": ", ".join(f"{public(file)} x {scale:g}" for file, scale in model.base_loras()) or "none",
        **({"init_lora": public(config.lora.init)} if config.lora.init else {}),
        "critic": critic.id,
        "questions": critic.mode,
        "reward": critic.reward,
        "graded_steps": f"{sampler.graded_steps} of {sampler.steps} ({sampler.graded}, {sampler.chain})",
        "update": sampler.update,
        **({"timesteps": ", ".join(f"{level:g}" for level in sampler.timesteps)} if sampler.timesteps else {}),
        "shift": sampler.shift,
        "guidance": sampler.guidance,
        **({"max_sigma": f"{config.lora.max_sigma:g}"} if config.lora.max_sigma < 1 else {}),
        "video": f"{video.width}x{video.height}, {video.frames} frames, {video.fps} fps",
        "targets": ",".join(config.lora.targets),
        "steps": step,
        "config_sha256": hashlib.sha256(config.model_dump_json().encode()).hexdigest(),
    }
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{family.version}/lora",
        "modelspec.implementation": family.implementation,
        "modelspec.title": f"lowmem-drf {model.id}{f' {expert} noise' if expert else ''} step {step}",
        "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
        "modelspec.resolution": f"{video.width}x{video.height}",
        "ss_base_model_version": family.version,
        **({"ss_network_module": family.network} if family.network else {}),
        "ss_steps": step,
        "ss_learning_rate": str(config.optim.lr),
        "ss_seed": str(config.seed),
        **{f"lowmem_drf.{key}": str(value) for key, value in training.items()},
        **header(config, expert),
    }
