"""The README's moving picture: clips of held-out ToyWorld prompts from the same noise, base model above tuned model.

    python -m bench.toyworld.base_and_tuned RUN --output docs/images/base_and_tuned.gif

The prompts are the first of ``heldout_prompts``; none is picked by hand. The oracle's verdict stands under each clip.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from bench.script import reports_errors
from lowmem_drf.assembly.generate import base_and_tuned
from lowmem_drf.assembly.loading import load_models
from lowmem_drf.files import make_writable
from lowmem_drf.toy.captions import heldout_prompts
from lowmem_drf.toy.oracle import Verdict, judge
from lowmem_drf.training.lora_file import load_run_lora
from lowmem_drf.training.run_folder import find_run, run_config

ZOOM, GAP, MARGIN, SIDE, LINE, TEXT = 4, 12, 16, 58, 17, 14  # pixels
INK, GRAY, GREEN, RED, PAPER = "#1f2328", "#59636e", "#1a7f37", "#cf222e", "#ffffff"
CHECKED = ("color", "shape", "direction", "physics", "quality")


@dataclass(frozen=True)
class Column:
    """A prompt with the clips of the base and the tuned model, each with the oracle's verdict."""

    prompt: str
    clips: tuple[tuple[Tensor, Verdict], ...]  # frames (T, 3, H, W) in [0, 1]


def said(verdict: Verdict) -> tuple[str, str]:
    """The oracle's verdict as text, and the colour of the text."""
    wrong = [name for name in CHECKED if not getattr(verdict, name)]
    return (f"wrong {', '.join(wrong[:2])}", RED) if wrong else ("right", GREEN)


def moving_picture(columns: Sequence[Column]) -> list[Image.Image]:
    """One picture per frame of the clips, with one column per prompt."""
    frames, _, height, width = columns[0].clips[0][0].shape
    tall, wide, head = height * ZOOM, width * ZOOM, 3 * LINE + 4
    row = tall + LINE + GAP
    size = (2 * MARGIN + SIDE + len(columns) * (wide + GAP) - GAP, 2 * MARGIN + head + 2 * row - GAP)
    page = Image.new("RGB", size, PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(TEXT)
    places = []
    for r, name in enumerate(("base", "tuned")):
        draw.text((MARGIN, MARGIN + head + r * row + tall // 2 - LINE // 2), name, fill=(GRAY, INK)[r], font=font)
    for c, column in enumerate(columns):
        left = MARGIN + SIDE + c * (wide + GAP)
        lines = textwrap.wrap(column.prompt.replace(" ,", ","), 20)[:3]
        draw.multiline_text((left, MARGIN), "\n".join(lines), fill=INK, font=font, spacing=3)
        for r, (clip, verdict) in enumerate(column.clips):
            top = MARGIN + head + r * row
            text, colour = said(verdict)
            draw.text((left, top + tall + 1), text, fill=colour, font=font)
            places.append(((left, top), (clip.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()))
    pictures = []
    for t in range(frames):
        picture = page.copy()
        for place, pixels in places:
            picture.paste(Image.fromarray(pixels[t]).resize((wide, tall), Image.Resampling.NEAREST), place)
        pictures.append(picture)
    return pictures


def columns_of(run: Path, prompts: int, seed: int) -> list[Column]:
    """The clips of a run. Raises BadInputError: no such run, or no checkpoint in it."""
    config = run_config(run)
    texts = heldout_prompts(prompts, seed)
    models = load_models(config, texts, with_critic=False)
    load_run_lora(models.transformer, run, config)
    pairs = zip(texts, base_and_tuned(config, models, texts, seed), strict=True)
    return [Column(text, tuple((clip, judge(clip, text)) for clip in pair if clip is not None)) for text, pair in pairs]


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Writes the GIF; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.toyworld.base_and_tuned", description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, help="a ToyWorld run's folder; default: the latest under runs/")
    parser.add_argument("--output", type=Path, default=Path("docs/images/base_and_tuned.gif"))
    parser.add_argument("--prompts", type=int, default=6, help="how many held-out prompts")
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts' order and of the noise")
    options = parser.parse_args(arguments)
    pictures = moving_picture(columns_of(find_run(options.run), options.prompts, options.seed))
    make_writable(options.output.absolute().parent)
    durations = [160] * (len(pictures) - 1) + [900]  # ms; the last frame rests
    animation = {"save_all": True, "append_images": pictures[1:], "duration": durations, "loop": 0}
    pictures[0].save(options.output, optimize=True, **animation)
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
