"""``bench.card`` without a card: the parent, whatever its sections do; the table; the references of the sections."""

import json
import os
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench.card import __main__ as program
from bench.card import attention, parent, presets
from bench.card.parent import run_all
from bench.card.presets import rows
from bench.card.reference import errors
from bench.card.rows import Row, at_most, near
from bench.card.sections import SECTIONS, Section
from bench.card.table import cells, markdown, rich_table
from bench.card.tiles import _Case, _pin, _worst, tuners
from bench.kernels.ops import OPS, build
from bench.plans import record
from lowmem_drf.errors import BadInputError
from lowmem_drf.kernels import attention_int8
from lowmem_drf.preset_files import presets as presets_of_the_package

BY_NAME = {op.name: op for op in OPS}
ROW = '{"what": "x", "measured": 2.0, "unit": "s", "expected": 1.0, "state": "%s", "note": ""}'
WRITES = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('{\"rows\": [%s]}')"
CODE = {
    "fine": WRITES % (ROW % "ok"),
    "wrong": WRITES % (ROW % "wrong"),
    "crashes": f"{WRITES % (ROW % 'ok')}; raise RuntimeError('no such luck')",
    "reports": "print('Error: no room\\nCure: less'); print('Error: bench ended with exit code 1'); exit(1)",
    "dies": "import os; os.kill(os.getpid(), 9)",
    "silent": "",
    "hangs": f"{WRITES % (ROW % 'ok')}; import subprocess, time; "
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); print(child.pid, flush=True); "
    "time.sleep(60)",
}


def sections(*names, limit=20.0):
    return [Section(name, limit) for name in names]


def command(section, path):
    return [sys.executable, "-c", CODE[section.name], str(path)]


def test_a_section_that_fails_is_named_and_the_next_one_runs(tmp_path):
    results = {
        one.name: one
        for one in run_all(sections("crashes", "reports", "dies", "silent", "wrong", "fine"), 1, tmp_path, command)
    }
    assert [(one.outcome, len(one.rows), one.good) for one in results.values()] == [
        ("failed", 1, False),
        ("failed", 0, False),
        ("failed", 0, False),
        ("failed", 0, False),
        ("done", 1, False),
        ("done", 1, True),
    ]
    assert results["crashes"].reason == "exit code 1: RuntimeError: no such luck"
    assert results["reports"].reason == "exit code 1: Error: no room"
    assert "it said nothing" in results["dies"].reason and results["silent"].reason == "it wrote no rows"
    saved = json.loads((tmp_path / "results.json").read_text())["sections"]
    assert [one["name"] for one in saved] == list(results) and saved[0]["rows"][0]["what"] == "x"


def test_a_section_that_hangs_is_stopped_with_its_children_and_keeps_its_rows(tmp_path):
    begun = time.monotonic()
    hung, fine = run_all([*sections("hangs", limit=1.0), *sections("fine")], 1, tmp_path, command)
    assert (hung.outcome, len(hung.rows), fine.outcome) == ("limit", 1, "done")
    assert time.monotonic() - begun < 30
    child = int((tmp_path / "hangs.log").read_text())
    for _ in range(100):  # an orphan is gone when init has waited for it
        if not _runs(child):
            return
        time.sleep(0.02)
    pytest.fail("the section's child lives")


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_minutes_cut_the_tail(tmp_path, monkeypatch):
    monkeypatch.setattr(parent, "LEAST_S", 0.2)
    seen = []
    for result in run_all(sections("fine", "hangs", "fine"), 1.5 / 60, tmp_path, command):
        saved = json.loads((tmp_path / "results.json").read_text())["sections"]
        seen.append((result.outcome, len(saved)))
    assert seen == [("done", 1), ("cut", 2), ("not started", 3)]
    assert "the minutes were over" in saved[1]["reason"]


def test_rows_of_an_earlier_run_are_not_taken_for_new_ones(tmp_path):
    next(run_all(sections("fine"), 1, tmp_path, command))
    (after,) = run_all(sections("fine"), 1, tmp_path, lambda section, path: [sys.executable, "-c", ""])
    assert (after.outcome, after.rows) == ("failed", [])


def test_table(tmp_path):
    failed, fine = run_all(sections("crashes", "fine"), 1, tmp_path, command)
    assert cells(fine) == [("fine", "x", "1 s", "2 s", "+100%", "ok", "")]
    text = markdown("card", [failed, fine])
    assert text.count("\n| ") == 5 and "| crashes | the section |  |  |  | failed | exit code 1: RuntimeError" in text
    rich_table(failed)


def test_states():
    assert [near("x", value, "s", 4.0).state for value in (3.1, 4.9, 2.9, 5.1)] == ["ok", "ok", "off", "off"]
    assert near("x", 3.0, "s", None).state == "info"
    assert [at_most("x", value, "", 0.5).state for value in (0.5, 0.6, float("nan"))] == ["ok", "wrong", "wrong"]


def test_without_a_card(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert program.main(["--minutes", "9"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_every_section_exists():
    assert len({section.name for section in SECTIONS}) == len(SECTIONS)
    for section in SECTIONS:
        assert iter(section.rows())


def test_stages_beside_their_plan():
    stages = {
        "rollout": {"peak_gib": 10.0, "measured_gib": 10.2, "s": 4.0, "measured_s": 8.0},
        "text": {"peak_gib": 12.0, "measured_gib": None, "s": 1.0, "measured_s": None},
    }
    found = list(rows({"card": "RTX 4090", "measured_peak_gib": 10.2, "peak_gib": 12.0, "stages": stages}))
    assert [(row.what, row.state) for row in found] == [
        ("peak of these stages, memory", "ok"),
        ("rollout, memory", "ok"),
        ("rollout, time", "off"),
    ]


@pytest.mark.parametrize("ranges", [True, False])
def test_reference_of_attention(ranges):
    op = BY_NAME["attention"]
    sizes = {"B": 1, "L": 24, "H": 6, "d": 16, "M": 24, "G": 2} | ({"prefix": 10, "questions": 2} if ranges else {})
    arguments = build(op, sizes, torch.float32, torch.device("cpu"))
    d_out = torch.randn_like(arguments["q"])
    out = op.naive(**arguments)
    found = (out.detach(), *torch.autograd.grad(out, [arguments[name] for name in "qkv"], d_out))
    for head in (0, 1):
        assert all(error < 1e-5 for error in errors(arguments, d_out, found, head).values())
        for n, name in enumerate(("out", "dq", "dk", "dv")):
            broken = [x * 1.1 if i == n else x for i, x in enumerate(found)]
            assert [key for key, error in errors(arguments, d_out, broken, head).items() if error > 0.09] == [name]


def test_int8_attention_is_held_against_fp64_with_and_without_far_channels(monkeypatch):
    op = replace(BY_NAME["attention_int8"], sizes={"tiny": {"B": 1, "L": 40, "H": 1, "d": 128, "M": 60}})
    card = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(attention, "OPS", [op])
    monkeypatch.setattr(attention, "build", lambda op, sizes, dtype, _: build(op, sizes, torch.float16, card))
    for name, value in (("_warm_up", None), ("median_ms", 2.0), ("peak_bytes", 1), ("_chosen_tiles", ())):
        monkeypatch.setattr(attention, name, lambda *_, value=value: value)
    monkeypatch.setattr(attention.expected, "attention", lambda by, direction: (None, by))
    found = list(attention.int8())
    errors = [row for row in found if "error" in row.what]
    assert [row.state for row in errors] == ["ok", "ok"] and all(0.001 < row.measured < 0.012 for row in errors)
    assert found[0].what == "tiny: triton" and found[0].note.endswith("int8")
    monkeypatch.setattr(attention_int8, "attention_int8", lambda q, k, v: 1.1 * q)
    assert "wrong" in [row.state for row in attention.int8() if "error" in row.what]


@pytest.mark.skipif(
    torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ, reason="bench.card does it there"
)
def test_a_tile_is_held_against_fp64(monkeypatch):
    assert all(tuners(op) for op in OPS)
    op = BY_NAME["gate_residual"]
    (_, first), (name, second) = tuners(op).items()
    _pin({first: first.configs[0], second: second.configs[0]})
    case = _Case(op, op.tiny, torch.float32, "cuda" if torch.cuda.is_available() else "cpu")
    row = _worst(name, second, [case])
    assert row.state == "ok" and 0 <= row.measured < 1
    function = case._function
    monkeypatch.setattr(case, "_function", lambda x_BLD, y_BLD, gate_BD: function(x_BLD, y_BLD, 1.01 * gate_BD))
    assert _worst(name, second, [case]).state == "wrong"
    monkeypatch.setattr(case, "_function", op.naive)
    assert _worst(name, second, [case]) == Row(name, "was not launched", state="failed")


def test_a_preset_for_a_larger_card_is_left_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=8 * 2**30))
    monkeypatch.setattr(presets.subprocess, "run", lambda *_, **__: pytest.fail("measured"))
    (row,) = presets.preset("rtx3060")
    assert (row.state, row.measured) == ("info", "is for 12GB, and this card has 8.0 GiB")


def test_what_was_measured_is_recorded_in_the_presets_header(tmp_path, monkeypatch):
    preset = tmp_path / "rtx4090.toml"
    preset.write_text(presets_of_the_package()["rtx4090"].read_text())
    monkeypatch.setattr(record, "presets", lambda: {"rtx4090": preset})
    seconds = {"rollout": 6, "decode": 5, "critic": 4, "vae_backward": 3, "denoise_backward": 8, "update": 1}
    stages = {
        name: {"measured_gib": 16.1 if name == "decode" else 9.0, "peak_gib": 16.0, "measured_s": s, "s": s}
        for name, s in seconds.items()
    }
    bench = {"card": "RTX 4090", "measured_peak_gib": 16.1, "stages": stages}
    section = {"name": "rtx4090-24gb", "outcome": "done", "rows": [vars(row) for row in rows(bench)]}
    found = {"card": "NVIDIA H200", "date": "2026-01-02", "commit": "abc", "versions": {"torch": "2.12"}}
    (tmp_path / "results.json").write_text(json.dumps(found | {"sections": [section]}))
    record.record(tmp_path, tmp_path)
    update = "about 27 s an update, on NVIDIA H200 held to 24GB"
    line = f"# Measured: 16.1 GiB at the peak (decode), {update}; 2026-01-02, abc, torch 2.12"
    assert line in preset.read_text().splitlines()
    assert json.loads((tmp_path / "card_nvidia_h200.json").read_text())["date"] == "2026-01-02"
    with pytest.raises(BadInputError, match=r"no results\.json"):
        record.record(tmp_path / "nothing")
