"""Measures of a clip that need no reference, no prompt and no critic: what a reward may change without being asked.

Most come from FFmpeg's own filters, which PyAV brings, in one graph inside this process. Frames reach it uncompressed:
8 bit, full range (0 to 255), BT.601, chroma halved in both directions, as a JPEG has it. The filters write their
figures into a frame's metadata, which only the newest PyAV can read, so FFmpeg's ``metadata`` filter prints them to a
temporary file. A mean over frames stands for the clip.
"""

from __future__ import annotations

import math
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import avg_pool2d, conv2d

if TYPE_CHECKING:
    from torch import Tensor

MEASURES = ("motion", "freeze", "flicker", "ti", "si", "blur", "blocking", "noise", "saturation")
"""Keys of ``clip_measures``, in the order of tables."""
FROZEN = 0.001
"""A frame whose mean luma difference from the last one is below this is frozen: ``freezedetect``'s own threshold,
-60 dB."""
PERIODS = 3, 24
"""Shortest and longest distance of block edges that ``blockdetect`` looks for, in pixels: its own default."""
MOST_BLOCKING = 100.0
"""Stands for a clip that is flat between the lines of its grid, where the figure would be infinite."""
LAPLACIANS = ((1, -2, 1), (-2, 4, -2), (1, -2, 1))
"""Difference of two Laplacians: 0 on slopes and on level and upright edges, 6 times the deviation of white noise."""


def clip_measures(frames_TCHW: Tensor) -> dict[str, float]:
    """Measures a clip, float in [0, 1], on any device. A key is left out where it has no meaning. Figures over time
    depend on the frame rate, all others on the size: compare clips of one size and rate.

    ``motion``: mean absolute difference of successive frames, 0 to 1. Not for a single frame, as the next three.

    ``freeze``: share of successive frames that differ by less than ``FROZEN`` in luma: 1 for a still picture.

    ``flicker``: how much the whole picture's brightness goes up and down from frame to frame, 0 to 1: half of the
    absolute second difference of the mean luma, so that a steady fade has none. Needs three frames.

    ``ti``: temporal information (ITU-T P.910), standard deviation of the difference of successive frames, in levels of
    luma, 0 to 255. The recommendation takes the largest of all frames, which one cut decides; this is their mean.

    ``si``: spatial information (ITU-T P.910), standard deviation of the Sobel gradient's length, in levels of luma:
    0 for a flat picture. Mean over frames.

    ``blur``: mean width of edges in pixels (Marziliano et al., "A no-reference perceptual blur metric", 2002). Larger
    is more blurred. Not for a clip without edges.

    ``blocking``: gradients at the strongest regular grid, as a multiple of those between its lines (Muijs and Kirenko,
    "A no-reference blocking artifact measure for adaptive video processing", 2005): 1 to 1.5 without blocks, at most
    ``MOST_BLOCKING``. A small picture has few lines of a wide grid, so grids are looked for up to a quarter of its
    shortest side. Not for a flat clip.

    ``noise``: standard deviation of the luma's noise, 0 to 1, estimated (Immerkaer, "Fast noise variance estimation",
    1996); fine texture counts as noise. FFmpeg's ``bitplanenoise`` finds noise in any clip that was computed in
    floating point.

    ``saturation``: mean distance of a pixel's chroma (Cb, Cr) from gray, where the full scale of either is 1: 0 for
    gray, 0.53 for pure red.
    """
    height, width = (side - side % 2 for side in frames_TCHW.shape[-2:])  # chroma is halved
    moved: list[float] = []
    noise: list[float] = []
    rows = _filtered(_planes(frames_TCHW[..., :height, :width], moved, noise), height, width)
    mean_luma = [luma / 255 for luma in rows["signalstats.YAVG"]]
    steps = [b - a for a, b in zip(mean_luma, mean_luma[1:], strict=False)]
    turns = [abs(b - a) / 2 for a, b in zip(steps, steps[1:], strict=False)]
    found = {
        "motion": moved,
        "freeze": [float(difference < 255 * FROZEN) for difference in rows["signalstats.YDIF"][1:]],
        "flicker": turns,
        "ti": rows["siti.ti"][1:],
        "si": rows["siti.si"],
        "blur": rows["blur"],
        # the filter adds up gradients from frame to frame: its last figure is the clip's
        "blocking": [min(value, MOST_BLOCKING) for value in rows["block"][-1:]],
        "noise": noise,
        "saturation": [saturation / 255 for saturation in rows["signalstats.SATAVG"]],
    }
    finite = {name: [value for value in found[name] if math.isfinite(value)] for name in MEASURES}
    return {name: fmean(values) for name, values in finite.items() if values}


def _planes(frames_TCHW: Tensor, moved: list[float], noise: list[float]) -> Iterator[Any]:
    """Yields each frame as the bytes of yuv420p, (H * 3 / 2, W), and adds what needs no filter to ``moved`` and
    ``noise``. Frame by frame: another clip of a real model beside the first would take 0.4 GB of the card."""
    kernel = frames_TCHW.new_tensor(LAPLACIANS, dtype=torch.float32)[None, None]
    last_CHW = None
    for frame_CHW in frames_TCHW:
        frame_CHW = frame_CHW.float()
        if last_CHW is not None:
            moved.append((frame_CHW - last_CHW).abs().mean().item())
        last_CHW = frame_CHW
        red, green, blue = frame_CHW
        luma_HW = 0.299 * red + 0.587 * green + 0.114 * blue
        noise.append(math.sqrt(math.pi / 2) / 6 * conv2d(luma_HW[None, None], kernel).abs().mean().item())
        chroma_2HW = torch.stack([(blue - luma_HW) / 1.772, (red - luma_HW) / 1.402])
        levels = torch.cat([255 * luma_HW.flatten(), 255 * avg_pool2d(chroma_2HW, 2).flatten() + 128])
        yield levels.round().clamp(0, 255).byte().view(-1, luma_HW.shape[1]).cpu().numpy()


def _filtered(planes: Iterable[Any], height: int, width: int) -> dict[str, list[float]]:
    """The filters' figures by name without ``lavfi.``, one a frame."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.txt"
        _run_filters(planes, height, width, path)  # returns first: its graph holds the file open
        rows = defaultdict(list)
        for line in path.read_text(encoding="utf-8").splitlines():
            name, equals, value = line.partition("=")
            if equals and name.startswith("lavfi."):
                rows[name.removeprefix("lavfi.")].append(float(value))
    return rows


def _run_filters(planes: Iterable[Any], height: int, width: int, path: Path) -> None:
    import av
    from av.filter import Graph
    from av.video.reformatter import ColorRange

    shortest, longest = PERIODS
    longest = max(shortest, min(longest, min(height, width) // 4))
    graph = Graph()
    source = graph.add_buffer(width=width, height=height, format=av.VideoFormat("yuv420p"), time_base=Fraction(1))
    filters = [
        graph.add("siti"),
        graph.add("blurdetect"),
        graph.add("blockdetect", period_min=str(shortest), period_max=str(longest)),
        graph.add("signalstats"),
        graph.add("metadata", mode="print", file=str(path), direct="1"),
        graph.add("buffersink"),
    ]
    graph.link_nodes(source, *filters).configure()
    for number, plane in enumerate(planes):
        frame = av.VideoFrame.from_ndarray(plane, format="yuv420p")
        frame.pts, frame.color_range = number, ColorRange.JPEG
        graph.vpush(frame)
        graph.vpull()
