"""``lowmem-drf sample``: MP4 clips from a run's model, or from a preset's with any LoRA file; with ``--compare`` beside
the base model's clips."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_drf.assembly.assemble import run_prompts
from lowmem_drf.assembly.generate import NAN, base_and_tuned, flaw
from lowmem_drf.errors import BadInputError, LowmemError
from lowmem_drf.files import readable_name, require_output, short_hash
from lowmem_drf.models.weights.sources import TOYWORLD
from lowmem_drf.prompts import as_prompts, load_prompts
from lowmem_drf.questions import toyworld
from lowmem_drf.schema import Config
from lowmem_drf.shared import tuned
from lowmem_drf.terminal import make_console, say, showing, work_bar
from lowmem_drf.texts import one_line
from lowmem_drf.training.previews import preview_prompts
from lowmem_drf.video import is_own_mp4, read_video, side_by_side, watchable_upscale, write_mp4, write_png

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem_drf.types import Prompt

SAMPLES = Path("samples")
"""Of a preset, in the current folder; a run's clips go into the run."""
EXAMPLE = "a red circle moves left on a gray background"


@dataclass(frozen=True)
class Clip:
    """A clip that was written."""

    prompt: str
    path: Path
    """An MP4: the tuned model's clip, or the base's and the tuned one's side by side."""

    def frames(self) -> Tensor:
        """(T, 3, H, W) in [0, 1], read from the file. Small clips are written larger than they were made."""
        return read_video(self.path)[0]


def sample_command(
    run: Path | None,
    lora: Path | None,
    texts: Sequence[str],
    file: Path | None,
    image: Path | None,
    *arguments: Any,
    **named: Any,
) -> None:
    """``sample_clips``, and prints the path of every clip.

    Args:
        file: prompts after those of ``texts``.
        image: with which the clips of ``texts`` begin.

    Raises BadInputError: ``image`` is no file, or has no text.
    """
    if image is not None and not (texts and image.is_file()):
        why = f"{image} does not exist" if texts else "give its prompt with --prompt; a file names its own images"
        raise BadInputError(f"--image: {why}.")
    asked = [replace(prompt, image=str(image) if image else None) for prompt in as_prompts(texts)]
    for clip in sample_clips(run, lora, (*asked, *(load_prompts(file) if file else ())), *arguments, **named):
        print(clip.path, flush=True)


def sample_clips(
    run_folder: Path | None,
    lora: Path | None,
    asked: Sequence[Prompt],
    compare: bool,
    scale: float,
    seed: int,
    output: Path | None,
    force: bool = False,
    preset: str | None = None,
    overrides: Sequence[str] = (),
    best: bool = False,
) -> Iterator[Clip]:
    """Writes a clip per prompt, and yields it. In a folder an image has a PNG beside it.

    Args:
        asked: default: the sample prompts of the run or the preset.
        preset: in place of a run: its generator, with the file ``lora`` if there is one.
        best: take the run's best update, not its last.

    Raises:
        BadInputError: no run, no such LoRA or one for another model, a scale that is not finite, or an output that
            cannot be written or would replace another program's file (unless ``force``).
        LowmemError: when all clips are made, one is black (written), or NaN (not written).
    """
    if not math.isfinite(scale):
        raise BadInputError(f"--lora-scale {scale} is not a number that can be used; 1 is the tuned model, 0 the base.")
    besides = "; or sample without a run: lowmem-drf sample --preset toy"
    chosen = tuned.choose(run_folder, preset, lora, overrides, best, compare or scale != 1, besides)
    config, run = chosen.config, chosen.run
    wanted = _wanted(config, asked)
    if config.model.id == TOYWORLD and (odd := [one.text for one in wanted if not toyworld.attributes(one.text)]):
        say(f"ToyWorld's generator knows the words of {EXAMPLE!r} and its like, not those of {one_line(odd[0], 80)!r}")
    place = run / "samples" if run else SAMPLES / Path(preset or "").stem
    changed = f"-{short_hash(' '.join(overrides))}" if overrides else ""
    variant = f"seed{seed}{'' if scale == 1 else f'-lora{scale:g}'}{'-compare' if compare else ''}{changed}"
    paths = _paths(output or place / chosen.name, wanted, variant, is_folder=output is None, force=force)
    clips = {"log.eval_batch": min(config.log.eval_batch, len(wanted))}
    console = make_console(stderr=True)
    bases: list[Tensor] = []
    if compare and chosen.is_merged:
        say("clips of the base first, then the model is loaded anew: this LoRA changes more than linear layers")
        with showing(console):
            models = tuned.load(chosen, wanted, with_critic=False, clips=clips, with_lora=False)
        bases = [clip.half() for _, clip in base_and_tuned(config, models, wanted, seed, with_base=False)]
        del models
    with showing(console):
        models = tuned.load(chosen, wanted, with_critic=False, clips=clips, scale=scale)
    if not chosen.has_lora:
        say(f"no --lora: these are clips of the base model, {config.model.id}")
    label = "base" if not chosen.has_lora else "tuned" if scale == 1 else f"tuned, LoRA x {scale:g}"
    upscale = watchable_upscale(config.video.height, config.video.width)
    made = base_and_tuned(config, models, wanted, seed, scale, with_base=compare and not bases)
    flaws: list[str] = []
    with work_bar(console, "clips", len(wanted)) as advance:
        for i, (path, (base, after)) in enumerate(zip(paths, made, strict=True)):
            advance(1)
            base = bases[i].float() if bases else base
            found = {of: flaw(clip) for of, clip in (("base", base), (label, after)) if clip is not None}
            flaws += [f"{path.name} ({of}) {why}" for of, why in found.items() if why]
            if NAN in found.values():
                continue
            if base is None:
                write_mp4(path, after, config.video.fps, upscale)
                if len(after) == 1 and not (output and output.suffix):  # a name with a hash: nobody else's file
                    write_png(path.with_suffix(".png"), after, upscale)
            else:
                write_mp4(path, side_by_side((base, after), ("base", label), upscale), config.video.fps)
            yield Clip(wanted[i].text, path)
    if flaws:
        shown = "; ".join(flaws[:3]) + (f"; and {len(flaws) - 3} more" if len(flaws) > 3 else "")
        raise LowmemError(
            f"clips that cannot be used: {shown}. Clips with NaN were not written.\n{_cure(run, lora is not None)}"
        )


def _cure(run: Path | None, from_file: bool) -> str:
    """What to do about clips that are black or NaN."""
    if not run and not from_file:
        return (
            "No LoRA is at work, so it is the model or its settings: try -s memory.vae_dtype=fp32, "
            "-s kernels.ops=naive -s kernels.attention=sdpa, or more -s sampler.steps."
        )
    good = "Look at the base model's with --lora-scale 0. If they are good, take"
    if run and not from_file:
        return f"{good} the LoRA of an earlier checkpoint: --lora {run / 'checkpoints'}/step-NNNNNN/lora.safetensors"
    return f"{good} less of the LoRA, --lora-scale 0.5; lowmem-drf inspect-lora says which model it was made for."


def _wanted(config: Config, asked: Sequence[Prompt]) -> Sequence[Prompt]:
    """The user's prompts, or else the sample prompts of the run or the preset."""
    if any(not prompt.text.strip() for prompt in asked):
        raise BadInputError(f'a prompt is empty. Give it some words: --prompt "{EXAMPLE}"')
    named = not isinstance(config.log.sample_prompts, int)
    if not asked and not named and not config.prompts:
        raise BadInputError('no prompts: give one with --prompt "a corgi surfing a wave", or a file with --prompts.')
    return asked or preview_prompts(config, () if named or config.prompts == TOYWORLD else run_prompts(config))


def _paths(output: Path, prompts: Sequence[Prompt], variant: str, is_folder: bool, force: bool) -> list[Path]:
    """One path per prompt: ``output`` itself if it ends in .mp4, else files in it. ``variant``: what tells clips of one
    prompt apart. Checks that they may be written."""
    if not is_folder and output.suffix.lower() == ".mp4":
        if len(prompts) > 1:
            raise BadInputError(f"--output {output} is one file, and there are {len(prompts)} prompts. Give a folder.")
        paths = [output]
    elif not is_folder and output.suffix:
        raise BadInputError(f"--output {output}: clips are MP4 files. Give a name that ends in .mp4, or a folder.")
    else:
        number = f"{{:0{len(str(len(prompts)))}d}}-" if len(prompts) > 1 else ""
        numbered = [(number.format(i), prompt) for i, prompt in enumerate(prompts, 1)]
        paths = [
            output / readable_name(prompt.text, i, f"-{short_hash(prompt.text + (prompt.image or ''))}-{variant}.mp4")
            for i, prompt in numbered
        ]
    for path in paths:
        require_output(path, "--output", is_own_mp4, force, kind="clip")
    return paths
