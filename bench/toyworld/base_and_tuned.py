"""The README's picture: held-out ToyWorld prompts as film strips, the base model's clip above the tuned one's, from the
same noise.

    python -m bench.toyworld.base_and_tuned RUN --output docs/images/base_and_tuned.png

The prompts are the first of ``heldout_prompts``, none is picked by hand; the oracle's verdict stands beside each strip.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lowmem_drf.assembly.loading import load_models
from lowmem_drf.commands.sample import base_and_tuned
from lowmem_drf.errors import LowmemError
from lowmem_drf.toy.captions import heldout_prompts
from lowmem_drf.toy.oracle import Verdict, judge
from lowmem_drf.training.lora_file import load_run_lora
from lowmem_drf.training.run_folder import find_run, make_writable, run_config

ZOOM, GAP, MARGIN, LABEL = 3, 6, 28, 132
CAPTION_SIZE, LABEL_SIZE, VERDICT_SIZE = 19, 17, 14
INK, GRAY, GREEN, RED, PAPER = "#1f2328", "#59636e", "#1a7f37", "#cf222e", "#ffffff"


@dataclass(frozen=True)
class Strip:
    """A clip with what is said of it."""

    name: str
    frames_TCHW: Tensor  # [0, 1]
    verdict: Verdict


def wrong(verdict: Verdict) -> list[str]:
    """What the oracle finds wrong, in lines that fit beside a strip."""
    lines = [
        [name for name in line if not getattr(verdict, name)]
        for line in (("color", "shape"), ("direction",), ("physics", "quality"))
    ]
    return [", ".join(line) for line in lines if line]


def sheet(rows: Sequence[tuple[str, Sequence[Strip]]]) -> Image.Image:
    """Blocks of strips, each under its prompt."""
    frames, _, height, width = rows[0][1][0].frames_TCHW.shape
    tall, wide = height * ZOOM, width * ZOOM
    block = CAPTION_SIZE + 2 * GAP + sum(tall + GAP for _ in rows[0][1])
    page = Image.new(
        "RGB", (2 * MARGIN + LABEL + frames * (wide + GAP) - GAP, MARGIN + len(rows) * (block + MARGIN)), PAPER
    )
    draw = ImageDraw.Draw(page)
    for r, (prompt, strips) in enumerate(rows):
        top = MARGIN + r * (block + MARGIN)
        draw.text((MARGIN + LABEL, top), prompt.replace(" ,", ","), fill=INK, font=ImageFont.load_default(CAPTION_SIZE))
        for s, strip in enumerate(strips):
            y = top + CAPTION_SIZE + 2 * GAP + s * (tall + GAP)
            faults = wrong(strip.verdict)
            said, colour = ("\n".join(("wrong:", *faults)), RED) if faults else ("all correct", GREEN)
            draw.text((MARGIN, y), strip.name, fill=INK if s else GRAY, font=ImageFont.load_default(LABEL_SIZE))
            draw.multiline_text(
                (MARGIN, y + 23), said, fill=colour, font=ImageFont.load_default(VERDICT_SIZE), spacing=3
            )
            for t, frame in enumerate(strip.frames_TCHW):
                pixels = Image.fromarray((frame.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
                page.paste(
                    pixels.resize((wide, tall), Image.Resampling.NEAREST), (MARGIN + LABEL + t * (wide + GAP), y)
                )
    return page


def picture(run: Path, prompts: int, seed: int) -> Image.Image:
    """The sheet of a run. Raises BadInputError: no such run, or no checkpoint in it."""
    config = run_config(run)
    texts = heldout_prompts(prompts, seed)
    models = load_models(config, texts, with_critic=False)
    load_run_lora(models.transformer, run, config)
    rows = []
    for text, (base, tuned) in zip(texts, base_and_tuned(config, models, texts, seed), strict=True):
        clips = {"base": base, "tuned": tuned}
        rows.append((text, [Strip(name, clip, judge(clip, text)) for name, clip in clips.items() if clip is not None]))
    return sheet(rows)


def main(arguments: list[str] | None = None) -> int:
    """Writes the picture; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.toyworld.base_and_tuned", description=__doc__.partition("\n")[0] if __doc__ else None
    )
    parser.add_argument("run", nargs="?", type=Path, help="a ToyWorld run's folder; default: the latest under runs/")
    parser.add_argument("--output", type=Path, default=Path("docs/images/base_and_tuned.png"))
    parser.add_argument("--prompts", type=int, default=4, help="how many held-out prompts")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts' order and of the noise")
    options = parser.parse_args(arguments)
    try:
        made = picture(find_run(options.run), options.prompts, options.seed)
        make_writable(options.output.absolute().parent)
    except LowmemError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    made.save(options.output, optimize=True)
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
