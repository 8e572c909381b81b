"""The saliency clip: the video, where the reward's gradient points, and every question with its own map, answer and
probability."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from lowmem_drf.video import write_mp4

if TYPE_CHECKING:
    from PIL import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont
    from torch import Tensor

    from lowmem_drf.scoring.saliency import Saliency
    from lowmem_drf.scoring.score import ClipScore, QuestionScore

INFERNO = (
    (0, 0, 4),
    (40, 11, 84),
    (101, 21, 110),
    (159, 42, 99),
    (212, 72, 66),
    (245, 125, 21),
    (250, 193, 39),
    (252, 255, 164),
)
"""Support points of matplotlib's ``inferno`` (CC0): lightness rises evenly from black to pale yellow."""
PERCENTILE = 0.995
"""Of a map's values over the clip: what is full heat. A few extreme pixels would darken the rest."""

WIDTH, MARGIN, GAP = 1600, 24, 16
PANEL_HEIGHT = 416
THUMB = (124, 72)
"""Widest and highest of a question's map."""
COLUMNS = 4
LINE = 18
GROUND, INK, SPOKEN, FAINT, GOOD, BAD = "#121317", "#eceef2", "#c3cad6", "#969ba6", "#7fd1a2", "#ff6f61"
ASPECT_INKS = {"TA": "#79b8ff", "Phy": "#f2b35d", "VQ": "#c6a0f6"}
EDGE = "#343842"
MIN_SECONDS = 4.0
"""A shorter clip is slowed down to this."""


def write_heatmap(
    path: Path, frames_TCHW: Tensor, saliency: Saliency, score: ClipScore, prompt: str, fps: float
) -> Path:
    """Writes the clip as MP4 and returns the path. ``frames_TCHW``: float in [0, 1]; the maps may have another size."""
    frames_TCHW = frames_TCHW.float().cpu()
    return write_mp4(path, draw(frames_TCHW, saliency, score, prompt), min(fps, len(frames_TCHW) / MIN_SECONDS))


def draw(frames_TCHW: Tensor, saliency: Saliency, score: ClipScore, prompt: str) -> Tensor:
    """The clip's pictures: (T, 3, H', W'), float in [0, 1]."""
    page = _Page(frames_TCHW.shape[-2:], score, prompt)
    big_TCHW = _fit(frames_TCHW, page.panel)
    small_TCHW = _fit(frames_TCHW, page.thumb)
    pictures_THWC = np.repeat(np.asarray(page.image)[None], len(frames_TCHW), axis=0)
    _paste(pictures_THWC, big_TCHW, page.panels[0])
    _paste(pictures_THWC, glow(big_TCHW, saliency.total_THW), page.panels[1])
    for place, map_THW in zip(page.thumbs, saliency.by_question_QTHW[page.order], strict=True):
        _paste(pictures_THWC, glow(small_TCHW, map_THW), place)
    return torch.from_numpy(pictures_THWC).permute(0, 3, 1, 2).float() / 255


def glow(frames_TCHW: Tensor, map_THW: Tensor) -> Tensor:
    """Frames in gray, darkened, with the map over them as heat: (T, 3, H, W), float in [0, 1]. One scale for the whole
    clip."""
    heat_T1HW = _fit(map_THW[:, None], frames_TCHW.shape[-2:])
    top = torch.quantile(_some(heat_T1HW), PERCENTILE)
    heat_T1HW = (heat_T1HW / top).clamp(0, 1) if top > 0 else torch.zeros_like(heat_T1HW)
    gray_T1HW = frames_TCHW.mean(1, keepdim=True) * 0.55
    alpha_T1HW = heat_T1HW.sqrt()
    return gray_T1HW * (1 - alpha_T1HW) + colormap(heat_T1HW[:, 0]) * alpha_T1HW


def colormap(values_THW: Tensor) -> Tensor:
    """[0, 1] -> colors (T, 3, H, W) in [0, 1]: ``INFERNO``, linear between its points."""
    points_PC = torch.tensor(INFERNO, dtype=torch.float32) / 255
    place = values_THW.clamp(0, 1) * (len(points_PC) - 1)
    low = place.floor().clamp(max=len(points_PC) - 2).long()
    share = (place - low)[..., None]
    return (points_PC[low] * (1 - share) + points_PC[low + 1] * share).permute(0, 3, 1, 2)


class _Page:
    """Everything that does not move, and the places of what does."""

    def __init__(self, size: Sequence[int], score: ClipScore, prompt: str) -> None:
        from PIL import Image, ImageDraw

        self.panel = _inside(size, (WIDTH - 2 * MARGIN - GAP) // 2, PANEL_HEIGHT)
        self.thumb = _inside(size, *THUMB)
        aspects = list(dict.fromkeys(v.question.aspect for v in score.verdicts))
        self.order = [i for aspect in aspects for i, v in enumerate(score.verdicts) if v.question.aspect == aspect]
        self.thumbs: list[tuple[int, int]] = []
        card = (WIDTH - 2 * MARGIN - (COLUMNS - 1) * GAP) // COLUMNS
        tall = max(self.thumb[0], 4 * LINE)
        rows = -(-len(self.order) // COLUMNS)
        title = _wrap(prompt, 22, WIDTH - 2 * MARGIN - 200, 2)
        top = MARGIN + 30 * len(title) + 12
        below = top + self.panel[0] + 34
        height = below + rows * (tall + GAP) + MARGIN - GAP
        self.image: Image.Image = Image.new("RGB", (WIDTH, height + height % 2), GROUND)
        pen = ImageDraw.Draw(self.image)
        for i, line in enumerate(title):
            pen.text((MARGIN, MARGIN + 30 * i), line, INK, _font(22))
        pen.text((WIDTH - MARGIN, MARGIN), f"reward {score.reward:.3f}", INK, _font(22), anchor="ra")
        left = (WIDTH - 2 * self.panel[1] - GAP) // 2
        self.panels = ((left, top), (left + self.panel[1] + GAP, top))
        for (x, y), name in zip(self.panels, ("what the critic is shown", "|d reward / d pixel|"), strict=True):
            _frame(pen, x, y, self.panel)
            pen.text((x, y + self.panel[0] + 5), name, FAINT, _font(14))
        for i, which in enumerate(self.order):
            x, y = MARGIN + i % COLUMNS * (card + GAP), below + i // COLUMNS * (tall + GAP)
            self.thumbs.append((x, y))
            _frame(pen, x, y, self.thumb)
            self._card(pen, score.verdicts[which], x + self.thumb[1] + 12, y, card - self.thumb[1] - 12)

    def _card(self, pen: ImageDraw, verdict: QuestionScore, x: int, y: int, width: int) -> None:
        question = verdict.question
        pen.text((x, y - 2), question.aspect, ASPECT_INKS[question.aspect], _font(13))
        pen.text((x + width, y - 2), f"p(wanted) {verdict.p_answer:.0%}", FAINT, _font(13), anchor="ra")
        lines = _wrap(question.text, 15, width, 2 if question.kind == "yesno" else 1)
        for i, line in enumerate(lines):
            pen.text((x, y + LINE * (i + 1) - 3), line, INK, _font(15))
        at = y + LINE * (len(lines) + 1) - 1
        if question.kind == "yesno":
            said = f"says {verdict.said} {verdict.p_said:.0%}, wanted {question.answer}"
            pen.text((x, at), said, BAD if verdict.disagrees else GOOD, _font(14))
        else:
            for i, line in enumerate(_wrap(f"says: {verdict.said}", 14, width, 2)):
                pen.text((x, at + LINE * i), line, SPOKEN, _font(14))


def _frame(pen: ImageDraw, x: int, y: int, size: tuple[int, int]) -> None:
    """Around a picture, so that a dark one is seen to end."""
    pen.rectangle((x - 1, y - 1, x + size[1], y + size[0]), outline=EDGE)


def _font(size: int) -> FreeTypeFont:
    """Pillow's own face: no font needs to be installed."""
    from PIL import ImageFont

    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _wrap(text: str, size: int, width: int, lines: int) -> list[str]:
    """The text in at most so many lines of ``width`` pixels; what does not fit ends in an ellipsis."""
    font = _font(size)
    wrapped, rest = list[str](), text.split()
    while rest and len(wrapped) < lines:
        fitting = next((n for n in range(len(rest), 0, -1) if font.getlength(" ".join(rest[:n])) <= width), 1)
        wrapped.append(" ".join(rest[:fitting]))
        rest = rest[fitting:]
    if wrapped:
        cut = wrapped[-1] + (" …" if rest else "")
        while font.getlength(cut) > width and len(cut) > 2:
            cut = cut.rstrip(" …")[:-1].rstrip() + "…"
        wrapped[-1] = cut
    return wrapped


def _inside(size: Sequence[int], width: int, height: int) -> tuple[int, int]:
    """The largest (height, width) of this aspect ratio in a box."""
    scale = min(height / size[0], width / size[1])
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _fit(frames_TCHW: Tensor, size: Sequence[int]) -> Tensor:
    """Shrunk by area, so that nothing thin is lost; enlarged by repetition, so that pixels stay pixels."""
    height, width = frames_TCHW.shape[-2:]
    if size[0] <= height and size[1] <= width:
        return F.interpolate(frames_TCHW, size=tuple(size), mode="area")
    return F.interpolate(frames_TCHW, size=tuple(size), mode="nearest-exact")


def _some(values: Tensor, limit: int = 2**20) -> Tensor:
    """At most so many of the values, evenly spaced: ``torch.quantile`` takes no more than 16 million."""
    flat = values.flatten()
    return flat[:: -(-len(flat) // limit)]


def _paste(pictures_THWC: np.ndarray, frames_TCHW: Tensor, place: tuple[int, int]) -> None:
    pixels_THWC = (frames_TCHW.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    x, y = place
    pictures_THWC[:, y : y + pixels_THWC.shape[1], x : x + pixels_THWC.shape[2]] = pixels_THWC
