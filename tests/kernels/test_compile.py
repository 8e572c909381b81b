"""Kernels compiled ahead of time: they compile, fit in shared memory and spill no registers.

The fast suite compiles each kernel once. The slow one compiles for one card each kernel with each tile, and with each
of its constants and types, and for the newest and the data center cards each with each tile.
``python -m bench.kernels.resources`` has them all, for all cards.
"""

import importlib
import json
import subprocess
import sys

import pytest

from bench.kernels import resources as kernel_resources
from lowmem_drf.kernels.tiles import CARDS, SHARED_KIB, Tile, tiles_for

slow = pytest.mark.slow
ROOT = kernel_resources.FOLDER.parent
SHARED = {"tiles", "checks", "operators", "attention_common"}
"""Files of ``kernels/`` without a kernel."""
FILES = sorted({path.stem for path in (ROOT / "kernels").glob("*.py")} - SHARED)
CARD, TWIN = 86, 89
"""The twin has the same tiles and limits. Compared once: 87 configurations had the same registers, spills and shared
memory on both."""
OTHERS = [90, 120]
LEAST = 190
"""Configurations that are compiled at least: far fewer means that a table or a card was lost."""


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
    """Of the command itself: it drops TRITON_INTERPRET, which the tests set where there is no card."""
    found = compiled(tmp_path_factory, "--covering", str(CARD), "--quick", *map(str, OTHERS))
    assert len(found) >= LEAST
    return found


def compiled(tmp_path_factory, *options):
    path = tmp_path_factory.mktemp("resources") / "rows.json"
    command = [sys.executable, "-m", "bench.kernels.resources", "--json", str(path), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"sm_{CARD}" in done.stdout
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


def launched():
    return {name for module in modules().values() for name in vars(module) if name.endswith("_kernel")}


def test_every_kernel_compiles(tmp_path_factory):
    rows = compiled(tmp_path_factory, "--once", str(CARD))
    assert {row["kernel"] for row in rows} == launched() != set() and len(rows) == len(launched())
    assert [row["name"] for row in rows if row["spill_bytes"] or row["shared_kib"] > SHARED_KIB[CARD]] == []


@slow
def test_every_kernel_file_is_covered(rows):
    assert kernel_resources.kernel_files() == FILES != []
    assert {(row["file"], row["card"]) for row in rows} == {(file, card) for file in FILES for card in (CARD, *OTHERS)}


@slow
def test_every_kernel_is_covered(rows):
    assert {row["kernel"] for row in rows} == launched()


@slow
def test_every_kernel_fits_in_shared_memory(rows):
    assert [row["name"] for row in rows if row["shared_kib"] > SHARED_KIB[row["card"]]] == []


@slow
def test_no_kernel_spills(rows):
    assert [(row["card"], row["name"], row["spill_bytes"]) for row in rows if row["spill_bytes"]] == []


@slow
def test_products_are_counted(rows):
    counted = {(row["kernel"], "p_sums" in row["constants"], row["products"]) for row in rows if row["products"]}
    backward = "attention_key_backward_kernel"
    assert {one for one in counted if one[0] != "attention_int8_kernel"} == {
        ("attention_forward_kernel", False, 2), ("attention_query_backward_kernel", False, 3),
        (backward, False, 5), (backward, True, 4), ("int8_product_kernel", False, 1),
        ("attention_half_backward_kernel", False, 5),
    }  # fmt: skip
    assert all(row["barriers"] > 0 for row in rows if row["products"] and row["dtype"] != "fp32")


@slow
def test_consumer_cards_sum_in_fp16_where_that_is_twice_as_fast(rows):
    """The integer products of int8 attention, and those of its weights with v; all products of a backward but the
    scores. Nothing else sums in fp16."""
    found = {(row["card"] in (86, 89, 120), row["sums"]) for row in rows if row["kernel"] == "attention_int8_kernel"}
    assert found <= {(True, "f16 s32"), (False, "f32 s32")} and found
    some = "attention_int8", "attention_half_backward"
    others = {(row["file"], row["sums"]) for row in rows if row["products"] and row["file"] != some[0]}
    assert {sums for file, sums in others if file == "int8_linear"} == {"s32"}
    assert {sums for file, sums in others if file == some[1]} == {"f16 f32"}
    assert {sums for file, sums in others if file not in ("int8_linear", *some)} <= {"f32", ""}


@slow
def test_every_tile_is_used_and_says_why(rows):
    used = {(row["file"], json.dumps(row["tile"], sort_keys=True), row["warps"], row["stages"]) for row in rows}
    for (file, name), tiles in tables().items():
        for tile in tiles if name != "WAYS" else ():  # between kernels
            key = file, json.dumps(dict(tile.sizes), sort_keys=True), tile.warps, tile.stages
            if {CARD, *OTHERS} & set(tile.cards):
                assert key in used, f"{file}: {name} has a tile that nothing takes: {tile}"
            assert tile.why and tile.cards and set(tile.cards) <= set(CARDS), f"{file}: {name}: {tile}"


@pytest.mark.parametrize("card", CARDS)
def test_every_card_has_a_tile_in_every_table(card):
    assert {file for file, _ in tables()} == set(FILES)
    assert [table for table, tiles in tables().items() if not tiles_for(tiles, card)] == []


def test_the_card_of_the_fast_suite_is_as_its_twin():
    assert SHARED_KIB[CARD] == SHARED_KIB[TWIN]
    for table, tiles in tables().items():
        assert tiles_for(tiles, CARD) == tiles_for(tiles, TWIN), table


def test_figures_are_those_of_ptxas():
    lines = (
        "Function properties for f",
        "24 bytes stack frame, 20 bytes spill stores, 12 bytes spill loads",
        "Used 255 registers, used 1 barriers",
    )
    assert kernel_resources._from_ptxas("\n".join(lines)) == (255, 32)
    with pytest.raises(ValueError, match="said nothing"):
        kernel_resources._from_ptxas("")


def test_products_and_barriers_are_those_of_the_busiest_loop():
    ir = [
        "scf.for",
        "  %a = tt.dot %x",
        "  scf.for",
        "    %b = tt.dot %x",
        "    %c = tt.dot %x",
        "  }",
        "}",
        "%d = tt.dot",
    ]
    assert kernel_resources._products("\n".join(ir)) == 2
    mma = "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16"
    ptx = ["bar.sync 0;", "$L__BB0_1:", mma, "bar.sync 0;", mma, "@%p1 bra $L__BB0_1;", "bar.sync 0;"]
    assert kernel_resources._barriers("\n".join(ptx)) == 1 and kernel_resources._barriers("bar.sync 0;") == 0


def test_blocks_on_a_multiprocessor():
    assert kernel_resources._blocks(89, 255, 48.0, 4) == 2  # registers, and shared memory
    assert kernel_resources._blocks(89, 128, 64.0, 4) == 1  # shared memory
    assert kernel_resources._blocks(89, 32, 1.0, 8) == 6 and kernel_resources._blocks(90, 32, 1.0, 8) == 8  # warps


def test_nothing_is_compiled_where_triton_is_interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        kernel_resources.resources([("attention", 89, 0)])


def test_a_file_without_variants_is_an_error(monkeypatch):
    monkeypatch.setattr(kernel_resources.importlib, "import_module", lambda name: object())
    with pytest.raises(AttributeError, match="kernels/other.py has no variants"):
        kernel_resources._variants("other", 89)
