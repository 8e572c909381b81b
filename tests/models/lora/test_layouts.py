"""LoRA files of every tool make the change that their tool says, through every door; others are refused by their kind.
Files and truths: ``bench/lora``."""

from __future__ import annotations

import pytest

from bench.lora import changes, layouts
from bench.lora.doors import DOORS, by_base_lora, judged, judged_inspection
from bench.lora.table import READ, REFUSED, main
from lowmem_drf.models.lora.base import base_changes

QUICK = [*layouts.ROWS, *changes.ROWS]
ROWS = {row.name: row for row in (*READ, *REFUSED)}
ALL_DOORS = [
    "ComfyUI, down/up, alpha",
    "a rank and an alpha per layer, musubi",
    "patch embedding as 5-D pair",
    "LightX2V: every module, norms, biases, modulation",
    "DoRA, dora_scale on the input axis, OneTrainer",
    "pairs, LoKr and differences in one file",
    "peft: rank_pattern, alpha_pattern, rsLoRA",
    "peft: lora_bias",
]
"""Rows that differ in what the doors do with them; the table tries all."""


@pytest.mark.parametrize("row", QUICK, ids=lambda row: row.name)
def test_a_lora_changes_what_its_tool_says(row, tmp_path):
    """Merged, and as ``inspect-lora`` shows it."""
    path = row.made().write(tmp_path)
    (merges, merged), (shows, shown, _) = judged(by_base_lora, row, path), judged_inspection(row, path)
    assert merges and shows, (merged, shown)


@pytest.mark.parametrize("name", ALL_DOORS)
def test_every_door_makes_the_same_change(name, tmp_path):
    path = ROWS[name].made().write(tmp_path)
    assert all(right for right, _ in cells(name, path)), cells(name, path)


def cells(name, path):
    return [judged(door, ROWS[name], path) for door in DOORS.values()]


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.name)
def test_other_files_are_refused_by_their_kind(row, tmp_path):
    path = row.made().write(tmp_path)
    (merges, merged), (shows, shown, _) = judged(by_base_lora, row, path), judged_inspection(row, path)
    assert merges and shows, (merged, shown)


@pytest.mark.parametrize("name", ["ComfyUI, A/B, alpha", "LoKr with DoRA, LyCORIS", "LyCORIS w_norm and b_norm"])
def test_a_strength_multiplies_the_whole_change(name, tmp_path):
    file = ROWS[name].made()
    shapes = {parameter: tuple(value.shape) for parameter, value in file.base.items()}
    found = base_changes([(str(file.write(tmp_path)), 0.5)], shapes, lambda text: None)
    assert found.keys() == file.changes.keys()
    for parameter, change in found.items():
        expected = file.changes[parameter]
        assert bool(((change(file.base[parameter]) - expected.delta / 2).abs() <= expected.bound).all()), parameter


@pytest.mark.slow  # 40 s on one core
def test_the_table_is_right():
    assert len(READ) >= 100 and len(REFUSED) >= 80
    assert main([]) == 0
