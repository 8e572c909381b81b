"""The differentiable preprocess returns Hugging Face's patches, in Hugging Face's order.

Oracles: the results of Hugging Face's video and image processors, which need torchvision, for the same frames
(``golden/preprocess.npz``, written by ``golden/make_preprocess.py``); and transformers' numpy/PIL image processor, run
here. That one repeats an image over a temporal patch, so frame i of a temporal patch must give column block i the
values that this frame, as an image, gives any column block.
"""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as hf_smart_resize
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as hf_smart_resize_clip

from lowmem_drf.errors import BadInputError
from lowmem_drf.method.preprocess import VideoGeometry, smart_resize, video_patches

sys.path.insert(0, str(Path(__file__).parent / "golden"))
from preprocess_cases import CASES, FILE, GEOMETRIES, MUTED, frames_THWC, stored_places

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
QWEN = VideoGeometry(14, 2, 2, min_pixels=128 * 28 * 28, max_pixels=768 * 28 * 28, mean=MEAN, std=STD)
TOY = VideoGeometry(4, 2, 2, min_pixels=64, max_pixels=4096, mean=MEAN, std=STD)
THREE = VideoGeometry(2, 3, 3, min_pixels=36, max_pixels=4096, mean=MEAN, std=STD)


def clips(batch, frames, height, width, low=0, high=256):
    generator = np.random.default_rng(0)
    return generator.integers(low, high, (batch, frames, height, width, 3), dtype=np.uint8)


def hugging_face(clip_THWC, geometry):
    """Patches of one clip, frame by frame: (frames, patches of a frame, C, pixels), and the grid of a frame."""
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": geometry.min_pixels, "longest_edge": geometry.max_pixels},
        patch_size=geometry.patch, temporal_patch_size=geometry.temporal_patch, merge_size=geometry.merge,
        image_mean=list(MEAN), image_std=list(STD),
    )  # fmt: skip
    result = processor(images=[Image.fromarray(frame) for frame in clip_THWC], return_tensors="pt")
    patches = result["pixel_values"].reshape(len(clip_THWC), -1, 3, geometry.temporal_patch, geometry.patch**2)
    return patches[:, :, :, 0], result["image_grid_thw"][0, 1:].tolist()


def expected_patches(clips_BTHWC, geometry):
    rows = []
    for clip in clips_BTHWC:
        padded = np.concatenate([clip, *[clip[-1:]] * (-len(clip) % geometry.temporal_patch)])
        frames, grid = hugging_face(padded, geometry)
        frames = frames.unflatten(0, (-1, geometry.temporal_patch))  # time, frame, patch, channel, pixel
        rows.append(frames.permute(0, 2, 3, 1, 4).flatten(2).flatten(0, 1))
    return torch.cat(rows), [len(padded) // geometry.temporal_patch, *grid]


def as_frames(clips_BTHWC):
    return torch.from_numpy(clips_BTHWC).permute(0, 1, 4, 2, 3).float() / 255


@pytest.fixture(scope="module")
def golden():
    with np.load(FILE) as file:
        return dict(file)


def stored_patches(case, levels=(0, 255)):
    """Our patches at the stored places; black, white and a level's step there; the grid."""
    geometry = GEOMETRIES[case.geometry]
    frames = torch.from_numpy(frames_THWC(case, *levels)).permute(0, 3, 1, 2).float() / 255
    patches, grid = video_patches(frames[None], geometry)
    places = torch.from_numpy(stored_places(patches.numel()))
    channel = places // (geometry.temporal_patch * geometry.patch**2) % 3
    mean, std = torch.tensor(geometry.mean)[channel], torch.tensor(geometry.std)[channel]
    return patches.flatten()[places], (0 - mean) / std, (1 - mean) / std, grid.tolist()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_patches_are_those_of_hugging_face_processors(case, golden):
    """Video and image, Qwen2.5-VL's rule and Qwen3-VL's, unresized, up and down, odd, portrait and landscape: within
    1e-5 of the range from black to white; the grid exactly. Overshoot of black or white saturates here."""
    patches, black, white, grid = stored_patches(case)
    assert grid == golden[f"{case.name}/grid"].tolist()
    expected = torch.from_numpy(golden[f"{case.name}/float"]).clamp(black, white)
    assert len(expected) >= 1000
    assert ((patches - expected).abs() / (white - black)).max() < 1e-5


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_patches_of_uint8_frames_differ_by_their_rounding(case, golden):
    """torch resizes uint8 in two passes, rounds to a level after each, and rounds the filter's weights to 15 bits: half
    a level after the second pass; half a level through its weights, whose absolute values sum to 1.25 (bicubic, a =
    -1/2); and under a hundredth of a level from the weights. Without a resize nothing is rounded."""
    patches, black, white, _ = stored_patches(case, MUTED)
    levels = (patches - black) / (white - black) * 255
    expected = torch.from_numpy(golden[f"{case.name}/uint8"])
    resized = smart_resize(case.height, case.width, GEOMETRIES[case.geometry], case.frames) != (case.height, case.width)
    assert (levels - expected).abs().max() <= (0.5 + 0.5 * 1.25 + 0.01 if resized else 1e-3)


def test_the_file_holds_every_case_and_kind():
    assert len({(case.height, case.width) for case in CASES}) >= 10
    assert {case.is_image for case in CASES} == {False, True}
    assert {geometry.bounds for geometry in GEOMETRIES.values()} == {"frame", "clip"}


@pytest.mark.parametrize(
    ("geometry", "batch", "frames", "height", "width"),
    [
        (TOY, 2, 4, 32, 32),
        (TOY, 2, 9, 16, 40),
        (TOY, 1, 1, 8, 8),
        (THREE, 2, 4, 12, 18),
        (QWEN, 1, 3, 28 * 10, 28 * 13),
    ],
    ids=["toy", "odd", "one-frame", "three", "qwen"],
)
def test_patches_are_hugging_face_patches(geometry, batch, frames, height, width):
    clip = clips(batch, frames, height, width)
    expected, grid = expected_patches(clip, geometry)
    patches, grid_thw = video_patches(as_frames(clip), geometry)
    assert grid_thw.tolist() == [grid] * batch
    assert grid_thw.dtype == torch.int64
    assert patches.shape == expected.shape
    # both round fp32 at the division by 255, the subtraction and the division by the standard deviation
    assert (patches - expected).abs().max() <= 2 * 3 * torch.finfo(torch.float32).eps / min(STD)


@pytest.mark.parametrize(
    ("geometry", "height", "width"),
    [(TOY, 30, 41), (TOY, 100, 60), (TOY, 5, 5), (QWEN, 240, 416)],
    ids=["near", "down", "up", "qwen"],
)
def test_resized_patches_are_hugging_face_patches_up_to_its_rounding_to_uint8(geometry, height, width):
    """PIL resizes in two passes and rounds to 1/255 after each: half a level after the second, and half a level through
    the second pass's weights, whose absolute values sum to 1.25 (bicubic, a = -1/2)."""
    # away from black and white, where PIL saturates between its passes
    clip = clips(1, 2, height, width, low=80, high=170)
    expected, grid = expected_patches(clip, geometry)
    patches, grid_thw = video_patches(as_frames(clip), geometry)
    assert grid_thw.tolist() == [grid]
    assert (patches - expected).abs().max() <= (0.5 + 0.5 * 1.25) / 255 / min(STD) * (1 + 1e-3)


def test_overshoot_saturates():
    edge = torch.zeros(1, 2, 3, 30, 40)
    edge[..., 15:, :] = 1
    patches, _ = video_patches(edge, TOY)
    values = patches.reshape(-1, 3, 2 * TOY.patch**2) * torch.tensor(STD)[:, None] + torch.tensor(MEAN)[:, None]
    assert values.min() > -1e-6
    assert values.max() < 1 + 1e-6


def test_a_batch_is_its_clips_one_after_the_other():
    frames = torch.rand(3, 5, 3, 16, 24)
    together, grid = video_patches(frames, TOY)
    alone = [video_patches(clip[None], TOY) for clip in frames]
    assert torch.equal(together, torch.cat([patches for patches, _ in alone]))
    assert torch.equal(grid, torch.cat([grid for _, grid in alone]))


@pytest.mark.parametrize("size", [(8, 16), (10, 13)], ids=["as-is", "resized"])
def test_gradients(size):
    frames = (0.3 + 0.4 * torch.rand(1, 3, 3, *size, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: video_patches(x, TOY)[0], frames, fast_mode=True)


def test_the_last_frame_gets_the_gradient_of_its_repetition():
    frames = torch.rand(1, 3, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(video_patches(frames, TOY)[0].sum(), frames)
    assert (gradient[:, 2] / gradient[:, 0]).sub(2).abs().max() < 1e-10


@pytest.mark.parametrize("geometry", [QWEN, TOY], ids=["qwen", "toy"])
def test_smart_resize_is_hugging_face(geometry):
    sizes = [
        (h, w)
        for h in (5, 14, 31, 56, 240, 480, 704, 1080)
        for w in (7, 28, 50, 416, 832, 1280, 1920)
        if max(h, w) <= 200 * min(h, w)
    ]
    assert len(sizes) > 40
    for height, width in sizes:
        expected = hf_smart_resize(
            height, width, geometry.patch * geometry.merge, geometry.min_pixels, geometry.max_pixels
        )
        assert smart_resize(height, width, geometry) == expected
        assert math.prod(expected) % (geometry.patch * geometry.merge) ** 2 == 0


@pytest.mark.parametrize("geometry", ["qwen3", "toy3"])
def test_smart_resize_of_a_clip_is_hugging_face(geometry):
    geometry = GEOMETRIES[geometry]
    factor = geometry.factor
    for frames in (2, 3, 5, 8, 9, 81):
        for height, width in (
            (5, 7),
            (32, 32),
            (31, 64),
            (240, 416),
            (480, 832),
            (1080, 1920),
            (1920, 1080),
            (50, 1000),
        ):
            capped = max(min(768 * factor**2, geometry.max_pixels // frames), int(geometry.min_pixels * 1.05)) * frames
            expected = hf_smart_resize_clip(frames, height, width, 2, factor, geometry.min_pixels, capped)
            assert smart_resize(height, width, geometry, frames) == expected


def test_a_long_clip_shares_its_pixels():
    """Qwen2.5-VL's cap (``cap_pixels_per_frame``) leaves 300 frames alone, and holds 600 below 90% of 128000 tokens."""
    assert smart_resize(720, 1280, QWEN, 300) == smart_resize(720, 1280, QWEN)
    rows, columns = smart_resize(720, 1280, QWEN, 600)
    assert 0.8 * 0.9 * 128_000 < rows * columns // 28**2 * 300 <= 0.9 * 128_000


def test_extreme_aspect_ratio_is_refused():
    with pytest.raises(BadInputError, match="aspect ratio"):
        video_patches(torch.rand(1, 2, 3, 2, 402), TOY)
