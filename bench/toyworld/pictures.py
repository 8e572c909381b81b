"""The pictures of docs/toyworld.md (``python -m bench.toyworld.pictures``): scenes, the nine defects, and clips passed
through the VAE."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lowmem_drf.models.wan.vae.decoder import load_vae
from lowmem_drf.models.weights.sources import TOYWORLD, resolve
from lowmem_drf.toy.build.critic import reconstruct
from lowmem_drf.toy.captions import caption
from lowmem_drf.toy.defects import DEFECTS, PHYSICS, break_physics, break_quality
from lowmem_drf.toy.scenes import FRAMES, SIZE, Combo, draw_tracks, render

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"
ZOOM, GAP, LABEL = 2, 4, 300


def strips(rows: list[tuple[str, Tensor]]) -> Image.Image:
    """One film strip per row, with its label to the left. Rows: label, frames (T, 3, H, W) in [0, 1]."""
    side = SIZE * ZOOM
    sheet = Image.new("RGB", (LABEL + FRAMES * (side + GAP) + GAP, len(rows) * (side + GAP) + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for r, (words, frames) in enumerate(rows):
        top = GAP + r * (side + GAP)
        draw.text((LABEL - 10, top + side // 2), words, fill="black", font=font, anchor="rm")
        for t, frame in enumerate(frames):
            pixels = Image.fromarray((frame.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
            sheet.paste(pixels.resize((side, side), Image.Resampling.NEAREST), (LABEL + t * (side + GAP), top))
    return sheet


def main() -> None:
    """Writes three PNG files to docs/images."""
    generator = torch.Generator().manual_seed(4)
    numbers = ((0, 0, 0, 1), (1, 2, 2, 2), (2, 3, 1, 0), (1, 4, 3, 1), (2, 5, 4, 2), (0, 1, 1, 0))
    combos = [Combo(*one) for one in numbers]
    tracks = draw_tracks(combos, generator)
    frames = render(tracks)
    IMAGES.mkdir(parents=True, exist_ok=True)
    texts = [caption(c).replace(" on a ", "\non a ") for c in combos]
    strips(list(zip(texts, frames, strict=True))).save(IMAGES / "toyworld_scenes.png")
    rows = [("clean", frames[3])]
    for kind in DEFECTS:
        physics = kind in PHYSICS
        broken = render(break_physics(tracks, kind, generator)) if physics else break_quality(frames, kind, generator)
        rows.append((kind, broken[3]))
    strips(rows).save(IMAGES / "toyworld_defects.png")
    vae = load_vae(resolve(TOYWORLD, "generator"))
    with torch.no_grad():
        again = reconstruct(vae, frames)
    pairs = [row for i in range(4) for row in ((texts[i], frames[i]), ("through the VAE", again[i]))]
    strips(pairs).save(IMAGES / "toyworld_vae.png")


if __name__ == "__main__":
    main()
