"""8-bit products keep the LoRA's gradient: the committed figures, and the bench itself on less."""

from __future__ import annotations

import json
import sys

import pytest
from _root import ROOT

sys.path.insert(0, str(ROOT))

from bench.accuracy import int8_products, quant_error

PROMISED = 0.999
"""Cosine of the LoRA's gradient with that in fp32, ToyWorld and an outlier's channel included."""


def check(models) -> None:
    assert models.keys() <= {"ToyWorld", "a block of Wan2.1-1.3B", f"with a channel of {int8_products.OUTLIER:g}"}
    for title, rows in models.items():
        assert rows.keys() == int8_products.VARIANTS.keys()
        for name, row in rows.items():
            assert row["lora"]["cosine"] > PROMISED, (title, name)
        # more is lost than by storing alone, and less than twice as much
        for part in quant_error.PARTS:
            assert 1 < rows["int8 products, bf16"][part]["error"] / rows["int8, bf16"][part]["error"] < 2, (title, part)


def test_the_committed_figures() -> None:
    models = json.loads((ROOT / "bench" / "results" / "int8_products.json").read_text())["models"]
    assert len(models) == 3
    check(models)


@pytest.mark.slow
def test_true_blocks(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(quant_error, "TOKENS", 64)
    file = tmp_path / "out.json"
    assert int8_products.main(["--clips", "0", "--json", str(file)]) == 0
    check(json.loads(file.read_text())["models"])
