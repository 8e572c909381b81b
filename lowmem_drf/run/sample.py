"""``lowmem-drf sample``: MP4 clips of a run's model, with ``--compare`` beside the base model's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem_drf.errors import BadInputError
from lowmem_drf.models.lora import lora_scale
from lowmem_drf.models.sources import TOYWORLD
from lowmem_drf.prompts import load_prompts
from lowmem_drf.run.folder import find_run, run_config
from lowmem_drf.run.generate import batches
from lowmem_drf.run.lora_file import load_lora_file, load_run_lora
from lowmem_drf.run.parts import Models, load_models, run_prompts
from lowmem_drf.run.previews import preview_texts, slug
from lowmem_drf.run.video import side_by_side, watchable_upscale, write_mp4
from lowmem_drf.schema import Config

if TYPE_CHECKING:
    from torch import Tensor


def sample_command(
    run_folder: Path | None,
    lora: Path | None,
    texts: Sequence[str],
    file: Path | None,
    compare: bool,
    scale: float,
    seed: int,
    output: Path | None,
) -> None:
    """Writes a clip per prompt and prints each file's path.

    Raises BadInputError: no run, no such LoRA, a LoRA of another model, a scale that is not finite, an output that cannot be written.
    """
    if not math.isfinite(scale):
        raise BadInputError(f"--lora-scale {scale} is not a number that can be used; 1 is the tuned model, 0 the base.")
    run = find_run(run_folder)
    config = run_config(run)
    wanted = _texts(config, texts, file)
    models = load_models(config, wanted, with_critic=False)
    if lora is not None:
        load_lora_file(models.transformer, lora)
        source = lora.stem
    else:
        source = f"step-{load_run_lora(models.transformer, run, config):06d}"
    paths = _paths(output or run / "samples" / source, wanted, seed, compare, is_folder=output is None)
    for path, clip in zip(paths, make_clips(config, models, wanted, scale, seed, compare), strict=True):
        print(write_mp4(path, clip, config.video.fps))


def make_clips(config: Config, models: Models, texts: Sequence[str], scale: float, seed: int, compare: bool) -> list[Tensor]:
    """Frames (T, 3, H, W) in [0, 1] of each text, big enough to watch; with ``compare`` base and tuned from the same noise, labelled."""
    upscale = watchable_upscale(config.video.height, config.video.width)
    tuned = _frames(config, models, texts, scale, seed)
    if not compare:
        return [clip.repeat_interleave(upscale, -1).repeat_interleave(upscale, -2) for clip in tuned]
    base = _frames(config, models, texts, 0.0, seed)
    label = "tuned" if scale == 1 else f"tuned, LoRA x {scale:g}"
    return [side_by_side(pair, ("base", label), upscale) for pair in zip(base, tuned, strict=True)]


def _frames(config: Config, models: Models, texts: Sequence[str], scale: float, seed: int) -> list[Tensor]:
    with lora_scale(models.transformer, scale):
        made = batches(models, config.sampler, texts, [seed] * len(texts), config.log.eval_batch)
        return [clip.float().cpu() for _, batch in made for clip in batch.frames_BTCHW]


def _texts(config: Config, texts: Sequence[str], file: Path | None) -> list[str]:
    """What the user asked for; where that is nothing, the run's own sample prompts."""
    asked = [*texts, *(prompt.text for prompt in (load_prompts(file) if file else ()))]
    if any(not text.strip() for text in asked):
        raise BadInputError('a prompt is empty. Give it some words: --prompt "a red circle moves left on a gray background"')
    return asked or preview_texts(config, () if config.prompts == TOYWORLD else run_prompts(config))


def _paths(output: Path, texts: Sequence[str], seed: int, compare: bool, is_folder: bool) -> list[Path]:
    """A file for one prompt (``output`` itself if it ends in .mp4), a folder of files for several."""
    if not is_folder and output.suffix.lower() == ".mp4":
        if len(texts) > 1:
            raise BadInputError(f"--output {output} is one file, and there are {len(texts)} prompts. Give a folder.")
        return [_writable(output)]
    if not is_folder and output.suffix:
        raise BadInputError(f"--output {output}: clips are MP4 files. Give a name that ends in .mp4, or a folder.")
    ending = f"seed{seed}{'-compare' if compare else ''}.mp4"
    number = f"{{:0{len(str(len(texts)))}d}}-" if len(texts) > 1 else ""
    return [_writable(output / f"{number.format(i)}{slug(text)}-{ending}") for i, text in enumerate(texts, 1)]


def _writable(path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInputError(f"{path.parent} cannot be written to: {error.strerror}. Give another --output.") from error
    return path
