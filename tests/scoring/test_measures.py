"""Measures of a clip tell known defects from a clip without them, at ToyWorld's size and at twice that."""

import pytest
import torch
from torch.nn.functional import avg_pool2d, interpolate

from lowmem_drf.scoring.measures import MEASURES, clip_measures


def moving(size: int, frames: int = 9) -> torch.Tensor:
    """A soft random picture that moves two pixels a frame."""
    noise = torch.rand(1, 3, size // 4, size // 4, generator=torch.Generator().manual_seed(size))
    picture = interpolate(noise, size=size, mode="bicubic")[0].clamp(0, 1)
    return torch.stack([picture.roll(2 * t, -1) for t in range(frames)])


def noisy(clip: torch.Tensor, deviation: float = 0.02) -> torch.Tensor:
    return clip + deviation * torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))


def blocks(clip: torch.Tensor) -> torch.Tensor:
    return 0.5 * clip + 0.5 * interpolate(avg_pool2d(clip, 8), scale_factor=8)


DEFECTS = {  # defect -> (what it does to a clip, measures that rise, measures that fall)
    "blurred": (lambda clip: avg_pool2d(clip, 5, 1, 2, count_include_pad=False), "blur", "si ti noise motion"),
    "flickering": (lambda clip: clip * torch.tensor([1, 0.8])[torch.arange(9) % 2, None, None, None], "flicker", ""),
    "fading": (lambda clip: clip * torch.linspace(1, 0.2, 9)[:, None, None, None], "", "saturation si"),
    "frozen": (lambda clip: clip[:1].expand(9, -1, -1, -1), "freeze", "motion ti"),
    "half frozen": (lambda clip: clip[[0, 0, 1, 1, 2, 2, 3, 3, 4]], "freeze", "motion ti"),
    "blocky": (blocks, "blocking", ""),
    "gray": (lambda clip: clip.mean(1, keepdim=True).expand(-1, 3, -1, -1), "", "saturation"),
    "noisy": (noisy, "noise", ""),
}


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_moves_its_measures_and_no_other_defects(defect, size):
    spoil, rising, falling = DEFECTS[defect]
    clip = moving(size)
    before, after = clip_measures(clip), clip_measures(spoil(clip).clamp(0, 1))
    assert list(before) == list(after) == list(MEASURES)
    for name in rising.split():
        assert after[name] > before[name] + 0.01 * abs(before[name]), name
    for name in falling.split():
        assert after[name] < 0.9 * before[name], name
    if "flicker" not in rising:
        assert after["flicker"] < 0.005  # a steady fade is none
    if "freeze" not in rising:
        assert after["freeze"] == 0
    if "blocking" not in rising:
        assert after["blocking"] < 1.5


def test_measures_are_what_they_say():
    clip = moving(32)
    frozen = clip_measures(clip[:1].expand(9, -1, -1, -1))
    assert (frozen["freeze"], frozen["motion"], frozen["ti"], frozen["flicker"]) == (1, 0, 0, 0)
    assert clip_measures(clip[[0, 0, 1, 1, 2, 2, 3, 3, 4]])["freeze"] == 0.5
    assert clip_measures(clip)["motion"] == pytest.approx((clip[1:] - clip[:-1]).abs().mean().item(), rel=1e-5)
    gray = noisy(torch.full((9, 1, 64, 64), 0.5), 0.03).expand(-1, 3, -1, -1)
    assert clip_measures(gray)["noise"] == pytest.approx(0.03, rel=0.05)
    flashing = torch.tensor([0.8, 0.6])[torch.arange(9) % 2, None, None, None].expand(-1, 3, 32, 32)
    assert clip_measures(flashing)["flicker"] == pytest.approx(0.2)
    red = clip_measures(torch.tensor([1.0, 0, 0])[None, :, None, None].expand(3, 3, 32, 32))
    assert red["saturation"] == pytest.approx(0.53, abs=0.01)


def test_what_has_no_meaning_is_left_out():
    clip = moving(32)
    assert list(clip_measures(clip[:1])) == ["si", "blur", "blocking", "noise", "saturation"]  # of an image model
    assert "flicker" not in clip_measures(clip[:2])
    assert not clip_measures(torch.full((3, 3, 32, 32), 0.5)).keys() & {"blur", "blocking"}  # no edge, no gradient
    assert clip_measures(clip[..., :31, :29].bfloat16())["si"] > 0  # odd sizes, 16 bit
