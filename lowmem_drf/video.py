"""Video files: reads any that PyAV decodes, writes MP4 (H.264, yuv420p: plays everywhere); clips side by side."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lowmem_drf.errors import BadInputError, quoted
from lowmem_drf.files import written_aside
from lowmem_drf.method.frames import frames_at_rate, kept_fps, kept_frames

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

CRF = 12
"""H.264's constant rate factor: visually lossless."""
MADE_BY = "lowmem-drf"
WATCHABLE_PIXELS = 256
LABEL_PIXELS = 18

MAX_READ_PIXELS = 2**28
"""Limit of ``read_video`` on frames x height x width: 3 GiB as floats, 32 frames of 3840x2160."""
READ_FORMATS = (
    "mov,matroska,gif,avi,mpegts,mpeg,flv,asf,ogg,mxf,nut,dv,rm,apng,yuv4mpegpipe,h264,hevc,m4v,mpegvideo,ivf,obu,"
    "png_pipe,jpeg_pipe,webp_pipe,bmp_pipe"
)
"""FFmpeg's names of the formats that are read. Not playlists, which name other files: one that waits for the next file,
or names itself, would never end."""
SEEKABLE = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
"""Containers with seekable key frames. Others (each frame of a GIF builds on the last) are decoded from the start."""


def watchable_upscale(height: int, width: int) -> int:
    """The factor that makes a tiny clip large enough to watch; 1 for real ones."""
    return max(1, WATCHABLE_PIXELS // min(height, width))


def write_mp4(path: Path, frames_TCHW: Tensor, fps: float, upscale: int = 1, what: str = "clip") -> Path:
    """Writes frames (T, 3, H, W), float in [0, 1] or uint8, under another name, renames the file, and returns its path.

    ``upscale`` repeats each pixel. Odd sizes are padded with their last row and column, since yuv420p needs even ones.
    ``what`` stands in the file, for ``is_own_mp4``.
    """
    import av

    pixels_THWC = _to_uint8(frames_TCHW, upscale)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        written_aside(path) as aside,
        av.open(str(aside), "w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        container.metadata["comment"] = f"{MADE_BY} {what}"
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": str(CRF)})
        stream.height, stream.width = pixels_THWC.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for pixels_HWC in pixels_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels_HWC, format="rgb24")))
        container.mux(stream.encode())
    return path


def read_image(path: Path, width: int, height: int) -> Image:
    """The picture of an image file in RGB, scaled to cover ``width`` x ``height`` and cropped around its centre, as it
    is turned when looked at. Transparent parts are black.

    Raises BadInputError: it cannot be read as an image.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            whole = _in_8_bit(ImageOps.exif_transpose(file)).convert("RGBA")
    except Exception as error:  # a damaged file makes Pillow raise anything
        raise BadInputError(f"{path} cannot be read as an image ({error}). Give a PNG, JPEG or WebP.") from error
    picture = Image.new("RGB", whole.size)
    picture.paste(whole, mask=whole.getchannel("A"))
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)


def _in_8_bit(image: Image) -> Image:
    """Gray of 16 bits, which Pillow would cut off at 255, as the upper eight of them; other images as they are."""
    from PIL import Image

    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits")
    return image


def write_png(path: Path, frames_TCHW: Tensor, upscale: int = 1) -> Path:
    """Writes the one frame of a clip without loss, as ``write_mp4`` takes it, and returns the path."""
    from PIL import Image

    (pixels_HWC,) = _to_uint8(frames_TCHW, upscale)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        Image.fromarray(pixels_HWC).save(aside, format="png")
    return path


def is_own_mp4(path: Path, what: str = "clip") -> bool:
    """True for a file that ``write_mp4`` wrote, and nothing has converted since."""
    import av

    try:
        with _open(path) as container:
            return container.metadata.get("comment") == f"{MADE_BY} {what}"
    except (OSError, ValueError, av.error.FFmpegError):
        return False


def read_video(path: Path, frames: int | None = None, fps: float | None = None) -> tuple[Tensor, float]:
    """(frames (T, 3, H, W), frames per second): float in [0, 1], on the host, with the file's rotation applied.

    Decodes only the returned frames and those that they build on, and holds only the returned ones.

    Args:
        frames: number of frames, evenly spaced in time from first to last; all, if there are fewer.
        fps: frames per second, at most the video's rate, over the whole video (``frames_at_rate``). With both: the
            first ``frames`` at that rate, or fewer. With neither: every frame.

    Raises BadInputError: the file is missing, damaged or not a video, or exceeds ``MAX_READ_PIXELS``.
    """
    with _opened(path) as (container, stream):
        timeline = _timeline(container, stream, path)
        places, rate = _places(timeline, frames, fps)
        _check_size(path, len(places), stream.width, stream.height)
    with _opened(path) as (container, stream):  # again, because not every container can be rewound
        pixels_THWC = _decode(container, stream, timeline, places)
    if not pixels_THWC:
        raise BadInputError(f"{path}: none of its frames can be decoded. {_cure(path)}")
    if len({pixels.shape for pixels in pixels_THWC}) > 1:
        cure = _convert(path, "-vf scale=832:480 ")
        raise BadInputError(f"{path}: its frames change their size. Give them one: {cure}")
    return torch.from_numpy(np.stack(pixels_THWC)).permute(0, 3, 1, 2).float() / 255, rate


@dataclass(frozen=True)
class _Timeline:
    """Times of a video's frames, ascending, in units of ``unit`` seconds."""

    ticks: list[int]
    unit: Fraction
    keys: list[int]
    """Times of the key frames; empty unless ``SEEKABLE``."""
    fps: float


def _cure(path: Path) -> str:
    return f"Play it to check; copy or download it again, or convert it: {_convert(path)}"


def _convert(path: Path, filters: str = "") -> str:
    return f"ffmpeg -i {quoted(path)} {filters}-c:v libx264 clip.mp4"


def _open(path: Path) -> Any:
    """A container. Its texts need not be UTF-8."""
    import av

    limits = {"format_whitelist": READ_FORMATS, "max_pixels": str(MAX_READ_PIXELS)}
    return av.open(f"file:{path}", options=limits, metadata_errors="replace")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """(container, video stream). PyAV's errors become BadInputErrors that describe the file."""
    import av

    if not path.exists():
        raise BadInputError(f"there is no video {path}. Check the path.")
    formats = "Give a video: MP4, MOV, WebM, MKV or GIF."
    if not path.is_file():
        raise BadInputError(f"{path} is not a file. {formats}")
    try:
        with _open(path) as container:
            streams = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
            if not streams:
                sound = ", only sound" if container.streams.audio else ""
                raise BadInputError(f"{path} holds no video{sound}. {formats}")
            if streams[0].codec_context is None:
                raise BadInputError(f"{path}: PyAV has no decoder for its video. Convert it: {_convert(path)}")
            streams[0].thread_type = "AUTO"
            streams[0].codec_context.options = {"max_pixels": str(MAX_READ_PIXELS)}
            yield container, streams[0]
    except PermissionError as error:
        cure = f"chmod +r {quoted(path)}"
        raise BadInputError(f"{path} may not be read. Change its permissions: {cure}") from error
    except av.error.FFmpegError as error:
        raise BadInputError(
            f"{path} cannot be read as a video ({error.strerror}): it is none, or it is cut off or damaged. "
            f"{_cure(path)}"
        ) from error


def _timeline(container: Any, stream: Any, path: Path) -> _Timeline:
    """Reads packets without decoding. Raises BadInputError for none, or fewer than the header announces."""
    # without their bytes: all together they are the file
    packets = [
        (packet.pts, packet.is_keyframe, packet.is_corrupt)
        for packet in container.demux(stream)
        if packet.size and not packet.is_discard
    ]
    if not packets:
        raise BadInputError(f"{path} holds no frames. {_cure(path)}")
    if len(packets) < stream.frames or any(corrupt for _, _, corrupt in packets):
        counts = f"it announces {stream.frames} frames and holds {len(packets)} or fewer"
        raise BadInputError(f"{path} is cut off or damaged: {counts}. {_cure(path)}")
    timed = all(pts is not None for pts, _, _ in packets)
    unit = stream.time_base if timed else 1 / (stream.average_rate or Fraction(1))
    ticks = sorted(pts for pts, _, _ in packets) if timed else list(range(len(packets)))
    seekable = timed and container.format.name in SEEKABLE
    keys = sorted(pts for pts, is_key, _ in packets if is_key) if seekable else []
    span = (ticks[-1] - ticks[0]) * unit
    rate = (len(ticks) - 1) / span if span else stream.average_rate or Fraction(1)
    return _Timeline(ticks, unit, keys, float(rate))


def _places(timeline: _Timeline, frames: int | None, fps: float | None) -> tuple[list[int], float]:
    """(indices of the chosen frames, ascending, and their frames per second)."""
    n, first, last = len(timeline.ticks), timeline.ticks[0], timeline.ticks[-1]
    if frames is not None and fps is not None:
        rate = min(fps, timeline.fps)
        step = float(1 / (Fraction(rate) * timeline.unit))
        count = min(frames, 1 + int((last - first) / step + 1e-6))
        return [_nearest(timeline.ticks, first + i * step) for i in range(count)], rate
    keep = frames_at_rate(n, timeline.fps, fps) if fps is not None else n if frames is None else min(frames, n)
    rate = kept_fps(n, timeline.fps, keep)
    if keep >= n:
        return list(range(n)), rate
    return [_nearest(timeline.ticks, first + i * (last - first) / max(n - 1, 1)) for i in kept_frames(n, keep)], rate


def _nearest(ticks: Sequence[int], tick: float) -> int:
    after = min(bisect_left(ticks, tick), len(ticks) - 1)
    return after - 1 if after and tick - ticks[after - 1] <= ticks[after] - tick else after


def _check_size(path: Path, count: int, width: int, height: int) -> None:
    frame = width * height
    if count * frame > MAX_READ_PIXELS:
        raise BadInputError(
            f"{path}: {count} frames of {width}x{height} are {count * frame / 1e6:.0f} million pixels, and the limit "
            f"is {MAX_READ_PIXELS / 1e6:.0f}. Look at fewer frames (-s critic.frames="
            f"{max(1, MAX_READ_PIXELS // frame)}), or make it smaller: {_convert(path, '-vf scale=1280:-2 ')}"
        )


def _decode(container: Any, stream: Any, timeline: _Timeline, places: Sequence[int]) -> list[np.ndarray]:
    """The frames at ``places``, uint8 (H, W, 3). Seeks if a key frame lies between two of them. Repeats the last frame
    that can be decoded: some packets show nothing."""
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
    """Clips of one size in a row, under their labels: (T, 3, H * upscale + 18, sum of widths), float in [0, 1]."""
    columns = []
    for clip_TCHW, label in zip(clips_TCHW, labels, strict=True):
        big = clip_TCHW.float().cpu().repeat_interleave(upscale, -1).repeat_interleave(upscale, -2)
        strip_CHW = _label(label, big.shape[-1])
        columns.append(torch.cat([strip_CHW.expand(len(big), *strip_CHW.shape), big], dim=-2))
    gap = columns[0].new_ones(*columns[0].shape[:-1], 4)
    joined = [part for column in columns for part in (column, gap)][:-1]
    return torch.cat(joined, dim=-1)


def _label(text: str, width: int) -> Tensor:
    """(3, 18, width), black text on white."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (width, LABEL_PIXELS), "white")
    ImageDraw.Draw(image).text((4, 3), text, fill="black", font=ImageFont.load_default())
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


def to_pixels(frames_TCHW: Tensor) -> Tensor:
    """Frames in [0, 1], or uint8, as uint8 on the CPU."""
    if frames_TCHW.dtype == torch.uint8:
        return frames_TCHW.cpu()
    return (frames_TCHW.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)


def _to_uint8(frames_TCHW: Tensor, upscale: int) -> np.ndarray:
    pixels_THWC = to_pixels(frames_TCHW).permute(0, 2, 3, 1).numpy()
    pixels_THWC = pixels_THWC.repeat(upscale, axis=1).repeat(upscale, axis=2)
    height, width = pixels_THWC.shape[1:3]
    return np.pad(pixels_THWC, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
