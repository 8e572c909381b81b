"""Kept frames are sorted, unique and inside the clip; each belongs to exactly one visited chunk."""

import math

import pytest
import torch

from lowmem_drf.errors import BadInputError
from lowmem_drf.method.frames import (
    backward_chunks,
    chunk_of_frame,
    frames_at_rate,
    frames_of_chunk,
    kept_fps,
    kept_frames,
    motion_frames,
)


@pytest.mark.parametrize(
    ("n_frames", "n_keep", "expected"),
    [(21, 4, (0, 6, 13, 20)), (9, 9, tuple(range(9))), (9, 1, (4,)), (81, 2, (0, 80))],
)
def test_uniform_frames(n_frames, n_keep, expected):
    assert kept_frames(n_frames, n_keep) == expected


@pytest.mark.parametrize("mode", ["uniform", "random_phase"])
@pytest.mark.parametrize(("n_frames", "n_keep"), [(1, 1), (9, 4), (9, 9), (81, 1), (81, 16), (81, 80)])
def test_frames_are_sorted_unique_and_inside(n_frames, n_keep, mode):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        kept = kept_frames(n_frames, n_keep, mode, generator)
        assert len(set(kept)) == n_keep
        assert list(kept) == sorted(kept)
        assert 0 <= kept[0] <= kept[-1] < n_frames


def test_random_phase_reaches_every_frame_and_is_evenly_spaced():
    generator = torch.Generator().manual_seed(0)
    draws = [kept_frames(21, 4, "random_phase", generator) for _ in range(300)]
    assert {frame for draw in draws for frame in draw} == set(range(21))
    assert all(b - a in (5, 6) for draw in draws for a, b in zip(draw[:-1], draw[1:], strict=True))
    generator.manual_seed(0)
    assert kept_frames(21, 4, "random_phase", generator) == draws[0]


@pytest.mark.parametrize(
    ("n_keep", "mode", "what"), [(0, "uniform", "critic.frames"), (10, "uniform", "1..9"), (3, "odd", "frame mode")]
)
def test_bad_choice_is_refused(n_keep, mode, what):
    with pytest.raises(BadInputError, match=what):
        kept_frames(9, n_keep, mode)


def hugging_face_frames(total, fps, rate, patch, low=4, high=768):
    """A copy of ``Qwen2VLVideoProcessor.sample_frames`` of transformers 5.23: the class itself needs torchvision."""
    max_frames = math.floor(min(high, total) / patch) * patch
    num_frames = total / fps * rate
    num_frames = min(max(num_frames, low), max_frames, total)
    return math.floor(num_frames / patch) * patch


@pytest.mark.parametrize("patch", [1, 2, 3])
@pytest.mark.parametrize("rate", [0.1, 1, 2, 7.5, 24, 100])
def test_frames_at_a_rate_are_hugging_faces(rate, patch):
    for total in (patch, 5, 9, 81, 240, 2000, 100_000):
        for fps in (8, 16, 23.976, 30):
            expected = hugging_face_frames(total, fps, rate, patch)
            assert frames_at_rate(total, fps, rate, patch) == expected
            assert 1 <= expected <= total


def test_number_of_frames_of_a_preset_and_of_short_clips():
    assert frames_at_rate(81, 16, 2) == 10
    assert frames_at_rate(1, 16, 2) == 1  # Hugging Face fails: no frame is left
    assert frames_at_rate(3, 16, 2) == 2


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_cannot_be_used_is_refused(rate):
    with pytest.raises(BadInputError, match="above 0"):
        frames_at_rate(81, 16, rate)


@pytest.mark.parametrize("fps", [0.0, float("nan")])
def test_a_rate_needs_a_frame_rate(fps):
    with pytest.raises(BadInputError, match="number of frames"):
        frames_at_rate(81, fps, 2)


@pytest.mark.parametrize("mode", ["uniform", "random_phase"])
@pytest.mark.parametrize(("n_frames", "n_keep"), [(81, 9), (81, 41), (9, 9), (2000, 8)])
def test_the_rate_of_kept_frames_is_that_of_their_times(n_frames, n_keep, mode):
    """Each kept frame is rounded down, so the mean step is off by less than one frame over all steps."""
    kept = kept_frames(n_frames, n_keep, mode, torch.Generator().manual_seed(0))
    seconds = (kept[-1] - kept[0]) / 24 / (n_keep - 1)
    assert abs(1 / kept_fps(n_frames, 24, n_keep, mode) - seconds) * 24 * (n_keep - 1) < 1
    if mode == "uniform":
        assert kept_fps(n_frames, 24, n_keep) == pytest.approx(1 / seconds)


def test_the_rate_of_one_frame_is_that_of_its_clip():
    assert kept_fps(48, 24, 1) == 0.5


@pytest.mark.parametrize("temporal_factor", [1, 2, 4])
def test_chunks_partition_the_frames(temporal_factor):
    chunks = 6
    made = [frame for chunk in range(chunks) for frame in frames_of_chunk(chunk, temporal_factor)]
    assert made == list(range(1 + temporal_factor * (chunks - 1)))
    assert all(frame in frames_of_chunk(chunk_of_frame(frame, temporal_factor), temporal_factor) for frame in made)


@pytest.mark.parametrize("window", [None, 0, 1, 2, 5, 50])
@pytest.mark.parametrize("kept", [(0,), (20,), (0, 6, 13, 20), (3, 4, 5), tuple(range(21))], ids=str)
def test_every_kept_frame_is_visited_once(kept, window):
    visits = backward_chunks(kept, 4, window)
    assert [visit.chunk for visit in visits] == sorted({visit.chunk for visit in visits}, reverse=True)
    assert visits[0].chunk == chunk_of_frame(kept[-1], 4)
    assert sorted(slot for visit in visits for slot in visit.slots) == list(range(len(kept)))
    for visit in visits:
        assert [kept[slot] for slot in visit.slots] == [frames_of_chunk(visit.chunk, 4)[i] for i in visit.local]
    for visit, following in zip(visits, [*visits[1:], None], strict=True):
        assert not visit.hands_back or (following is not None and following.chunk == visit.chunk - 1)


@pytest.mark.parametrize(
    ("kept", "window", "chunks", "handing_back"),
    [
        ((20,), None, [5, 4, 3, 2, 1, 0], [5, 4, 3, 2, 1]),
        ((20,), 5, [5, 4, 3, 2, 1, 0], [5, 4, 3, 2, 1]),
        ((20,), 2, [5, 4, 3], [5, 4]),
        ((20,), 0, [5], []),
        ((0, 6, 13, 20), 0, [5, 4, 2, 0], []),
        ((0, 6, 13, 20), 1, [5, 4, 3, 2, 1, 0], [5, 4, 2]),
        ((0,), None, [0], []),
    ],
    ids=str,
)
def test_the_window_ends_below_the_last_kept_chunk_passed(kept, window, chunks, handing_back):
    visits = backward_chunks(kept, 4, window)
    assert [visit.chunk for visit in visits] == chunks
    assert [visit.chunk for visit in visits if visit.hands_back] == handing_back


@pytest.mark.parametrize(("n_frames", "n_keep"), [(9, 1), (9, 2), (9, 9), (81, 8), (81, 40), (33, 16)])
def test_motion_frames_are_sorted_unique_and_have_both_ends(n_frames, n_keep):
    x_0 = torch.randn(2, 3, (n_frames - 1) // 4 + 1, 4, 4, generator=torch.Generator().manual_seed(0))
    chosen = motion_frames(x_0, n_frames, n_keep, 4)
    assert len(chosen) == n_keep and list(chosen) == sorted(set(chosen))
    assert n_keep == 1 or (chosen[0], chosen[-1]) == (0, n_frames - 1)


def test_motion_frames_lie_where_the_clip_moves():
    x_0 = torch.zeros(1, 2, 21, 4, 4)
    still = motion_frames(x_0, 81, 8, 4)
    assert max(b - a for a, b in zip(still, still[1:], strict=False)) <= 12  # as evenly as 8 frames can lie in 81
    x_0[:, :, 10:] = 1.0  # all the change is in latent frame 10, which makes the pixel frames 37 to 40
    moving = motion_frames(x_0, 81, 8, 4)
    assert sum(frame in frames_of_chunk(10, 4) for frame in moving) >= 4
    assert moving[0] == 0 and moving[-1] == 80
