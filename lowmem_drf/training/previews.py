"""Sample clips that a run writes while it trains: fixed prompts, fixed seeds, one MP4 each, and a PNG of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lowmem_drf.assembly.assemble import Models
from lowmem_drf.assembly.generate import NAN, batches, flaw
from lowmem_drf.assembly.sizes import latent_shape
from lowmem_drf.distributed.ranks import ALONE, Ranks
from lowmem_drf.errors import BadInputError
from lowmem_drf.files import readable_name
from lowmem_drf.models.generators import family_of
from lowmem_drf.models.lora.levels import require_use
from lowmem_drf.models.weights.sources import TOYWORLD
from lowmem_drf.prompts import as_prompts, named_prompts
from lowmem_drf.schema import Config
from lowmem_drf.terminal import say, working
from lowmem_drf.types import Prompt
from lowmem_drf.video import to_pixels, watchable_upscale, write_mp4, write_png


def preview_prompts(config: Config, prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
    """Those of ``log.sample_prompts``: for a number held-out prompts in ToyWorld, else the first of ``prompts``."""
    chosen = config.log.sample_prompts
    if not isinstance(chosen, int):
        return named_prompts(chosen)
    if config.prompts == TOYWORLD:
        from lowmem_drf.toy.captions import heldout_prompts

        return as_prompts(heldout_prompts(chosen, seed=0))
    return tuple(prompts[:chosen])


def as_previewed(config: Config, models: Models) -> tuple[Config, Models]:
    """Both with the size and the steps of sample clips. Raises BadInputError: the size does not fit the models, or the
    LoRA would be used in no step (``lora.max_sigma``)."""
    log, video, sampler = config.log, config.video, config.sampler
    sides = {name: getattr(log, f"sample_{name}") or getattr(video, name) for name in ("width", "height", "frames")}
    if log.sample_steps and log.sample_steps != sampler.steps:
        sampler = sampler.model_copy(update={"steps": log.sample_steps, "timesteps": []})
        models = replace(models, first_level=1.0)
    config = config.model_copy(update={"video": video.model_copy(update=sides), "sampler": sampler})
    if config.video != video:
        if models.images:
            raise BadInputError(
                "prompts with an image have sample clips of the run's own size, for which their images are encoded. "
                "Leave out log.sample_width, log.sample_height and log.sample_frames."
            )
        try:
            sizes = family_of(models.transformer).sizes(models.transformer.config, models.decoder.vae.config)
            shape = latent_shape(config, sizes)
        except BadInputError as error:
            raise BadInputError(str(error).replace("video.", "log.sample_")) from error
        models = replace(models, latent_shape=shape)
    try:
        require_use(config)
    except BadInputError as error:
        raise BadInputError(str(error).replace("sampler.steps", "log.sample_steps")) from error
    return config, models


def write_previews(
    config: Config, run: Path, models: Models, prompts: Sequence[Prompt], step: int, ranks: Ranks = ALONE
) -> Path:
    """Writes ``samples/step-000050/01-<prompt>.mp4`` for every prompt, from the same noise at every step. Ranks share
    the clips, and the chief writes them, and says which are black, or NaN: those are not written. Returns the folder.
    """
    folder = run / "samples" / f"step-{step:06d}"
    config, models = as_previewed(config, models)
    upscale = watchable_upscale(config.video.height, config.video.width)
    seeds = [config.log.sample_seed] * len(prompts)
    with working(f"clips of step {step}", len(prompts)) as advance:
        for here, made, new in batches(models, config.sampler, prompts, seeds, config.log.eval_batch, ranks):
            rows = zip(here, made.frames_BTCHW, strict=True) if new else ()
            clips = [(i, why := flaw(frames), None if why == NAN else to_pixels(frames)) for i, frames in rows]
            for i, why, pixels in (clip for some in ranks.gather(clips) for clip in some):
                file = folder / readable_name(prompts[i].text, f"{i + 1:02d}-", ".mp4")
                if why and ranks.chief:
                    say(f"update {step}: the sample clip {file.name} {why}")
                if pixels is not None and ranks.chief:
                    write_mp4(file, pixels, config.video.fps, upscale)
                    if len(pixels) == 1:
                        write_png(file.with_suffix(".png"), pixels, upscale)
                advance(1)
    return folder
