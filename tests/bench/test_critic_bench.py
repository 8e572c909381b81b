"""The critic's benches on tiny models, and their arithmetic on numbers checked by hand."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from _root import ROOT
from _tiny import SavedBytes, save_tiny_critic, tiny_critic

sys.path.insert(0, str(ROOT))

from bench.critic import nf4 as critic_nf4
from bench.critic import packing as critic_packing


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(save_tiny_critic(tmp_path_factory.mktemp("critic"), width=96))


@pytest.mark.parametrize("bound", [0.0, 1e9])
def test_packing(folder: str, bound: float, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(critic_packing, "resolve", lambda *_: folder)
    monkeypatch.setattr(critic_packing, "PROMISED", (4, bound))
    monkeypatch.setattr(critic_packing, "COUNTS", (1, 4))
    code = critic_packing.main(["--clips", "2", "--repeats", "1", "--json", str(tmp_path / "made" / "out.json")])
    result = json.loads((tmp_path / "made" / "out.json").read_text())
    assert code == (bound == 0.0)
    assert ("BROKEN" if code else "is kept") in capsys.readouterr().out
    assert [row["questions"] for row in result["rows"]] == [1, 4]
    one, four = result["rows"]
    assert result["ratio"] == four["packed"]["s"] / one["packed"]["s"]
    assert one["packed"]["kept_mib"] == one["separate"]["kept_mib"] < four["packed"]["kept_mib"]
    sides = [row[way] for row in result["rows"] for way in ("packed", "separate")]
    assert all(side["kept_mib"] < side["peak_mib"] for side in sides)


def test_packing_asks_both_kinds() -> None:
    kinds = [question.kind for question in critic_packing.mixed_questions(24)]
    assert kinds.count("dense") == 6 and kinds[0] == "yesno"


def test_bytes_are_counted() -> None:
    x = torch.ones(1000, requires_grad=True)

    def run() -> None:
        for _ in range(3):  # passes in sequence: the maximum counts, not the sum
            y = x.exp()  # kept
            (gradient,) = torch.autograd.grad((y * 2).sum(), x)

    assert critic_packing.kept_bytes(run, torch.nn.Linear(1, 1)) == 4000
    # exp and its double, or exp, the gradient's double and the product; sums and scalars take less than a line of them
    assert 8000 < critic_packing.peak_bytes(run, torch.device("cpu")) < 17000


def test_kept_bytes_are_those_of_the_tests_own_counter() -> None:
    critic = tiny_critic()
    frames = torch.rand(2, 4, 3, 16, 16)
    asked = critic_packing.mixed_questions(4)
    got = critic_packing.kept_bytes(lambda: critic_packing.gradient(critic, frames, [asked]), critic.model)
    with SavedBytes(critic.model) as saved:
        critic_packing.gradient(critic, frames, [asked])
    assert got == saved.total


@pytest.mark.parametrize("arguments", [[], ["--random"]], ids=["weights", "random"])
def test_nf4(folder: str, arguments: list[str], tmp_path, monkeypatch, capsys) -> None:
    captions = ["a red circle moves left on a gray background", "a blue square stays still on a white background"] * 5
    frames = torch.rand(10, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(critic_nf4, "toy_clips", lambda count: (frames[:count], captions[:count]))
    which = ["--random", folder, "--layers", "1"] if arguments else ["--critic", folder]
    assert critic_nf4.main([*which, "--clips", "10", "--json", str(tmp_path / "out.json")]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["clips"] == 10 and result["random"] == bool(arguments)
    for name in ("nf4", "bf16"):
        assert list(result[name]) == ["TA", "Phy", "VQ", "yes/no", "dense"]
        for row in result[name].values():
            assert -1 <= row["cosine_min"] <= row["cosine_median"] <= 1 and -1 <= row["spearman"] <= 1
    assert "nf4 against the reference, 10 clips" in capsys.readouterr().out
    for kind, row in result["bf16"].items():
        assert row["cosine_mean"] > result["nf4"][kind]["cosine_mean"], "8 bits of mantissa are more than 4 bits in all"


def test_nf4_refuses(capsys) -> None:
    assert critic_nf4.main(["--critic", "/nowhere/at/all", "--clips", "2"]) == 2
    assert "Cannot load the critic" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        critic_nf4.main(["--layers", "2"])


def test_comparison() -> None:
    one = {"TA": torch.tensor([1.0, 2.0, 3.0])}, {"TA": torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])}
    other = {"TA": torch.tensor([5.0, 70.0, 6.0])}, {"TA": torch.tensor([[2.0, 0.0], [4.0, 0.0], [3.0, 0.0]])}
    row = critic_nf4.compare(one, other)["TA"]
    assert row["cosine_mean"] == pytest.approx(2 / 3) and (row["cosine_median"], row["cosine_min"]) == (1, 0)
    assert row["norm_ratio"] == pytest.approx((2 + 2 + 1) / 3)
    assert row["spearman"] == pytest.approx(0.5)  # ranks 1 2 3 and 1 3 2
    assert critic_nf4.spearman(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([4.0, 4.0, 9.0])) == pytest.approx(1)
