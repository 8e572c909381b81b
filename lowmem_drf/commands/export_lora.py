"""``lowmem-drf export-lora``: writes a run's LoRA for other tools, or the base model with the LoRA merged in."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from lowmem_drf.assembly.kernel_choice import as_run
from lowmem_drf.assembly.loading import import_libraries, load_transformer, prepare_generator
from lowmem_drf.errors import BadInputError, LowmemError
from lowmem_drf.export.export import export_lora, file_metadata, host_bytes, is_export, merge_lora
from lowmem_drf.export.trained_with import in_words
from lowmem_drf.files import make_writable, refuse_in_run, release, require_output
from lowmem_drf.models.experts import subfolders_of
from lowmem_drf.models.family import GeneratorConfig
from lowmem_drf.models.generators import family_of, generator_config
from lowmem_drf.models.lora.changes import LoraChanges
from lowmem_drf.models.lora.formats import FORMATS, default_format
from lowmem_drf.models.lora.levels import first_step
from lowmem_drf.models.weights.downloads import HOST_MARGIN, available_host_bytes
from lowmem_drf.scoring.alarm import best_step, lasting
from lowmem_drf.training.checkpoint import checkpoint_folder, step_of
from lowmem_drf.training.lora_file import used_lora
from lowmem_drf.training.run_folder import run_config

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

FEW = 2
"""Blocks that are loaded if the transformer is too large for the host."""

_DIFFUSERS = "diffusers (pipe.load_lora_weights)"
_READERS = {
    "comfyui": f"ComfyUI (models/loras) and {_DIFFUSERS}",
    "diffusers": f"{_DIFFUSERS} and peft",
    "kohya": "musubi-tuner and ComfyUI (models/loras)",
}


@dataclass(frozen=True)
class Exported:
    """The written files, and the text that the command prints."""

    paths: tuple[Path, ...]
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.lines)


def export_run(
    run: Path, step: int | None = None, form: str | None = None, dtype: str | None = None,
    output: Path | None = None, merge: Path | None = None, force: bool = False, best: bool = False,
) -> Exported:  # fmt: skip
    """Exports the LoRA of a run's checkpoint ``step`` (default: the last), or of its best update.

    ``form``: default: ``comfyui``, or ``diffusers`` for a family whose pipeline reads no other. ``dtype``: default:
    that of the run's base model, because a bf16 file would lose precision on a model in fp32.
    ``output``: the file; default: ``<run>/<run's name>-step-NNNNNN.<format>.safetensors``. ``merge``: a folder for the
    base transformer with the LoRA merged in; the LoRA file is then written only if ``output`` is given too. ``force``:
    ``output`` may replace any file that no run needs.

    The LoRA is verified on, and merged into, the base's full weights, also if the run used quantised ones.

    Raises:
        BadInputError: no such run, step, format or dtype; the output cannot be written. Nothing is left behind.
        LowmemError: the written file does not reproduce the tuned model. It is deleted.
    """
    if form is not None and form not in FORMATS:
        raise BadInputError(f"--format {form} does not exist. Choose one of: {', '.join(FORMATS)}.")
    if dtype is not None and dtype not in DTYPES:
        raise BadInputError(f"--dtype {dtype} does not exist. Choose one of: {', '.join(DTYPES)}.")
    if best and step is not None:
        raise BadInputError("--best and --step both choose an update: give one of them.")
    folder = checkpoint_folder(run, best_step(run) if best else step)
    if merge is not None:
        _require_free(merge)
    config = run_config(run)
    lora = used_lora(folder, config)
    dtype = dtype or config.dtype
    import_libraries(config)
    generator = prepare_generator(config)
    described = generator_config(str(generator))
    form = form or default_format(family_of(described))
    subfolder, other = subfolders_of(described, config.model.expert)
    expert = config.model.expert if other else ""
    suffix = f"{f'-{expert}-noise' if expert else ''}.{form}.safetensors"
    file = _output_file(output, f"{run.resolve().name}-{folder.name}{suffix}", run)
    if merge is None or output is not None:
        require_output(file, "--output", is_export, force, kind="LoRA file")
    blocks = _blocks_to_read(described, subfolder, lora, merge is not None)
    cpu = torch.device("cpu")
    transformer = load_transformer(config, generator, torch.float32, cpu, subfolder, quant="none", blocks=blocks)
    paths, lines = [], []
    if merge is None or output is not None:
        metadata = file_metadata(as_run(config, run), folder.name, described, expert)
        path, verified = export_lora(lora, form, DTYPES[dtype], file, transformer, metadata)  # type: ignore[arg-type]
        paths.append(path)
        size = f"{path.stat().st_size / 2**20:.1f} MiB, {dtype}, rank {lora.rank}"
        known = family_of(described).lora_header(described).network  # what other programs read was compared
        lines += [f"{path} ({size}) loads in {_READERS[form] if known else _DIFFUSERS}{_place(expert)}.", str(verified)]
        lines.append(in_words(config, path.name))
    if merge is not None:
        verified = merge_lora(lora, DTYPES[dtype], merge, transformer, subfolder)
        paths.append(merge)
        call = f'{type(transformer).__name__}.from_pretrained({json.dumps(str(merge))}, subfolder="{subfolder}")'
        lines += [f"{merge} ({dtype}) loads with {call}.", str(verified)]
        if first_step(config):
            level = f"lora.max_sigma = {config.lora.max_sigma:g}"
            lines.append(
                f"It has the LoRA in all steps; the run's own clips have it in the later ones alone ({level})."
            )
        if config.model.storage != "none":
            lines.append(
                "It is the base's full weights with the LoRA in them; the run trained and sampled on "
                f"{config.model.storage} ones (model.{'quant' if config.model.quant != 'none' else 'products'})."
            )
    if step is None and not best and (alarm := lasting(run, step_of(folder))):
        lines.append(alarm)
    return Exported(tuple(paths), tuple(lines))


def _require_free(merge: Path) -> None:
    """Raises BadInputError if there is something, or nothing can be. No option replaces a folder."""
    if os.path.lexists(merge) and not (merge.is_dir() and not any(merge.iterdir())):
        raise BadInputError(f"{merge} exists already. Give --merge a folder that does not.")
    refuse_in_run(merge, "--merge")
    release(make_writable(merge.parent, "--merge"))


def _blocks_to_read(generator: GeneratorConfig, subfolder: str, lora: LoraChanges, merges: bool) -> int | None:
    """Number of blocks to load for the check: all (``None``) if ``host_bytes`` fits into host memory, else ``FEW``.

    Raises:
        LowmemError: too little memory for a merge, which needs all blocks.
    """
    free = available_host_bytes()
    needed = host_bytes(family_of(generator).empty_transformer(getattr(generator, subfolder)), lora)
    if free is None or needed + HOST_MARGIN <= free:
        return None
    if merges:
        raise LowmemError(
            f"--merge needs the whole transformer in fp32: with the LoRA, {needed / 1e9:.1f} GB of host memory and "
            f"{HOST_MARGIN / 1e9:.1f} GB besides; {free / 1e9:.1f} GB are free. Close other programs or add swap, or "
            "export the LoRA alone: that needs less."
        )
    return FEW


def _place(expert: str) -> str:
    """Which of two experts the LoRA belongs to, for the printed line."""
    low = " (diffusers: load_into_transformer_2=True)" if expert == "low" else ""
    return f", for the {expert}-noise model{low}" if expert else ""


def _output_file(output: Path | None, name: str, run: Path) -> Path:
    """The file to write: ``output``, ``name`` in it if it is a folder, or by default ``name`` in the run."""
    file = run / name if output is None else output / name if output.is_dir() else output
    if file.suffix != ".safetensors":
        raise BadInputError(f"--output {file} must end in .safetensors: ComfyUI lists no other files.")
    return file
