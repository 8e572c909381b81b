"""Intervals over prompts: they cover the truth, and do without what was not measured."""

import pytest
import torch

from lowmem_drf.scoring.intervals import changes, win_rates


def rows(values_PK):
    return [{f"m{k}": value for k, value in enumerate(row)} for row in values_PK.tolist()]


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    for prompts in (5, 8, 40):
        noise = torch.randn(2, prompts, 150, generator=torch.Generator().manual_seed(prompts))
        base, tuned = rows(noise[0]), rows(noise[1] + 0.5)
        found = changes(base, tuned)
        covered = sum(row["low"] <= 0.5 <= row["high"] for row in found.values()) / 150
        assert 0.91 < covered < 0.98, prompts
    assert changes(base, tuned) == found  # drawn from a fixed seed


def test_what_was_not_measured_is_left_out():
    base = [{"blur": 1.0, "ti": 1.0}, *[{"blur": 3.0}] * 5, {"ti": 2.0}]
    tuned = [{"blur": 2.0, "ti": 1.5}, *[{"blur": 5.0}] * 5, {"blur": 9.0}]
    found = changes(base, tuned)
    assert found["blur"]["prompts"] == 6 and 1 <= found["blur"]["low"] < found["blur"]["mean"] == 11 / 6
    assert found["ti"] == {"mean": 0.5, "low": None, "high": None, "prompts": 1}  # one prompt says nothing of others
    assert changes([{"a": 1.0}], [{"b": 1.0}]) == {}


def test_a_win_rate_of_all_is_not_certain_and_a_tie_counts_half():
    base, tuned = [{"reward": float(i)} for i in range(4)], [{"reward": float(i + (i > 0))} for i in range(4)]
    assert win_rates(base, tuned, ("reward", "other"))["reward"]["mean"] == pytest.approx(3.5 / 4)
    assert "other" not in win_rates(base, tuned, ("reward", "other"))
    all_won = win_rates(base, [{"reward": 9.0}] * 4, ("reward",))["reward"]
    assert (all_won["mean"], all_won["high"]) == (1, 1) and all_won["low"] == pytest.approx(0.51, abs=0.01)  # Wilson
