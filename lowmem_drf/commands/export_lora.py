"""``lowmem-drf export-lora``: a run's LoRA as one file for other tools, or the base model with the LoRA merged in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from lowmem_drf.assembly.loading import load_transformer, prepare_generator
from lowmem_drf.errors import BadInputError, LowmemError
from lowmem_drf.export.export import export_lora, file_metadata, host_bytes, merge_lora
from lowmem_drf.models.generators import GeneratorConfig, generator_config
from lowmem_drf.models.lora.formats import FORMATS, LoraFile, read_lora
from lowmem_drf.models.wan.experts import subfolders_of
from lowmem_drf.models.wan.random_generator import empty_transformer
from lowmem_drf.models.weights.downloads import HOST_MARGIN, available_host_bytes
from lowmem_drf.training.checkpoint import checkpoint_folder
from lowmem_drf.training.run_folder import run_config

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


FEW = 2
"""Blocks of a transformer that is too large for the host."""


_READERS = {
    "comfyui": "ComfyUI (models/loras) and diffusers (pipe.load_lora_weights)",
    "diffusers": "diffusers (pipe.load_lora_weights) and peft",
    "kohya": "musubi-tuner and ComfyUI (models/loras)",
}


@dataclass(frozen=True)
class Exported:
    """What was written. Its text is what the command prints."""

    paths: tuple[Path, ...]
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.lines)


def export_run(
    run: Path,
    step: int | None = None,
    form: str = "comfyui",
    dtype: str | None = None,
    output: Path | None = None,
    merge: Path | None = None,
) -> Exported:
    """Exports the LoRA of a run's checkpoint (``step``; the last one by default).

    ``dtype``: by default that of the run's base model; a bf16 file for a model that runs in fp32 would throw precision
    away. ``output``: the file; by default ``<run>/<run's name>-step-NNNNNN.<format>.safetensors``. ``merge``: a folder
    for the base transformer with the LoRA merged in; the LoRA file is then written only if ``output`` is given too.

    A LoRA is verified on, and merged into, the base's full weights, whatever ``model.quant`` it was trained on.

    Raises:
        BadInputError: no such run, step, format or dtype; an output that cannot be written. Nothing is left behind.
        LowmemError: what was written does not reproduce the tuned model. It is deleted.
    """
    if form not in FORMATS:
        raise BadInputError(f"--format {form} does not exist. Choose one of: {', '.join(FORMATS)}.")
    if dtype is not None and dtype not in DTYPES:
        raise BadInputError(f"--dtype {dtype} does not exist. Choose one of: {', '.join(DTYPES)}.")
    folder = checkpoint_folder(run, step)
    if merge is not None and merge.exists() and (not merge.is_dir() or any(merge.iterdir())):
        raise BadInputError(f"{merge} exists already. Give --merge a folder that does not.")
    config, lora = run_config(run), read_lora(folder / "lora.safetensors")
    dtype = dtype or config.dtype
    generator = prepare_generator(config)
    described = generator_config(str(generator))
    subfolder, other = subfolders_of(described, config.model.expert)
    expert = config.model.expert if other else ""
    blocks = _blocks_to_read(described, subfolder, lora, merge is not None)
    transformer = load_transformer(
        config, generator, torch.float32, torch.device("cpu"), subfolder, quant="none", blocks=blocks
    )
    paths, lines = [], []
    if merge is None or output is not None:
        file = _output_file(
            output, f"{run.resolve().name}-{folder.name}{f'-{expert}-noise' if expert else ''}.{form}.safetensors", run
        )
        metadata = file_metadata(config, folder.name, transformer, expert)
        path, verified = export_lora(lora, form, DTYPES[dtype], file, transformer, metadata)  # type: ignore[arg-type]
        paths.append(path)
        lines += [
            f"{path} ({path.stat().st_size / 2**20:.1f} MiB, {dtype}, rank {lora.rank}) loads in {_READERS[form]}{_place(expert)}.",
            str(verified),
        ]
    if merge is not None:
        verified = merge_lora(lora, DTYPES[dtype], merge, transformer, subfolder)
        paths.append(merge)
        lines += [
            f'{merge} ({dtype}) loads with WanTransformer3DModel.from_pretrained("{merge}", subfolder="{subfolder}").',
            str(verified),
        ]
        if config.model.quant != "none":
            lines.append(
                f"It is the base's full weights with the LoRA in them; the run trained and sampled on {config.model.quant} ones (model.quant)."
            )
    return Exported(tuple(paths), tuple(lines))


def _blocks_to_read(generator: GeneratorConfig, subfolder: str, lora: LoraFile, merges: bool) -> int | None:
    """How many of the transformer's blocks the check reads: all (``None``) where the host has room for ``host_bytes``,
    else the first few.

    Raises:
        LowmemError: a model is to be merged, which needs all.
    """
    free = available_host_bytes()
    needed = host_bytes(empty_transformer(getattr(generator, subfolder)), lora)
    if free is None or needed + HOST_MARGIN <= free:
        return None
    if merges:
        raise LowmemError(
            f"--merge needs the whole transformer in fp32: with the LoRA, {needed / 1e9:.1f} GB of host memory and {HOST_MARGIN / 1e9:.1f} GB besides; "
            f"{free / 1e9:.1f} GB are free. Close other programs or add swap, or export the LoRA alone: that needs less."
        )
    return FEW


def _place(expert: str) -> str:
    """Where a LoRA of one of two experts goes, in words."""
    return (
        f", for the {expert}-noise model{' (diffusers: load_into_transformer_2=True)' if expert == 'low' else ''}"
        if expert
        else ""
    )


def _output_file(output: Path | None, name: str, run: Path) -> Path:
    """The file to write: ``output``, or ``name`` in it where it is a folder, or ``name`` in the run."""
    file = run / name if output is None else output / name if output.is_dir() else output
    if file.suffix != ".safetensors":
        raise BadInputError(f"--output {file} must end in .safetensors: ComfyUI lists no other files.")
    return file
