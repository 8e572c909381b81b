"""The error of 4 and 8 bits stays within the documented figures: the bench itself, on fewer clips."""

from __future__ import annotations

import json
import sys

import pytest
from _root import ROOT

sys.path.insert(0, str(ROOT))

from bench.accuracy import quant_error
from lowmem_drf.models.generators import KNOWN_GENERATORS
from lowmem_drf.models.wan.names import in_transformer
from lowmem_drf.models.wan.random_generator import empty_transformer

ERROR = {"bf16": 0.03, "int8": 0.04, "int8, bf16": 0.05, "nf4": 0.35, "nf4, bf16": 0.35}
COSINE = {"bf16": 0.9995, "int8": 0.9993, "int8, bf16": 0.999, "nf4": 0.95, "nf4, bf16": 0.95}
"""Bounds on the mean of every part: at least a third above the figures of bench/results/quant_error.json."""


def check(rows) -> None:
    assert rows.keys() == quant_error.VARIANTS.keys()
    for name, row in rows.items():
        assert row.keys() == set(quant_error.PARTS)
        for part, figures in row.items():
            assert 0 < figures["error"] < ERROR[name], (name, part)
            assert COSINE[name] < figures["cosine"] < 1 and figures["worst"] <= figures["cosine"], (name, part)
    for part in quant_error.PARTS:  # the error comes from the bits, not from rounding
        assert rows["nf4"][part]["error"] > 5 * rows["int8"][part]["error"]


@pytest.mark.slow
def test_toyworld_and_a_true_block(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(quant_error, "STEPS", 4)
    file = tmp_path / "made" / "out.json"
    assert quant_error.main(["--clips", "2", "--blocks", "Wan2.1-1.3B", "--json", str(file)]) == 0
    models = json.loads(file.read_text())["models"]
    assert list(models) == ["ToyWorld", "a block of Wan2.1-1.3B"]
    assert "a block of Wan2.1-1.3B" in capsys.readouterr().out
    for rows in models.values():
        check(rows)


def test_the_committed_figures() -> None:
    result = json.loads((ROOT / "bench" / "results" / "quant_error.json").read_text())
    blocks = [f"a block of {name}" for name in quant_error.BLOCKS]
    assert result["clips"] == 16 and list(result["models"]) == ["ToyWorld", *blocks]
    for rows in result["models"].values():
        check(rows)


@pytest.mark.parametrize("name", quant_error.BLOCKS.values())
def test_the_share_of_weights_that_are_packed(name: str) -> None:
    """The docstring of ``models.weights.quant`` names it."""
    model = empty_transformer(KNOWN_GENERATORS[name].config.transformer)
    weights = {key.removesuffix(".weight"): p for key, p in model.named_parameters() if key.endswith(".weight")}
    packed = sum(p.numel() for key, p in weights.items() if in_transformer(key))
    assert packed / sum(p.numel() for p in model.parameters()) == pytest.approx(0.98, abs=0.005)
