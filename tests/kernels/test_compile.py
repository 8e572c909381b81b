"""Every kernel with every tile, compiled ahead of time for every card: it compiles, fits in shared memory, and keeps
its registers."""

import importlib
import json
import subprocess
import sys

import pytest

from bench.kernels import resources as kernel_resources
from lowmem_drf.kernels.tiles import CARDS, SHARED_KIB, Tile, tiles_for

ROOT = kernel_resources.FOLDER.parent
FILES = sorted(path.stem for path in (ROOT / "kernels").glob("*.py") if path.name != "tiles.py")
SPILLS: dict[tuple[int, str], tuple[int, str]] = {}
"""(card, variant's name) to (bytes that it may spill, why that is the better choice)."""


def modules():
    return {name: importlib.import_module(f"lowmem_drf.kernels.{name}") for name in FILES}


def tables():
    """(file, name of the table) to its tiles."""
    found = {}
    for file, module in modules().items():
        for name, value in vars(module).items():
            if isinstance(value, tuple) and value and all(isinstance(one, Tile) for one in value):
                found[file, name] = value
    return found


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Of all cards, by the command itself: it drops TRITON_INTERPRET, which is set here where there is no card."""
    path = tmp_path_factory.mktemp("resources") / "rows.json"
    done = subprocess.run(
        [sys.executable, "-m", "bench.kernels.resources", "--json", str(path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert f"sm_{CARDS[0]}" in done.stdout
    return found


def test_every_kernel_file_is_covered(rows):
    assert kernel_resources.kernel_files() == FILES != []
    assert {(row["file"], row["card"]) for row in rows} == {(file, card) for file in FILES for card in CARDS}


def test_every_kernel_is_covered(rows):
    compiled = {row["kernel"] for row in rows}
    launched = {name for module in modules().values() for name in vars(module) if name.endswith("_kernel")}
    assert launched - compiled == set()


def test_every_kernel_fits_in_shared_memory(rows):
    assert [row["name"] for row in rows if row["shared_kib"] > SHARED_KIB[row["card"]]] == []


def test_no_kernel_spills_more_than_is_written_down(rows):
    spilled = {(row["card"], row["name"]): row["spill_bytes"] for row in rows if row["spill_bytes"]}
    assert {key: count for key, count in spilled.items() if count > SPILLS.get(key, (0, ""))[0]} == {}
    assert set(SPILLS) <= set(spilled), "written down, but it spills no longer"


def test_every_tile_is_used_and_says_why(rows):
    used = {(row["file"], json.dumps(row["tile"], sort_keys=True), row["warps"], row["stages"]) for row in rows}
    for (file, name), tiles in tables().items():
        for tile in tiles:
            assert (file, json.dumps(dict(tile.sizes), sort_keys=True), tile.warps, tile.stages) in used, (
                f"{file}: {name} has a tile that nothing takes: {tile}"
            )
            assert tile.why and tile.cards and set(tile.cards) <= set(CARDS), f"{file}: {name}: {tile}"


@pytest.mark.parametrize("card", CARDS)
def test_every_card_has_a_tile_in_every_table(card):
    assert {file for file, _ in tables()} == set(FILES)
    assert [table for table, tiles in tables().items() if not tiles_for(tiles, card)] == []


def test_figures_are_those_of_ptxas():
    lines = (
        "Function properties for f",
        "24 bytes stack frame, 20 bytes spill stores, 12 bytes spill loads",
        "Used 255 registers, used 1 barriers",
    )
    assert kernel_resources._from_ptxas("\n".join(lines)) == (255, 32)
    with pytest.raises(ValueError, match="said nothing"):
        kernel_resources._from_ptxas("")


def test_nothing_is_compiled_where_triton_is_interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        kernel_resources.resources(89)


def test_a_file_without_variants_is_an_error(monkeypatch):
    monkeypatch.setattr(kernel_resources.importlib, "import_module", lambda name: object())
    with pytest.raises(AttributeError, match="kernels/other.py has no variants"):
        kernel_resources._variants("other", 89)
