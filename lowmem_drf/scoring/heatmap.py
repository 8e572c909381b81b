"""The saliency clip: the video, its reward gradient as heat, and each question with its map, answer and probability."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from lowmem_drf.video import write_mp4

if TYPE_CHECKING:
    from PIL import Image
    from PIL.ImageFont import FreeTypeFont, ImageFont
    from torch import Tensor

    from lowmem_drf.scoring.saliency import Saliency
    from lowmem_drf.scoring.score import ClipScore, QuestionScore

PERCENTILE = (
    0.995  # of a map's values over the clip: shown as full heat, so a few extreme pixels do not darken the rest
)
WIDTH, MARGIN, GAP, COLUMNS, LINE = 1600, 24, 16, 4, 18
PANEL, THUMB = ((WIDTH - 2 * MARGIN - GAP) // 2, 416), (124, 4 * LINE)
"""Maximum (width, height) of the two large pictures, and of a question's map."""
GROUND, EDGE, INK, FAINT, GOOD, BAD = "#121317", "#343842", "#eceef2", "#969ba6", "#7fd1a2", "#ff6f61"
WHAT = "saliency"
"""The clip's kind in its file (``video.is_own_mp4``)."""
MIN_SECONDS = 4.0  # shorter clips are slowed down to this duration


def write_heatmap(
    path: Path, frames_TCHW: Tensor, saliency: Saliency, score: ClipScore, prompt: str, fps: float
) -> Path:
    """Writes the clip as MP4 and returns the path. ``frames_TCHW``: float in [0, 1]; the maps may differ in size."""
    frames_TCHW = frames_TCHW.float().cpu()
    pages_TCHW = draw(frames_TCHW, saliency, score, prompt)
    return write_mp4(path, pages_TCHW, min(fps, len(frames_TCHW) / MIN_SECONDS), what=WHAT)


def draw(frames_TCHW: Tensor, saliency: Saliency, score: ClipScore, prompt: str) -> Tensor:
    """Draws the pages, with the questions by aspect below the pictures: (T, 3, H', W'), float in [0, 1]."""
    aspects = list(dict.fromkeys(v.question.aspect for v in score.verdicts))
    order = sorted(range(len(score.verdicts)), key=lambda i: aspects.index(score.verdicts[i].question.aspect))
    large_TCHW, small_TCHW = (_fit(frames_TCHW, _inside(frames_TCHW.shape[-2:], *box)) for box in (PANEL, THUMB))
    maps = (glow(small_TCHW, saliency.by_question_QTHW[i]) for i in order)
    clips = [large_TCHW, glow(large_TCHW, saliency.total_THW), *maps]

    height, width = large_TCHW.shape[-2:]
    left, top, below = (WIDTH - 2 * width - GAP) // 2, MARGIN + 72, MARGIN + 72 + height + 34
    across, down = (WIDTH - 2 * MARGIN + GAP) // COLUMNS, THUMB[1] + GAP
    cards = [(MARGIN + i % COLUMNS * across, below + i // COLUMNS * down) for i in range(len(order))]
    places = [(left, top), (left + width + GAP, top), *cards]
    image = _page(places, clips, [score.verdicts[i] for i in order], across - GAP, prompt, f"reward {score.reward:.3f}")
    page_CHW = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    pages_TCHW = page_CHW.repeat(len(frames_TCHW), 1, 1, 1)
    for (x, y), clip_TCHW in zip(places, clips, strict=True):
        pages_TCHW[:, :, y : y + clip_TCHW.shape[-2], x : x + clip_TCHW.shape[-1]] = clip_TCHW.clamp(0, 1)
    return pages_TCHW


def _page(
    places: Sequence[tuple[int, int]], clips: Sequence[Tensor], verdicts: Sequence[QuestionScore],
    card: int, prompt: str, reward: str,
) -> Image.Image:  # fmt: skip
    """Draws the static parts. ``places``: of the large pictures and the maps. ``card``: width of a map and its text."""
    from PIL import Image, ImageDraw, ImageFont

    title, small = ImageFont.load_default(22), ImageFont.load_default(15)
    bottom = places[-1][1] + max(THUMB[1], clips[-1].shape[-2]) + MARGIN
    image = Image.new("RGB", (WIDTH, 2 * ((bottom + 1) // 2)), GROUND)
    pen = ImageDraw.Draw(image)
    for i, line in enumerate(_wrap(prompt, title, WIDTH - 2 * MARGIN - 200, 2)):
        pen.text((MARGIN, MARGIN + 30 * i), line, INK, title)
    pen.text((WIDTH - MARGIN, MARGIN), reward, INK, title, anchor="ra")
    labels = ["what the critic is shown", "|d reward / d pixel|", *[""] * len(verdicts)]
    for (x, y), clip_TCHW, text in zip(places, clips, labels, strict=True):
        # a frame shows where a dark picture ends
        pen.rectangle((x - 1, y - 1, x + clip_TCHW.shape[-1], y + clip_TCHW.shape[-2]), outline=EDGE)
        pen.text((x, y + clip_TCHW.shape[-2] + 5), text, FAINT, small)
    for (x, y), v in zip(places[2:], verdicts, strict=True):
        inset = clips[2].shape[-1] + 12
        yesno = v.question.kind == "yesno"
        said = f"says {v.said} {v.p_said:.0%}, wanted {v.question.answer}" if yesno else f"says: {v.said}"
        asked = _wrap(v.question.text, small, card - inset, 1 + yesno)
        answered, color = _wrap(said, small, card - inset, 2 - yesno), GOOD if yesno else FAINT
        lines = [(f"{v.question.aspect}, p(wanted) {v.p_answer:.0%}", FAINT), *((line, INK) for line in asked)]
        lines += [(line, BAD if v.disagrees else color) for line in answered]
        for i, (line, ink) in enumerate(lines):
            pen.text((x + inset, y + LINE * i - 2), line, ink, small)
    return image


def glow(frames_TCHW: Tensor, map_THW: Tensor) -> Tensor:
    """Darkened gray frames with the map as heat: (T, 3, H, W), float in [0, 1]. One scale for the whole clip."""
    heat_T1HW = _fit(map_THW[:, None], frames_TCHW.shape[-2:])
    top = float(np.quantile(heat_T1HW.numpy(), PERCENTILE))
    heat_T1HW = (heat_T1HW / top).clamp(0, 1) if top > 0 else torch.zeros_like(heat_T1HW)
    return torch.lerp(frames_TCHW.mean(1, keepdim=True) * 0.55, colormap(heat_T1HW[:, 0]), heat_T1HW.sqrt())


def colormap(values_THW: Tensor) -> Tensor:
    """[0, 1] -> colors (T, 3, H, W) in [0, 1]: black, red, yellow, white, linear between them."""
    return torch.stack([3 * values_THW, 3 * values_THW - 1, 3 * values_THW - 2], 1).clamp(0, 1)


def _wrap(text: str, font: FreeTypeFont | ImageFont, width: int, lines: int) -> list[str]:
    """At most ``lines`` lines of about ``width`` pixels, by the text's mean letter width; cut text ends in "…"."""
    columns = int(0.95 * width * len(text) / max(1.0, font.getlength(text)))
    return textwrap.wrap(text, max(2, columns), max_lines=lines, placeholder=" …")


def _inside(size: Sequence[int], width: int, height: int) -> tuple[int, int]:
    """The largest (height, width) with the aspect ratio of ``size`` that fits into the box."""
    scale = min(height / size[0], width / size[1])
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _fit(frames_TCHW: Tensor, size: Sequence[int]) -> Tensor:
    """Shrinks by area, to keep thin lines; enlarges by repetition, to keep pixels sharp."""
    shrinks = size[0] <= frames_TCHW.shape[-2] and size[1] <= frames_TCHW.shape[-1]
    return F.interpolate(frames_TCHW, size=tuple(size), mode="area" if shrinks else "nearest-exact")
