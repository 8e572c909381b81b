"""``lowmem-drf sample``: MP4 clips from a run's model, with ``--compare`` beside the base model's clips."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from lowmem_drf.assembly.assemble import run_prompts
from lowmem_drf.assembly.generate import NAN, base_and_tuned, flaw
from lowmem_drf.assembly.loading import load_models, read_lora_for
from lowmem_drf.errors import BadInputError, LowmemError
from lowmem_drf.files import readable_name, require_output, short_hash
from lowmem_drf.models.weights.sources import TOYWORLD
from lowmem_drf.prompts import load_prompts
from lowmem_drf.schema import Config
from lowmem_drf.terminal import make_console, work_bar
from lowmem_drf.training.checkpoint import checkpoint_folder
from lowmem_drf.training.lora_file import load_run_lora
from lowmem_drf.training.manifest import refuse_damaged
from lowmem_drf.training.previews import preview_texts
from lowmem_drf.training.run_folder import find_run, run_config
from lowmem_drf.video import is_own_mp4, side_by_side, watchable_upscale, write_mp4


def sample_command(
    run_folder: Path | None,
    lora: Path | None,
    texts: Sequence[str],
    file: Path | None,
    compare: bool,
    scale: float,
    seed: int,
    output: Path | None,
    force: bool = False,
) -> None:
    """Writes a clip per prompt and prints its path.

    Raises:
        BadInputError: no run, no such LoRA or one for another model, a scale that is not finite, or an output that
            cannot be written or would replace another program's file (unless ``force``).
        LowmemError: when all clips are made, one is black (written), or NaN (not written).
    """
    if not math.isfinite(scale):
        raise BadInputError(f"--lora-scale {scale} is not a number that can be used; 1 is the tuned model, 0 the base.")
    run = find_run(run_folder)
    config = run_config(run)
    wanted = _texts(config, texts, file)
    if lora is None:
        folder = checkpoint_folder(run)
        source = folder.name
    else:  # files of one name in two folders are two LoRAs
        refuse_damaged(lora)
        loaded = read_lora_for(config, lora)
        source = readable_name(lora.stem, after=f"-{short_hash(str(lora.resolve()))}")
    variant = f"seed{seed}{'' if scale == 1 else f'-lora{scale:g}'}{'-compare' if compare else ''}"
    paths = _paths(output or run / "samples" / source, wanted, variant, is_folder=output is None, force=force)
    clips = {"log.eval_batch": min(config.log.eval_batch, len(wanted))}
    if lora is None:
        models = load_models(config, wanted, with_critic=False, clips=clips)
        load_run_lora(models.transformer, folder, config)
    else:
        models = load_models(config, wanted, with_critic=False, clips=clips, lora=loaded, lora_scale=scale)
    label = "tuned" if scale == 1 else f"tuned, LoRA x {scale:g}"
    upscale = watchable_upscale(config.video.height, config.video.width)
    made = base_and_tuned(config, models, wanted, seed, scale, with_base=compare)
    flaws: list[str] = []
    with work_bar(make_console(stderr=True), "clips", len(wanted)) as advance:
        for path, (base, tuned) in zip(paths, made, strict=True):
            advance(1)
            found = {of: flaw(clip) for of, clip in (("base", base), (label, tuned)) if clip is not None}
            flaws += [f"{path.name} ({of}) {why}" for of, why in found.items() if why]
            if NAN in found.values():
                continue
            if base is None:
                write_mp4(path, tuned, config.video.fps, upscale)
            else:
                write_mp4(path, side_by_side((base, tuned), ("base", label), upscale), config.video.fps)
            print(path, flush=True)
    if flaws:
        shown = "; ".join(flaws[:3]) + (f"; and {len(flaws) - 3} more" if len(flaws) > 3 else "")
        raise LowmemError(
            f"clips that cannot be used: {shown}. Clips with NaN were not written.\n"
            "Look at the base model's with --lora-scale 0. If they are good, take the LoRA of an earlier checkpoint: "
            f"--lora {run / 'checkpoints'}/step-NNNNNN/lora.safetensors"
        )


def _texts(config: Config, texts: Sequence[str], file: Path | None) -> list[str]:
    """The user's prompts, or else the run's sample prompts."""
    asked = [*texts, *(prompt.text for prompt in (load_prompts(file) if file else ()))]
    if any(not text.strip() for text in asked):
        raise BadInputError(
            'a prompt is empty. Give it some words: --prompt "a red circle moves left on a gray background"'
        )
    return asked or preview_texts(config, () if config.prompts == TOYWORLD else run_prompts(config))


def _paths(output: Path, texts: Sequence[str], variant: str, is_folder: bool, force: bool) -> list[Path]:
    """One path per prompt: ``output`` itself if it ends in .mp4, else files in it. ``variant``: what tells clips of one
    prompt apart. Checks that they may be written."""
    if not is_folder and output.suffix.lower() == ".mp4":
        if len(texts) > 1:
            raise BadInputError(f"--output {output} is one file, and there are {len(texts)} prompts. Give a folder.")
        paths = [output]
    elif not is_folder and output.suffix:
        raise BadInputError(f"--output {output}: clips are MP4 files. Give a name that ends in .mp4, or a folder.")
    else:
        number = f"{{:0{len(str(len(texts)))}d}}-" if len(texts) > 1 else ""
        numbered = [(number.format(i), text) for i, text in enumerate(texts, 1)]
        paths = [output / readable_name(text, i, f"-{short_hash(text)}-{variant}.mp4") for i, text in numbered]
    for path in paths:
        require_output(path, "--output", is_own_mp4, force, kind="clip")
    return paths
