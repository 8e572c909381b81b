"""The presets for real cards: planned peaks are within the budgets, and headers and pages repeat the plan's figures.

The fast suite plans one preset, with streaming; the others, of the same code at other sizes, are slow.
"""

import json
import re
import sys
from functools import cache

import pytest
from _plans import FAKES, SMALL
from _root import ROOT
from typer.testing import CliRunner

sys.path.insert(0, str(ROOT))
from bench.plans.fit import IN_README
from bench.plans.scaling import EIGHT, stage
from lowmem_drf import cli
from lowmem_drf.assembly.conditions import DTYPES
from lowmem_drf.config import load_config
from lowmem_drf.planner.cards import card_named, fits_in, free_of
from lowmem_drf.planner.fake_models import fake_critic
from lowmem_drf.planner.plan import make_plan
from lowmem_drf.preset_files import preset_card, presets

BUDGET_GIB = {  # whole process, at its peak
    "rtx4090": 16.5, "rtx3090": 16.5, "rtx5090": 16.5, "rtx4080": 7.6, "rtx3060": 7.6, "rtx4060": 5.5,
    "rtx4090-20step": 16.5, "rtx3090-20step": 16.5, "rtx5090-20step": 28.5,
    "rtx4080-20step": 7.6, "rtx3060-20step": 7.6, "rtx4060-20step": 5.5,
    "rtx4090-wan14b": 21.0, "rtx4090-wan22-5b": 15.5, "zero3-2gpu": 19.0,
    "rtx4080-wan14b": 10.0, "rtx4090-ltx13b": 8.5, "rtx4080-ltx13b": 8.5,
    "rtx4090-ltx": 16.0, "rtx4080-ltx": 6.0, "rtx3060-ltx": 6.0,
    "rtx4090-cogvideox": 18.0, "rtx3060-cogvideox": 8.5,
    "rtx3060-sd35": 6.5, "rtx4090-wan14b-i2v": 10.5,
}  # fmt: skip
GIB, GB = 1024**3, 10**9
OTHERS_GIB = 4.0
"""Host memory of each process for Python, libraries, CUDA and the system."""
HOST_GB = (
    dict.fromkeys(BUDGET_GIB, 64)
    | dict.fromkeys(("rtx3060", "rtx3060-20step", "rtx3060-ltx", "rtx3060-sd35", "rtx4060", "rtx4060-20step"), 32)
    | {"zero3-2gpu": 128}
)
SAME_BODY = {
    "rtx3090": "rtx4090", "rtx5090": "rtx4090",
    "rtx4080-wan14b": "rtx4090-wan14b", "rtx4080-ltx13b": "rtx4090-ltx13b",
}  # fmt: skip
"""Presets that ask the same of their card as another."""
STREAMED = [name for name in BUDGET_GIB if load_config(name).memory.stream]

slow = pytest.mark.slow


def planned(names):
    """Parameters, marked slow: every plan at true size takes ten CPU seconds and more."""
    return [pytest.param(name, marks=slow) for name in names]


def card_of(name):
    return card_named(preset_card(presets()[name]))


@cache
def plan_of(name):
    """The output of ``lowmem-drf plan --json`` for a preset that fits. Each distinct body is planned once."""
    config, card = load_config(name), card_of(name)
    if name in SAME_BODY:
        plan = plan_of(SAME_BODY[name])
        room = free_of(card.gib)
        fits = all(row["peak_gib"] <= fits_in(room, row["copies_gib"]) for row in plan["stages"].values())
        return plan | {"card": card.name, "fits": fits}
    return make_plan(config, card, config.memory.vram_gib or card.gib, fakes=FAKES).as_json(name)


def test_the_command_prints_the_plan():
    options = ["--share", "0.6", "--json", *(word for text in SMALL for word in ("-s", text))]
    done = CliRunner().invoke(cli.app, ["plan", "--preset", "toy", "--vram", "24GB", *options])
    assert done.exit_code == 0, done.stderr
    made = make_plan(load_config("toy", SMALL), card_of("toy"), 24.0, fakes=FAKES).as_json("toy")
    printed = json.loads(done.stdout)
    assert printed["run_s"] == printed["steps"] * printed["update_s"] > 0
    assert printed["at_share"]["share"] == 0.6 and 0 < printed["at_share"]["update_s"] != printed["update_s"]
    assert printed.keys() == made.keys() | {"steps", "run_s", "at_share"}
    assert printed["stages"].keys() == made["stages"].keys()
    for one, other in ((printed, made), *((printed["stages"][name], made["stages"][name]) for name in made["stages"])):
        # kilobytes differ: masks and windows made by the first plan of a process are reused by the next
        for key, value in other.items():
            if isinstance(value, int | float):
                assert one[key] == pytest.approx(value, rel=1e-3, abs=1e-6), key


def test_same_bodies_differ_in_their_number_of_steps_alone():
    """Steps change time; the memory of the card depends on none of them, that of the host by the records of graded
    steps."""
    for name, other in SAME_BODY.items():
        steps = {"sampler": {"steps"}}
        assert load_config(name).model_dump(exclude=steps) == load_config(other).model_dump(exclude=steps), name


def test_every_preset_for_a_card_has_a_budget():
    assert set(presets()) == {"toy", "toy-fast", *BUDGET_GIB}


@pytest.mark.parametrize("name", planned(BUDGET_GIB))
def test_planned_peak_is_within_budget(name):
    plan = plan_of(name)
    assert plan["fits"] and plan["peak_gib"] <= BUDGET_GIB[name]
    assert plan["card"] == card_of(name).name and plan["changes"] == []
    assert (plan["host_gib"] + OTHERS_GIB) * plan["processes"] * GIB <= HOST_GB[name] * GB


@pytest.mark.parametrize("name", planned(STREAMED))
def test_waiting_for_copies_is_less_than_a_tenth_of_an_update(name):
    """Copies of weights, caches and activations together. Promised: 10% for the weights alone."""
    assert plan_of(name)["stall_share"] < 0.1


def test_a_critic_that_streams_fits_the_card_while_it_is_loaded():
    """It is quantised on the card."""
    sizes = {}
    for name in STREAMED:
        config = load_config(name)
        assert ({"critic"} if config.engine == "zero3" else {"transformer", "critic"}) <= set(config.memory.stream)
        key = (config.critic.id, DTYPES[config.dtype], None, config.critic.quant)
        if key not in sizes:
            critic = fake_critic(*key, FAKES.mode).model
            sizes[key] = sum(tensor.nbytes for tensor in (*critic.parameters(), *critic.buffers()))
        assert sizes[key] < fits_in(free_of(card_of(name).gib)) * GIB, name


@slow
def test_streaming_costs_less_than_a_tenth_of_an_update():
    """832x480, 81 frames: compared with all weights on the card, as if it were large enough. Promised: 10%."""
    config = load_config("rtx4080", ["memory.stream=[]", "memory.text_device=card"])
    resident, streamed = make_plan(config, card_of("rtx4080"), 1000.0, fakes=FAKES), plan_of("rtx4080")
    assert resident.peak_gib > streamed["peak_gib"] + 7  # GiB of weights
    assert resident.update_s <= streamed["update_s"] < 1.1 * resident.update_s


@pytest.mark.parametrize("name", BUDGET_GIB)
def test_the_pages_repeat_the_header(name):
    """docs/fit.md and the README, written by ``python -m bench.plans.fit``."""
    text = presets()[name].read_text(encoding="utf-8")
    line = r"^# Plan: ([\d.]+) GiB at the peak \((\w+)\), ([\d.]+) GiB of host memory.*?, about ([\d,]+) s"
    found = re.search(line, text, re.MULTILINE)
    assert found, "no Plan: line"
    peak, stage, host, seconds = found.groups()
    page = (ROOT / "docs" / "fit.md").read_text(encoding="utf-8").splitlines()
    (row,) = (line for line in page if line.startswith(f"| `{name}` | ") and "**" in line)
    together = re.search(r"each and (\d+) together", text)
    assert f"**{peak}**" in row and f"| {host}{f' ({together[1]})' if together else ''} | {seconds} s, " in row
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in readme if line.startswith(f"| `{name}` | ")]
    assert len(rows) == (name in IN_README)
    assert all(f"| {peak} GiB ({stage}) | {host} GiB | {seconds} s, " in row for row in rows)


@pytest.mark.parametrize("name", planned(BUDGET_GIB))
def test_the_header_repeats_the_plan(name):
    text, plan = presets()[name].read_text(encoding="utf-8"), plan_of(name)
    found = re.search(r"^# Plan: ([\d.]+) GiB at the peak \((\w+)\), ([\d.]+) GiB of host memory", text, re.MULTILINE)
    assert found, "no Plan: line"
    assert float(found[1]) == pytest.approx(plan["peak_gib"], abs=0.06)
    assert found[2] == max(plan["stages"], key=lambda stage: plan["stages"][stage]["peak_gib"])
    assert float(found[3]) == pytest.approx(plan["host_gib"], abs=0.06)
    together = re.search(r"GiB of host memory each and (\d+) together", text)
    assert bool(together) == (plan["processes"] > 1)
    assert not together or abs(int(together[1]) - plan["all_host_gib"]) <= 0.56
    assert bool(together) == bool(re.search(rf"^# Needs: {HOST_GB[name]} GB of host memory", text, re.MULTILINE))
    assert re.search(r"^# Measured: .+", text, re.MULTILINE) and re.search(r"^# Gives up: .+", text, re.MULTILINE)


@slow
def test_the_transformers_stage_does_not_grow_with_graded_steps():
    """832x480, 81 frames. Promised: 1%. Only the latents of nine more steps are added."""
    one, ten = (stage("denoise_backward", f"sampler.graded_steps={k}", fakes=FAKES).peak_gib for k in (1, 10))
    assert abs(ten / one - 1) < 0.01


@slow
def test_the_exact_vae_backward_costs_little_more_than_a_truncated_one():
    """Operations for 8 evenly spaced frames of 81. Promised: 1.6 times."""
    exact, window = (
        stage("vae_backward", f"memory.vae_backward={how}", *EIGHT, fakes=FAKES).tflop for how in ("exact", "window:2")
    )
    assert 1 <= exact / window <= 1.6
