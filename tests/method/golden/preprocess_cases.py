"""The cases of ``preprocess.npz``: geometries, sizes and frames, for the script that writes the file and the test that
reads it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lowmem_drf.method.preprocess import VideoGeometry

FILE = Path(__file__).with_name("preprocess.npz")
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
GEOMETRIES = {
    "toy": VideoGeometry(4, 2, 2, 256, 1024, CLIP_MEAN, CLIP_STD),
    "qwen2.5": VideoGeometry(14, 2, 2, 128 * 28 * 28, 768 * 28 * 28, CLIP_MEAN, CLIP_STD),
    "toy3": VideoGeometry(4, 2, 2, 256, 2048, HALF, HALF, bounds="clip"),
    "capped": VideoGeometry(4, 2, 2, 256, 8192, HALF, HALF, max_video_tokens=60),
    "capped3": VideoGeometry(4, 2, 2, 256, 8192, HALF, HALF, bounds="clip", max_video_tokens=12),
    "qwen3": VideoGeometry(16, 2, 2, 128 * 32 * 32, 768 * 32 * 32, HALF, HALF, bounds="clip"),
}
MUTED = (80, 170)
"""Levels of the uint8 frames: far from black and white, where uint8 saturates between the two passes of the resize."""
STORED = 1024
"""Values stored of a larger case, spread over all of them."""


@dataclass(frozen=True)
class Case:
    geometry: str
    frames: int
    height: int
    width: int
    is_image: bool = False

    @property
    def name(self) -> str:
        return f"{self.geometry}-{'image' if self.is_image else self.frames}-{self.height}x{self.width}"


CASES = tuple(
    Case(*case)
    for case in (
        ("toy", 2, 32, 32),  # as it is
        ("toy", 3, 24, 40),  # as it is; a frame is missing
        ("toy", 2, 17, 31),  # odd
        ("toy", 2, 5, 9),  # up
        ("toy", 2, 64, 64),  # down
        ("toy", 2, 75, 41),  # portrait, odd, down
        ("toy", 2, 20, 90),  # wide
        ("toy", 1, 28, 13),  # one frame
        ("toy", 1, 37, 50, True),
        ("toy", 1, 90, 11, True),
        ("qwen2.5", 2, 480, 832),
        ("qwen2.5", 3, 333, 181),  # portrait, odd
        ("qwen2.5", 2, 720, 1280),  # down
        ("qwen2.5", 2, 121, 99),  # up
        ("qwen2.5", 1, 300, 401, True),
        ("toy3", 4, 32, 32),
        ("toy3", 3, 33, 21),  # odd
        ("toy3", 5, 50, 90),  # a frame is missing
        ("toy3", 2, 6, 31),  # lower than a token
        ("capped", 4, 70, 60),
        ("capped3", 4, 60, 70),
        ("qwen3", 2, 480, 832),
        ("qwen3", 4, 601, 399),  # portrait, odd, down
        ("qwen3", 3, 90, 131),  # up
    )
)


def frames_THWC(case: Case, low: int = 0, high: int = 255) -> np.ndarray:
    """uint8 noise in [low, high] by integer arithmetic, the same on every machine: the hardest input for a resize."""
    index = np.arange(case.frames * case.height * case.width * 3, dtype=np.uint64) + np.uint64(1)
    mixed = index * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    noise = (mixed >> np.uint64(40)) % np.uint64(high - low + 1) + np.uint64(low)
    return noise.astype(np.uint8).reshape(case.frames, case.height, case.width, 3)


def stored_places(count: int) -> np.ndarray:
    """The places of the stored values: all ``count``, or ``STORED`` of them at a stride that meets every row and
    column."""
    return np.arange(count) if count <= 2 * STORED else (np.arange(STORED, dtype=np.int64) * 1_000_003) % count
