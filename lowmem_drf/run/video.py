"""Clips as MP4 files (H.264, yuv420p: plays everywhere), and two clips side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor

CRF = 12
"""H.264's constant rate factor: visually lossless."""
WATCHABLE_PIXELS = 256
LABEL_PIXELS = 18


def watchable_upscale(height: int, width: int) -> int:
    """The factor that brings a tiny clip to a size a person can watch; 1 for real ones."""
    return max(1, WATCHABLE_PIXELS // min(height, width))


def write_mp4(path: Path, frames_TCHW: Tensor, fps: int, upscale: int = 1) -> Path:
    """Writes frames (T, 3, H, W), float in [0, 1], and returns the path.

    ``upscale`` repeats each pixel. Odd sizes are padded by their last row and column (yuv420p wants even ones). Written aside and renamed.
    """
    import av

    pixels_THWC = _to_uint8(frames_TCHW, upscale)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    try:
        with av.open(str(aside), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": str(CRF)})
            stream.height, stream.width = pixels_THWC.shape[1:3]
            stream.pix_fmt = "yuv420p"
            for pixels_HWC in pixels_THWC:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels_HWC, format="rgb24")))
            container.mux(stream.encode())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def read_mp4(path: Path) -> tuple[Tensor, float]:
    """All frames (T, 3, H, W), float in [0, 1], and the frame rate."""
    import av

    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() / 255, float(rate or 0)


def side_by_side(clips_TCHW: Sequence[Tensor], labels: Sequence[str], upscale: int = 1) -> Tensor:
    """Clips of one size next to each other, each under its label: (T, 3, H * upscale + 18, sum of widths), float in [0, 1]."""
    columns = []
    for clip_TCHW, label in zip(clips_TCHW, labels, strict=True):
        big = clip_TCHW.float().cpu().repeat_interleave(upscale, -1).repeat_interleave(upscale, -2)
        strip_CHW = _label(label, big.shape[-1])
        columns.append(torch.cat([strip_CHW.expand(len(big), *strip_CHW.shape), big], dim=-2))
    gap = columns[0].new_ones(*columns[0].shape[:-1], 4)
    joined = [part for column in columns for part in (column, gap)][:-1]
    return torch.cat(joined, dim=-1)


def _label(text: str, width: int) -> Tensor:
    """(3, 18, width) dark text on white."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (width, LABEL_PIXELS), "white")
    ImageDraw.Draw(image).text((4, 3), text, fill="black", font=ImageFont.load_default())
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


def _to_uint8(frames_TCHW: Tensor, upscale: int) -> np.ndarray:
    pixels_THWC = (frames_TCHW.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    pixels_THWC = pixels_THWC.repeat(upscale, axis=1).repeat(upscale, axis=2)
    height, width = pixels_THWC.shape[1:3]
    return np.pad(pixels_THWC, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
