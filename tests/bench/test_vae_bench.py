"""The benches of the VAE stream, cut short, and their arithmetic."""

import json
import sys

import pytest
import torch
from _root import ROOT

sys.path.insert(0, str(ROOT))

from bench.accuracy import vae_dtype, vae_window


@pytest.mark.slow
def test_window(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(vae_window, "SETTINGS", ((9, 9), (17, 2)))
    monkeypatch.setattr(vae_window, "WINDOWS", (0, 2))
    assert vae_window.main(["--clips", "1", "--repeats", "1", "--json", str(tmp_path / "out.json")]) == 0
    short, long = json.loads((tmp_path / "out.json").read_text())["settings"]
    assert short["kept"] == list(range(9)) and long["kept"] == [0, 16]
    assert [row["vae_backward"] for row in long["rows"]] == ["window:0", "window:2", "exact"]
    chunks = [[row["chunks"] for row in setting["rows"]] for setting in (short, long)]
    assert chunks == [[3, 3, 3], [2, 4, 5]]
    for name in ("critic", "noise"):
        none, two, exact = (row[name] for row in long["rows"])
        assert none["error"] > two["error"] > exact["error"] == 0
        assert none["cosine"] < two["cosine"] < 1
        assert short["rows"][1][name]["error"] == 0  # two chunks below the last are all there are
    assert 0 <= long["saturation"]["inward_drops"] <= long["saturation"]["clamp_drops"] <= 1
    assert "of the pixels are saturated" in capsys.readouterr().out


def test_longer_clips_turn_round():
    assert vae_window.turning(20) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 7, 6, 5, 4, 3, 2, 1, 0, 1, 2, 3]


def test_saturation_by_hand():
    frames = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.5])
    clips = vae_window.Clips(frames, (0,), frames, {"critic": torch.tensor([1.0, -2.0, 3.0, -4.0, 10.0])})
    squares = 1 + 4 + 9 + 16 + 100
    assert vae_window.saturation(clips) == pytest.approx(
        {"pixels": 4 / 5, "clamp_drops": 30 / squares, "inward_drops": (1 + 16) / squares}
    )


@pytest.mark.slow
def test_dtype(monkeypatch, tmp_path):
    monkeypatch.setattr(vae_dtype, "WAN21", vae_dtype.WAN21 | {"base_dim": 8})
    assert vae_dtype.main(["--clips", "1", "--json", str(tmp_path / "out.json")]) == 0
    vaes = json.loads((tmp_path / "out.json").read_text())["vaes"]
    assert len(vaes) == 2
    for fp32, mixed, fp16, bf16 in vaes.values():
        assert fp32["mean"] == mixed["mean"] < fp16["mean"] < bf16["mean"] / 4
        assert fp32["levels"] == mixed["levels"] > fp16["levels"] > bf16["levels"]
        assert bf16["levels"] <= 127  # all that bf16 has between 0.5 and 1
        assert fp32["error"] < mixed["error"] and fp32["error"] < bf16["error"]
