"""Sample clips that a run writes while it trains: fixed prompts, fixed seeds, one MP4 each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowmem_drf.assembly.assemble import Models
from lowmem_drf.assembly.generate import NAN, batches, flaw
from lowmem_drf.distributed.ranks import ALONE, Ranks
from lowmem_drf.files import readable_name
from lowmem_drf.models.weights.sources import TOYWORLD
from lowmem_drf.schema import Config
from lowmem_drf.terminal import say, working
from lowmem_drf.types import Prompt
from lowmem_drf.video import to_pixels, watchable_upscale, write_mp4

PREVIEW_SEED = 0


def preview_texts(config: Config, prompts: Sequence[Prompt]) -> list[str]:
    """Held-out prompts in ToyWorld, else the first of the prompt file."""
    if config.prompts == TOYWORLD:
        from lowmem_drf.toy.captions import heldout_prompts

        return heldout_prompts(config.log.sample_prompts, seed=0)
    return [prompt.text for prompt in prompts[: config.log.sample_prompts]]


def write_previews(
    config: Config, run: Path, models: Models, texts: Sequence[str], step: int, ranks: Ranks = ALONE
) -> Path:
    """Writes ``samples/step-000050/01-<prompt>.mp4`` for every text, from the same noise at every step. Ranks share the
    clips, and the chief writes them, and says which are black, or NaN: those are not written. Returns the folder."""
    folder = run / "samples" / f"step-{step:06d}"
    upscale = watchable_upscale(config.video.height, config.video.width)
    seeds = [PREVIEW_SEED] * len(texts)
    with working(f"clips of step {step}", len(texts)) as advance:
        for here, made, new in batches(models, config.sampler, texts, seeds, config.log.eval_batch, ranks):
            rows = zip(here, made.frames_BTCHW, strict=True) if new else ()
            clips = [(i, why := flaw(frames), None if why == NAN else to_pixels(frames)) for i, frames in rows]
            for i, why, pixels in (clip for some in ranks.gather(clips) for clip in some):
                file = folder / readable_name(texts[i], f"{i + 1:02d}-", ".mp4")
                if why and ranks.chief:
                    say(f"update {step}: the sample clip {file.name} {why}")
                if pixels is not None and ranks.chief:
                    write_mp4(file, pixels, config.video.fps, upscale)
                advance(1)
    return folder
