"""Drift: what no question asks, as distances from ToyWorld's own scenes."""

import pytest
import torch

from lowmem_drf.scoring.oracle_rates import Drift
from lowmem_drf.toy.captions import caption
from lowmem_drf.toy.drift import SCALES, drift, join, reference, wasserstein
from lowmem_drf.toy.oracle import Looks, measure
from lowmem_drf.toy.scenes import RADIUS, RGB, SPEED, all_combos, draw_tracks, render

COMBOS = all_combos()[::7]


@pytest.fixture(scope="module")
def scenes():
    tracks = draw_tracks(COMBOS, torch.Generator().manual_seed(1))
    return tracks, render(tracks)


def test_the_oracle_measures_the_looks_of_drawn_scenes(scenes):
    tracks, frames = scenes
    looks = measure(frames).looks
    assert (looks.size - tracks.radius.mean(1)).abs().max() < 0.1  # pixels; exact area coverage to first order
    moves = torch.tensor([combo.motion != 4 for combo in COMBOS])
    assert looks.speed[~moves].max() < 0.05 and looks.speed[moves].min() > SPEED[0] - 0.05
    for seen, drawn in ((looks.x, tracks.x), (looks.y, tracks.y)):
        assert (seen - drawn.mean(1)).abs().max() < 0.6  # a triangle's centre of area is not that of its circle
    assert looks.texture.max() < 1e-3 and looks.outline.max() < 0.05 and (looks.edge - 0.66).abs().max() < 0.5
    chroma = RGB.amax(1) - RGB.amin(1)
    assert (looks.saturation - chroma[[combo.color for combo in COMBOS]]).abs().max() < 0.1  # RGB_JITTER twice


def test_the_same_distribution_is_at_a_distance_of_nothing():
    real = reference(COMBOS)
    assert drift(real, real) == dict.fromkeys([*Looks._fields, "mean"], 0.0)
    halves = [Looks(*(values[start::2] for values in real)) for start in (0, 1)]
    assert drift(*halves)["mean"] < 0.1
    assert drift(join(halves), real)["mean"] == pytest.approx(0, abs=1e-5)


def test_what_grows_or_becomes_alike_drifts():
    real = reference(COMBOS)
    grown = drift(real._replace(size=real.size + 1.4), real)
    assert grown["size"] == pytest.approx(1.4 / SCALES["size"], rel=1e-3) and grown["mean"] == grown["size"] / 8
    alike = drift(real._replace(size=real.size.mean().expand_as(real.size)), real)["size"]
    assert 0.3 < alike < (RADIUS[1] - RADIUS[0]) / SCALES["size"]  # the same mean, and every shape of one size


def test_wasserstein_is_the_mean_distance_of_sorted_values():
    a, b = torch.tensor([3.0, 1.0, 2.0]).repeat(100), torch.tensor([11.0, 13.0, 12.0]).repeat(100)
    assert wasserstein(a, b) == pytest.approx(10.0)


def test_clips_without_a_shape_are_left_out(scenes):
    _, frames = scenes
    texts = [caption(combo) for combo in COMBOS]
    seen, empty = Drift(), Drift()
    seen.add(frames, texts)
    empty.add(torch.full_like(frames[:3], 0.5), texts[:3])
    both, alone = Drift.result([seen, empty]), Drift.result([seen])
    assert both["radius"] == alone["radius"] and both["size"] == pytest.approx(alone["size"], abs=0.05)
    assert Drift.result([empty]) == {}
