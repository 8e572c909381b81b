"""What diversity means, as a picture: the same prompts from several noises, by the base and by runs of the study.

    python -m bench.evidence.alike RUN [RUN ...] --output docs/images/evidence_alike.png --force

The prompts are the first of ``heldout_prompts``, the noises those of seeds 0, 1, …; none is picked by hand. A clip's
frame in the middle stands for it, the run's name before its row. The base is that of the first run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from bench.script import reports_errors
from bench.toyworld.base_and_tuned import GAP, INK, LINE, MARGIN, PAPER, TEXT, ZOOM, asked
from lowmem_drf.assembly.generate import base_and_tuned
from lowmem_drf.assembly.loading import load_models
from lowmem_drf.files import require_output, written_aside
from lowmem_drf.prompts import as_prompts
from lowmem_drf.toy.captions import heldout_prompts
from lowmem_drf.training.checkpoint import checkpoint_folder
from lowmem_drf.training.lora_file import load_run_lora
from lowmem_drf.training.run_folder import run_config

SIDE = 110
"""Pixels for a row's name."""
Clips = list[list[Tensor]]
"""For each prompt, one of each noise: (T, 3, H, W) in [0, 1]."""


def clips_of(run: Path, texts: Sequence[str], noises: int) -> tuple[Clips, Clips]:
    """The base's clips and the run's."""
    config, prompts = run_config(run), as_prompts(texts)
    models = load_models(config, prompts, with_critic=False)
    load_run_lora(models.transformer, checkpoint_folder(run), config)
    made = [list(base_and_tuned(config, models, prompts, seed)) for seed in range(noises)]
    pairs = list(zip(*made, strict=True))  # by prompt
    bases = [[base for base, _ in some if base is not None] for some in pairs]
    return bases, [[tuned for _, tuned in some] for some in pairs]


def picture(rows: Sequence[tuple[str, Clips]], texts: Sequence[str]) -> Image.Image:
    """A row of clips for each name, a block of columns for each prompt."""
    noises, (_, _, height, width) = len(rows[0][1][0]), rows[0][1][0][0].shape
    wide, tall = width * ZOOM, height * ZOOM
    block, row = noises * (wide + GAP // 4) + GAP, tall + GAP // 2
    size = (2 * MARGIN + SIDE + len(texts) * block - GAP, 2 * MARGIN + 2 * LINE + len(rows) * row)
    page = Image.new("RGB", size, PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(TEXT)
    for p, text in enumerate(texts):
        draw.text((MARGIN + SIDE + p * block, MARGIN), asked(text).replace("\n", ", "), fill=INK, font=font)
    for r, (name, clips) in enumerate(rows):
        top = MARGIN + 2 * LINE + r * row
        draw.text((MARGIN, top + tall // 2 - LINE // 2), name, fill=INK, font=font)
        for p, some in enumerate(clips):
            for n, clip in enumerate(some):
                pixels = (clip[len(clip) // 2].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
                still = Image.fromarray(pixels).resize((wide, tall), Image.Resampling.NEAREST)
                page.paste(still, (MARGIN + SIDE + p * block + n * (wide + GAP // 4), top))
    return page


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Writes the PNG; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.evidence.alike", description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--force", action="store_true", help="replace a picture that is there")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--noises", type=int, default=5)
    options = parser.parse_args(arguments)
    require_output(options.output, "--output", lambda existing: False, options.force, kind="PNG")
    texts, rows = heldout_prompts(options.prompts), list[tuple[str, Clips]]()
    variants = [run.name.rpartition("_")[0] or run.name for run in options.runs]  # the study's folders: variant_seed
    for run, variant in zip(options.runs, variants, strict=True):
        base, tuned = clips_of(run, texts, options.noises)
        rows += [("base", base)] if not rows else []
        rows.append((variant if variants.count(variant) == 1 else run.name, tuned))
    with written_aside(options.output, ".png") as aside:
        picture(rows, texts).save(aside, optimize=True)
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
