"""Reading videos: the right frames, rate and rotation, without decoding the rest; other files are refused with a
cure."""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from lowmem_drf import video
from lowmem_drf.errors import BadInputError
from lowmem_drf.video import read_video, write_mp4

FRAMES, STEP = 50, 4
"""Frame i has brightness (20 + 4 i) / 255: frames are told apart after lossy coding."""


def numbered(frames=FRAMES, height=32, width=48):
    return ((20 + STEP * torch.arange(frames)) / 255)[:, None, None, None].expand(-1, 3, height, width)


def numbers(clip_TCHW):
    """Which frames these are."""
    return ((clip_TCHW.mean((1, 2, 3)) * 255 - 20) / STEP).round().int().tolist()


def write(path, codec="libx264", pixels="yuv420p", rate=25, ticks=None, clip=None, **options):
    """A video written with PyAV. ``ticks``: time of each frame in ms; default: evenly at ``rate``."""
    clip = numbered() if clip is None else clip
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={key: str(value) for key, value in options.items()})
        stream.height, stream.width, stream.pix_fmt = *clip.shape[-2:], pixels
        for i, frame in enumerate((clip * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            if ticks:
                picture.pts, picture.time_base = ticks[i], Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def test_every_frame_and_the_rate_come_back(tmp_path):
    clip, fps = read_video(write_mp4(tmp_path / "with a space:and a colon.mp4", numbered(), 24))
    assert clip.shape == (FRAMES, 3, 32, 48)
    assert clip.dtype == torch.float32
    assert numbers(clip) == list(range(FRAMES))
    assert fps == 24


@pytest.mark.parametrize(
    ("frames", "fps", "places", "rate"),
    [
        (8, None, [0, 7, 14, 21, 28, 35, 42, 49], 25 / 7),
        (1, None, [25], 0.5),
        (99, None, list(range(50)), 25),
        (None, 2.5, [0, 16, 32, 49], 25 * 3 / 49),  # 5 frames, and an even number of them
        (3, 5.0, [0, 5, 10], 5),
        (99, 5.0, list(range(0, 50, 5)), 5),
        (3, 1000.0, [0, 1, 2], 25),
    ],
)
def test_frames_by_number_and_by_rate(tmp_path, frames, fps, places, rate):
    clip, kept = read_video(write(tmp_path / "clip.mp4"), frames, fps)
    assert numbers(clip) == places
    assert kept == pytest.approx(rate)


FORMATS = {
    "mp4": dict(codec="libx264", g=9),
    "mov": dict(codec="mpeg4", qscale=1, flags="+qscale"),
    "mkv": dict(codec="libx264", g=7, bf=3),
    "webm": dict(codec="libvpx-vp9"),
    "vp8.webm": {"codec": "libvpx", "auto-alt-ref": 1, "lag-in-frames": 16},
    "avi": dict(codec="mpeg4", qscale=1, flags="+qscale"),
    "ts": dict(codec="libx264", g=12),
    "gif": dict(codec="gif", pixels="rgb8"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_some_frames_of_any_format_are_those_of_the_whole(tmp_path, name):
    path = write(tmp_path / f"clip.{name}", **FORMATS[name])
    whole, fps = read_video(path)
    some, kept = read_video(path, frames=6)
    places = [0, 9, 19, 29, 39, 49]
    assert len(whole) == FRAMES
    assert torch.equal(some, whole[places])
    assert kept == pytest.approx(fps * 5 / 49)
    assert fps == pytest.approx(25, rel=1e-3)  # Matroska and WebM count in milliseconds


def test_frames_lie_evenly_in_time_where_the_rate_varies(tmp_path):
    ticks = [0, 40, 80, 120, 160, 400, 640, 680, 720, 760, 800]
    clip, fps = read_video(write(tmp_path / "vfr.mp4", clip=numbered(11), ticks=ticks), frames=5)
    assert numbers(clip) == [0, 4, 5, 6, 10]  # nearest to 0, 200, 400, 600 and 800 ms (160 is nearer than 400)
    assert fps == pytest.approx(5)


def test_a_long_video_is_not_decoded_as_a_whole(tmp_path):
    class Counted:
        """A container that counts the frames it decodes."""

        def __init__(self, container):
            self.container, self.frames = container, 0

        def seek(self, *arguments, **options):
            self.container.seek(*arguments, **options)

        def decode(self, stream):
            for frame in self.container.decode(stream):
                self.frames += 1
                yield frame

    path = write(tmp_path / "long.mp4", clip=numbered(50).repeat(8, 1, 1, 1), g=10)
    with video._opened(path) as (container, stream):
        timeline = video._timeline(container, stream, path)
    with video._opened(path) as (container, stream):
        counted = Counted(container)
        pixels = video._decode(counted, stream, timeline, [0, 123, 305, 399])
    assert numbers(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255) == [0, 23, 5, 49]
    assert counted.frames <= 1 + 3 * 10


@pytest.mark.parametrize(
    ("turns", "matrix"), [(-1, (0, 1, -1, 0)), (2, (-1, 0, 0, -1)), (1, (0, -1, 1, 0)), (0, (1, 0, 0, 1))], ids=str
)
def test_a_phones_rotation_is_applied(tmp_path, turns, matrix):
    """The track header's matrix (a, b, c, d) sends (x, y) to (a x + c y, b x + d y); y points down."""
    clip = numbered(3).clone()
    clip[..., :8, :8] = 1
    data = bytearray(write(tmp_path / "clip.mp4", clip=clip).read_bytes())
    a, b, c, d = (value << 16 for value in matrix)
    at = data.index(b"tkhd") + 4 + 40
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(data)
    straight, turned = (read_video(tmp_path / name)[0] for name in ("clip.mp4", "turned.mp4"))
    assert torch.equal(turned, torch.rot90(straight, turns, (-2, -1)))


def sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def no_frames(path):
    with av.open(str(path), "w", format="avi") as container:
        stream = container.add_stream("mpeg4", rate=24)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        container.start_encoding()


def cut(path, start=0.0, end=1.0, faststart=True):
    write(path)
    if faststart:
        write_mp4(path, numbered(), 25)
    data = path.read_bytes()
    path.write_bytes(data[int(start * len(data)) : int(end * len(data))])


def damaged(path):
    data = bytearray(write(path).read_bytes())
    at = data.index(b"mdat") + 40
    data[at : at + 2000] = b"\xff" * 2000
    path.write_bytes(data)


BROKEN = {
    "missing": (lambda path: None, "there is no video"),
    "folder": (lambda path: path.mkdir(), "is not a file"),
    "text": (lambda path: path.write_text("a red circle moves left"), "cannot be read as a video"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read as a video"),
    "cut, index at the end": (lambda path: cut(path, end=0.6, faststart=False), "cut off or damaged"),
    "cut, index at the start": (lambda path: cut(path, end=0.9), "cut off or damaged: it announces 50 frames"),
    "headless": (lambda path: cut(path, start=0.2), "cannot be read as a video"),
    "damaged": (damaged, "damaged"),
    "sound": (sound, "only sound"),
    "no frames": (no_frames, "holds no frames"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_video_is_refused_with_a_cure(tmp_path, kind):
    make, message = BROKEN[kind]
    path = tmp_path / "clip.mp4"
    make(path)
    with pytest.raises(BadInputError, match=message) as caught:
        read_video(path, frames=4)
    assert str(path) in str(caught.value)
    assert any(cure in str(caught.value) for cure in ("Check the path", "Give a video", "ffmpeg -i"))


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    path = write(tmp_path / "clip.mp4")
    monkeypatch.setattr(video, "MAX_READ_PIXELS", 10 * 32 * 48)
    monkeypatch.setattr(video, "_decode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(BadInputError, match="critic.frames=10") as caught:
        read_video(path, frames=11)
    assert "scale=1280" in str(caught.value)


def test_a_slow_clip_keeps_its_rate(tmp_path):
    _, fps = read_video(write_mp4(tmp_path / "slow.mp4", numbered(9), 9 / 4))
    assert fps == 9 / 4
