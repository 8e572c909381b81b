"""The README's moving picture: clips of held-out ToyWorld prompts from the same noise, base model above tuned model.

    python -m bench.toyworld.base_and_tuned RUN --output docs/images/base_and_tuned.gif --force

The prompts are the first of ``heldout_prompts``; none is picked by hand. The oracle's verdict stands under each clip.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from bench.script import reports_errors
from lowmem_drf.assembly.generate import base_and_tuned
from lowmem_drf.assembly.loading import load_models
from lowmem_drf.files import require_output, written_aside
from lowmem_drf.prompts import as_prompts
from lowmem_drf.questions.toyworld import attributes
from lowmem_drf.toy.captions import heldout_prompts
from lowmem_drf.toy.oracle import Verdict, judge
from lowmem_drf.training.checkpoint import checkpoint_folder
from lowmem_drf.training.lora_file import load_run_lora
from lowmem_drf.training.run_folder import find_run, run_config

ZOOM, GAP, MARGIN, SIDE, LINE, TEXT = 3, 16, 16, 50, 16, 13  # pixels
ACROSS = 6
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
    return (f"wrong {wrong[0]}", RED) if wrong else ("right", GREEN)


def asked(prompt: str) -> str:
    """What a caption asks for, in two short lines."""
    named = attributes(prompt) or {}
    moves = "stays" if named["direction"] == "still" else f"moves {named['direction']}"
    return f"{named['color']} {named['shape']}\n{moves}"


def moving_picture(columns: Sequence[Column]) -> list[Image.Image]:
    """One picture per frame of the clips: blocks of six columns, one column per prompt."""
    frames, _, height, width = columns[0].clips[0][0].shape
    tall, wide, across = height * ZOOM, width * ZOOM, min(ACROSS, len(columns))
    row = tall + LINE + GAP // 2
    block = 2 * LINE + 4 + 2 * row + GAP
    size = (2 * MARGIN + SIDE + across * (wide + GAP) - GAP, MARGIN + LINE + GAP - (-len(columns) // across) * block)
    page = Image.new("RGB", size, PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(TEXT)
    right = [sum(said(column.clips[r][1])[0] == "right" for column in columns) for r in (0, 1)]
    counts = f"right, of {len(columns)} clips: base {right[0]}, tuned {right[1]}"
    draw.text((MARGIN + SIDE, MARGIN // 2), counts, fill=INK, font=font)
    places = []
    for c, column in enumerate(columns):
        left, up = MARGIN + SIDE + c % across * (wide + GAP), MARGIN + LINE + c // across * block
        draw.multiline_text((left, up), asked(column.prompt), fill=INK, font=font, spacing=2)
        for r, (clip, verdict) in enumerate(column.clips):
            top = up + 2 * LINE + 4 + r * row
            if c % across == 0:
                draw.text((MARGIN, top + tall // 2 - LINE // 2), ("base", "tuned")[r], fill=(GRAY, INK)[r], font=font)
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
    asked = as_prompts(texts)
    models = load_models(config, asked, with_critic=False)
    load_run_lora(models.transformer, checkpoint_folder(run), config)
    pairs = zip(texts, base_and_tuned(config, models, asked, seed), strict=True)
    return [Column(text, tuple((clip, judge(clip, text)) for clip in pair if clip is not None)) for text, pair in pairs]


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Writes the GIF; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.toyworld.base_and_tuned", description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, help="a ToyWorld run's folder; default: the latest under runs/")
    parser.add_argument("--output", type=Path, default=Path("docs/images/base_and_tuned.gif"))
    parser.add_argument("--force", action="store_true", help="replace a picture that is there")
    parser.add_argument("--prompts", type=int, default=12, help="how many held-out prompts")
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts' order and of the noise")
    options = parser.parse_args(arguments)
    require_output(options.output, "--output", lambda existing: False, options.force, kind="GIF")
    pictures = moving_picture(columns_of(find_run(options.run), options.prompts, options.seed))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    durations = [160] * (len(pictures) - 1) + [900]  # ms; the last frame rests
    animation = {"save_all": True, "append_images": pictures[1:], "duration": durations, "loop": 0}
    with written_aside(options.output, ".gif") as aside:
        pictures[0].save(aside, optimize=True, **animation)
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
