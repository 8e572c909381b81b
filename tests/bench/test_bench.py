"""The measurements and the picture of the README, on tiny models in place of ToyWorld's."""

import copy
import json
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from _root import ROOT
from PIL import Image
from rich.console import Console

from lowmem_drf.assembly.assemble import resolve_device
from lowmem_drf.commands import bench as command
from lowmem_drf.commands.bench import spread
from lowmem_drf.config import load_config
from lowmem_drf.errors import LowmemError

sys.path.insert(0, str(ROOT))

from bench import evening
from bench.evidence import alike
from bench.plans import allocator, zero3
from bench.script import make_parser, save
from bench.toyworld import base_and_tuned as picture
from bench.toyworld import critic_modes
from bench.toyworld import seeds as toy_seeds

OVERRIDES = str.split(
    "-s model.id=toyworld -s critic.id=toyworld -s video.width=32 -s video.height=32 -s log.sample_every=0 -s steps=1"
)


@pytest.fixture
def tiny_toyworld(tiny_folders, monkeypatch):
    """The tiny random models under the name ``toyworld``."""
    folders = dict(zip(("generator", "critic"), map(str, tiny_folders), strict=True))
    for room in ("models.weights.downloads", "assembly.loading"):
        monkeypatch.setattr(f"lowmem_drf.{room}.resolve", lambda model_id, role: folders[role])
    monkeypatch.setattr(toy_seeds, "EVAL_PROMPTS", 3)


def test_figures_replace_figures_only(tmp_path, capsys):
    file = tmp_path / "figures.json"
    parser = make_parser("bench.some", "A measurement.")
    for _ in range(2):
        options = parser.parse_args(["--json", str(file)])
        save(options.json, {"rows": []})
    file.write_text("[]")
    with pytest.raises(SystemExit):
        parser.parse_args(["--json", str(file)])
    assert "--force" in capsys.readouterr().err and file.read_text() == "[]"
    assert parser.parse_args(["--json", str(file), "--force"]).force


@pytest.mark.slow
def test_seeds_then_picture(tiny_toyworld, tiny_preset, tmp_path, capsys):
    report = tmp_path / "made" / "out.json"
    files = ["--preset", str(tiny_preset), "--output", str(tmp_path), "--json", str(report)]
    assert toy_seeds.main(["--seeds", "0", "4", *files, *OVERRIDES]) == 1  # random models learn nothing
    out = capsys.readouterr().out
    assert "seed 4: broken: all-correct rises by 35 points" in out
    result = json.loads(report.read_text())
    assert [row["seed"] for row in result["rows"]] == [0, 4]
    for row in result["rows"]:
        times = {"train_s", "train_cpu_s", "updates_s", "updates_cpu_s"}
        assert set(row) == {"seed", "updates", "base", "tuned", "verdicts", *times}
        assert row["train_s"] > row["updates_s"] > 0 and row["train_cpu_s"] > row["updates_cpu_s"] > 0
        assert row["base"]["oracle"]["all"] == 0
    assert result["rows"][0]["base"] == result["rows"][1]["base"]
    assert result["rows"][0]["tuned"] != result["rows"][1]["tuned"]

    file = tmp_path / "images" / "pair.gif"
    assert picture.main([str(tmp_path / "seed-0"), "--output", str(file), "--prompts", "2"]) == 0
    with Image.open(file) as image:
        columns = 2 * (32 * picture.ZOOM + picture.GAP) - picture.GAP
        assert (image.n_frames, image.width) == (9, 2 * picture.MARGIN + picture.SIDE + columns)
        first = image.convert("RGB")
        assert first.getpixel((0, 0)) == (255, 255, 255)
        assert len(first.getcolors(2**24)) > 100

    stills = tmp_path / "alike.png"
    runs = [str(tmp_path / "seed-0")] * 2
    assert alike.main([*runs, "--output", str(stills), "--prompts", "1", "--noises", "2"]) == 0
    with Image.open(stills) as image:
        side, row = 32 * picture.ZOOM, 32 * picture.ZOOM + picture.GAP // 2
        assert image.height == 2 * picture.MARGIN + 2 * picture.LINE + 3 * row  # the base and two runs
        places = [picture.MARGIN + alike.SIDE + n * (side + picture.GAP // 4) for n in (0, 1)]
        tops = [picture.MARGIN + 2 * picture.LINE + r * row for r in (0, 1, 2)]
        shown = [[image.crop((left, top, left + side, top + side)).tobytes() for left in places] for top in tops]
    assert shown[1] == shown[2] != shown[0] and shown[0][0] != shown[0][1]  # a run twice; two noises


@pytest.mark.slow
def test_modes_side_by_side_go_on_from_what_was_measured(tiny_toyworld, tiny_preset, tmp_path, capsys):
    arguments = ["--preset", str(tiny_preset), *OVERRIDES, "--modes", "vanilla", "dense"]
    first, whole = tmp_path / "first.json", tmp_path / "whole.json"
    assert critic_modes.main([*arguments, "--seeds", "0", "--json", str(first)]) == 0
    assert critic_modes.main([*arguments, "--seeds", "0", "1", "--merge", str(first), "--json", str(whole)]) == 0
    rows = json.loads(whole.read_text())["rows"]
    assert [(row["mode"], row["seed"]) for row in rows] == [("vanilla", 0), ("dense", 0), ("vanilla", 1), ("dense", 1)]
    assert rows[:2] == json.loads(first.read_text())["rows"]
    base, tuned = ({row[side]["heldout_reward"] for row in rows} for side in ("base", "tuned"))
    assert (len(base), len(tuned)) == (1, 4)
    out = capsys.readouterr().out
    assert out.count("mean") >= 2 and "(base)" in out
    assert critic_modes.main(["-s", "optim.lrr=1"]) == 2
    assert "Did you mean optim.lr?" in capsys.readouterr().err


def test_an_evening_measures_what_has_no_file_yet(tmp_path, monkeypatch, capsys):
    """``passes``: 8 clips, 10 or 4 steps, each graded one forward and backward."""
    trained = []

    def measured(seed, preset, overrides, folder, console):
        trained.append((preset, seed))
        sides = {"oracle": {"all": 0.8 + seed / 100, "physics": 1.0, "quality": 1.0}, "diversity": 0.15}
        cost = {"updates": 200, "updates_cpu_s": 90.0, "train_cpu_s": 100.0}
        return {"seed": seed, **cost, "base": sides, "tuned": sides}

    monkeypatch.setattr(evening, "train_and_measure", measured)
    arguments = ["--folder", str(tmp_path), "--variants", "toy-fast", "toy"]
    assert evening.main([*arguments, "--seeds", "0"]) == 0
    assert evening.main([*arguments, "--seeds", "0", "1"]) == 0
    assert trained == [("toy-fast", 0), ("toy", 0), ("toy-fast", 1), ("toy", 1)]
    toy = capsys.readouterr().out.splitlines()[-2]
    assert toy == "| `toy` | 2 | 80.5% (80.0, 81.0) | 100.0% | 100.0% | 0.150 | 200 | 240 | 90 | 100 |"
    guided = load_config("toy", ["sampler.guidance=2"])
    assert evening.passes(guided) == 8 * (20 + 20)
    assert evening.passes(load_config("toy", ["sampler.guidance=2", "sampler.guidance_grad=both"])) == 8 * (20 + 40)


def test_every_variant_of_an_evening_is_a_preset_with_settings_that_exist():
    for preset, overrides in evening.VARIANTS.values():
        load_config(preset, [*evening.UNPREVIEWED, *overrides])


def test_bad_input_is_a_message_and_its_exit_code(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert picture.main([]) == 2
    assert "there is no run under runs/" in capsys.readouterr().err
    assert toy_seeds.main(["-s", "optim.lrr=1"]) == 2
    assert "Did you mean optim.lr?" in capsys.readouterr().err


def test_a_promise_is_kept_or_named():
    base = {"oracle": {"all": 0.3, "physics": 0.8, "quality": 0.9}, "diversity": 0.1}
    tuned = {"oracle": {"all": 0.66, "physics": 0.8, "quality": 0.9}, "diversity": 0.081}
    assert all(toy_seeds.verdicts(base, tuned).values())
    for where, value in (
        (("oracle", "all"), 0.64),
        (("oracle", "physics"), 0.79),
        (("oracle", "quality"), 0.89),
        (("diversity",), 0.079),
    ):
        worse = copy.deepcopy(tuned)
        node = worse
        for key in where[:-1]:
            node = node[key]
        node[where[-1]] = value
        assert list(toy_seeds.verdicts(base, worse).values()).count(False) == 1


def test_a_cap_reaches_the_allocator(monkeypatch):
    """On a faked card, with the device that ``bench`` measures on."""
    capped = []
    monkeypatch.setattr("torch.cuda.memory._lazy_init", lambda: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=24 * 2**30))
    monkeypatch.setattr(
        "torch._C._cuda_setMemoryFraction", lambda fraction, device: capped.append((fraction, device)), raising=False
    )
    monkeypatch.setattr(command, "_random_models", Mock(side_effect=torch.OutOfMemoryError("no room for the models")))
    with pytest.raises(LowmemError, match="under a cap of 12.5 GiB: no room for the models"):
        command.measure(load_config("toy"), resolve_device("cuda"), 12.5, Console())
    assert capped == [(0.5, 1)]


def test_of_several_updates_the_first_is_apart_and_peaks_are_over_all():
    figures = ((90, 3.0), (10, 1.0), (14, 2.0))
    rows = [({"rollout": s, "update": 1.0}, {"rollout": gib, "update": 0.5}) for s, gib in figures]
    found = command.Measurement.of(rows, "card")
    assert found.s == {"rollout": 12, "update": 1.0} and found.gib == {"rollout": 3.0, "update": 0.5}
    assert spread(found) == "13.00 an update, the median of 2 (11.00 to 15.00); 91.00 for the first, apart"
    assert spread(command.Measurement.of(rows[:1], "card")).startswith("91.00 for the first update, in which libraries")


def test_zero3_against_streaming_has_the_same_update_in_both_and_says_what_failed(monkeypatch, tmp_path, capsys):
    made = {}

    def run(command, **_):
        settings = [text for flag, text in zip(command, command[1:], strict=False) if flag == "-s"]
        config = load_config(command[command.index("--preset") + 1], settings)
        made[config.engine] = config
        row = {"measured_gib": 1.5, "measured_s": 2.0}
        stages = {"text": {"measured_gib": None}, "rollout": row, "update": row}
        good = json.dumps({"stages": stages, "measured_peak_gib": 1.5})
        return SimpleNamespace(returncode=int(config.engine == "single"), stdout=good, stderr="Error: out of memory")

    monkeypatch.setattr(zero3.subprocess, "run", run)
    assert zero3.main(["--vram", "24GB", "-s", "batch=2", "--json", str(tmp_path / "made" / "out.json")]) == 1
    partitioned, streamed = made["zero3"], made["single"]
    assert streamed.memory.stream == ["critic", "transformer"] and partitioned.memory.stream == ["critic"]
    same = {"engine": "single", "memory": streamed.memory, "zero": streamed.zero}
    assert partitioned.model_copy(update=same) == streamed and streamed.processes == 1
    out = capsys.readouterr().out
    assert "| together | 1.50 | 4.00 |" in out and "weight streaming: Error: out of memory" in out
    assert set(json.loads((tmp_path / "made" / "out.json").read_text())["rows"]) == set(zero3.WAYS)


def test_the_allocators_table_names_the_stage_that_is_most_above_its_plan():
    stages = {"decode": {"peak_gib": 16.0, "measured_gib": 16.16}, "critic": {"peak_gib": 10.0, "measured_gib": 10.2}}
    row = {"gb": 24, "usable_gib": 21.6, "reserved_gib": 17.25, "retries": 0, "device": "a card", "stages": stages}
    *_, line = allocator.table({"one": row})
    assert line == "| `one` | 24 GB | decode | 16.00 | 16.16 | +2.0% (critic) | 17.2 | 0 |"
    cards = allocator.single_cards()
    assert cards["rtx4060"] == 8 and {"toy", "zero3-2gpu"}.isdisjoint(cards)
