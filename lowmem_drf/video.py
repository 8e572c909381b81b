"""Clips as video files: any that PyAV decodes is read, MP4 (H.264, yuv420p: plays everywhere) is written; two clips
side by side."""

from __future__ import annotations

import shlex
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lowmem_drf.errors import BadInputError
from lowmem_drf.files import written_aside
from lowmem_drf.method.frames import frames_at_rate, kept_fps, kept_frames

if TYPE_CHECKING:
    from torch import Tensor

CRF = 12
"""H.264's constant rate factor: visually lossless."""
WATCHABLE_PIXELS = 256
LABEL_PIXELS = 18

MAX_READ_PIXELS = 2**28
"""Frames x height x width that ``read_video`` returns at most: 3 GiB as floats; 32 frames of 3840x2160."""
SEEKABLE = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
"""Containers whose key frames can be jumped to. Elsewhere (a GIF's frames build on one another) all is decoded from the
start."""


def watchable_upscale(height: int, width: int) -> int:
    """The factor that brings a tiny clip to a size a person can watch; 1 for real ones."""
    return max(1, WATCHABLE_PIXELS // min(height, width))


def write_mp4(path: Path, frames_TCHW: Tensor, fps: float, upscale: int = 1) -> Path:
    """Writes frames (T, 3, H, W), float in [0, 1], and returns the path.

    ``upscale`` repeats each pixel. Odd sizes are padded by their last row and column (yuv420p wants even ones). Written
    aside and renamed.
    """
    import av

    pixels_THWC = _to_uint8(frames_TCHW, upscale)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        written_aside(path) as aside,
        av.open(str(aside), "w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": str(CRF)})
        stream.height, stream.width = pixels_THWC.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for pixels_HWC in pixels_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels_HWC, format="rgb24")))
        container.mux(stream.encode())
    return path


def read_video(path: Path, frames: int | None = None, fps: float | None = None) -> tuple[Tensor, float]:
    """Frames (T, 3, H, W), float in [0, 1], on the host, upright (a phone's rotation is applied), and how many a second
    they are.

    Decodes what it returns and what that builds on, and holds no more than it returns.

    Args: frames: this many, evenly spaced in time from the first frame to the last; all, if there are fewer. fps: so
        many a second, over the whole video (``frames_at_rate``). With both: the first ``frames`` at that rate; fewer,
        if the video ends before. A video's own rate is never exceeded. With neither: every frame.

    Raises: BadInputError: there is no such file, it cannot be decoded, it holds no video or no frame, it is cut off, or
        it is more than ``MAX_READ_PIXELS``.
    """
    with _opened(path) as (container, stream):
        timeline = _timeline(container, stream, path)
        places, rate = _places(timeline, frames, fps)
        _check_size(path, len(places), stream.width, stream.height)
    with _opened(path) as (container, stream):  # again: not every container can be wound back
        pixels_THWC = _decode(container, stream, timeline, places)
    if not pixels_THWC:
        raise BadInputError(f"{path}: none of its frames can be decoded. {_cure(path)}")
    if len({pixels.shape for pixels in pixels_THWC}) > 1:
        raise BadInputError(
            f"{path}: its frames change their size. Give them one: {_convert(path, '-vf scale=832:480 ')}"
        )
    return torch.from_numpy(np.stack(pixels_THWC)).permute(0, 3, 1, 2).float() / 255, rate


@dataclass(frozen=True)
class _Timeline:
    """When the frames of a video are shown, in order, in units of ``unit`` seconds."""

    ticks: list[int]
    unit: Fraction
    keys: list[int]
    """Ticks of the frames that build on no other."""
    fps: float


def _cure(path: Path) -> str:
    return f"Play it to check; copy or download it again, or convert it: {_convert(path)}"


def _convert(path: Path, filters: str = "") -> str:
    return f"ffmpeg -i {shlex.quote(str(path))} {filters}-c:v libx264 clip.mp4"


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """(container, its video stream). What PyAV raises inside is told as what is wrong with the file."""
    import av

    if not path.exists():
        raise BadInputError(f"there is no video {path}. Check the path.")
    if not path.is_file():
        raise BadInputError(f"{path} is not a file. Give a video: MP4, MOV, WebM, MKV or GIF.")
    try:
        with av.open(f"file:{path}") as container:
            streams = [
                stream for stream in container.streams.video if not stream.disposition & stream.disposition.attached_pic
            ]
            if not streams:
                raise BadInputError(
                    f"{path} holds no video"
                    + (", only sound." if container.streams.audio else ".")
                    + " Give a video: MP4, MOV, WebM, MKV or GIF."
                )
            if streams[0].codec_context is None:
                raise BadInputError(f"{path}: PyAV has no decoder for its video. Convert it: {_convert(path)}")
            streams[0].thread_type = "AUTO"
            yield container, streams[0]
    except PermissionError as error:
        raise BadInputError(
            f"{path} may not be read. Change its permissions: chmod +r {shlex.quote(str(path))}"
        ) from error
    except av.error.FFmpegError as error:
        raise BadInputError(
            f"{path} cannot be read as a video ({error.strerror}): it is none, or it is cut off or damaged. {_cure(path)}"
        ) from error


def _timeline(container: Any, stream: Any, path: Path) -> _Timeline:
    """From the packets, without decoding any. Raises BadInputError for none, or fewer than the file announces."""
    packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
    if not packets:
        raise BadInputError(f"{path} holds no frames. {_cure(path)}")
    if len(packets) < stream.frames or any(packet.is_corrupt for packet in packets):
        raise BadInputError(
            f"{path} is cut off or damaged: it announces {stream.frames} frames and holds {len(packets)} or fewer. {_cure(path)}"
        )
    timed = all(packet.pts is not None for packet in packets)
    unit = stream.time_base if timed else 1 / (stream.average_rate or Fraction(1))
    ticks = sorted(packet.pts for packet in packets) if timed else list(range(len(packets)))
    keys = (
        sorted(packet.pts for packet in packets if packet.is_keyframe)
        if timed and container.format.name in SEEKABLE
        else []
    )
    span = (ticks[-1] - ticks[0]) * unit
    rate = (len(ticks) - 1) / span if span else stream.average_rate or Fraction(1)
    return _Timeline(ticks, unit, keys, float(rate))


def _places(timeline: _Timeline, frames: int | None, fps: float | None) -> tuple[list[int], float]:
    """Which frames, ascending, and how many a second they are."""
    n, first, last = len(timeline.ticks), timeline.ticks[0], timeline.ticks[-1]
    if frames is not None and fps is not None:
        rate = min(fps, timeline.fps)
        step = float(1 / (Fraction(rate) * timeline.unit))
        count = min(frames, 1 + int((last - first) / step + 1e-6))
        return [_nearest(timeline.ticks, first + i * step) for i in range(count)], rate
    keep = frames_at_rate(n, timeline.fps, fps) if fps is not None else n if frames is None else min(frames, n)
    even = (first + i * (last - first) / max(n - 1, 1) for i in kept_frames(n, keep))
    return [_nearest(timeline.ticks, tick) for tick in even] if keep < n else list(range(n)), kept_fps(
        n, timeline.fps, keep
    )


def _nearest(ticks: Sequence[int], tick: float) -> int:
    after = min(bisect_left(ticks, tick), len(ticks) - 1)
    return after - 1 if after and tick - ticks[after - 1] <= ticks[after] - tick else after


def _check_size(path: Path, count: int, width: int, height: int) -> None:
    if count * width * height > MAX_READ_PIXELS:
        raise BadInputError(
            f"{path}: {count} frames of {width}x{height} are {count * width * height / 1e6:.0f} million pixels, and the limit is "
            f"{MAX_READ_PIXELS / 1e6:.0f}. Look at fewer frames (-s critic.frames={max(1, MAX_READ_PIXELS // (width * height))}), "
            f"or make it smaller: {_convert(path, '-vf scale=1280:-2 ')}"
        )


def _decode(container: Any, stream: Any, timeline: _Timeline, places: Sequence[int]) -> list[np.ndarray]:
    """The frames at ``places``, uint8 (H, W, 3). Jumps ahead where a key frame lies between two of them. Behind the
    last frame that can be decoded that frame stands again: some packets show nothing."""
    wanted: list[np.ndarray] = []
    at, shown, frames = -1, None, container.decode(stream)
    for place in places:
        key = bisect_right(timeline.keys, timeline.ticks[place]) - 1
        if key >= 0 and timeline.keys[key] > timeline.ticks[max(at, 0)]:
            container.seek(timeline.keys[key], stream=stream)
            frames = container.decode(stream)
        while at < place and (frame := next(frames, None)) is not None:
            shown = frame
            at = bisect_left(timeline.ticks, frame.pts) if timeline.keys and frame.pts is not None else at + 1
        if shown is not None:
            wanted.append(_upright(shown))
    return wanted


def _upright(frame: Any) -> np.ndarray:
    pixels_HWC: np.ndarray = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels_HWC, round(frame.rotation / 90)))


def side_by_side(clips_TCHW: Sequence[Tensor], labels: Sequence[str], upscale: int = 1) -> Tensor:
    """Clips of one size next to each other, each under its label: (T, 3, H * upscale + 18, sum of widths), float in [0,
    1]."""
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


def to_pixels(frames_TCHW: Tensor) -> Tensor:
    """Frames in [0, 1] as uint8 on the CPU; frames that are uint8 stay."""
    if frames_TCHW.dtype == torch.uint8:
        return frames_TCHW.cpu()
    return (frames_TCHW.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)


def _to_uint8(frames_TCHW: Tensor, upscale: int) -> np.ndarray:
    pixels_THWC = to_pixels(frames_TCHW).permute(0, 2, 3, 1).numpy()
    pixels_THWC = pixels_THWC.repeat(upscale, axis=1).repeat(upscale, axis=2)
    height, width = pixels_THWC.shape[1:3]
    return np.pad(pixels_THWC, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
