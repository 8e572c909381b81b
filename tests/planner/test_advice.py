"""What a plan sets by itself, what it advises, and that both hold: on plans that are formulas, so that hundreds take no
time. ``python -m bench.plans.advice`` does the same with true plans."""

import io
import math
import sys

import pytest
from _root import ROOT
from rich.console import Console

sys.path.insert(0, str(ROOT))
from bench.plans import advice
from lowmem_drf.assembly.rungs import LADDERS, ROUNDED, keeps_gradient
from lowmem_drf.config import change, load_config
from lowmem_drf.planner import ladder, report, words
from lowmem_drf.planner.cards import Room, card_named, fits_in, free_of, learn
from lowmem_drf.planner.ladder import advise, advise_host
from lowmem_drf.planner.stages import Plan, StagePlan
from lowmem_drf.planner.words import print_plan

CARD = card_named("")
USES = {"rollout": "transformer", "decode": "vae", "critic": "critic", "vae_backward": "vae",
        "denoise_backward": "transformer", "update": ""}  # fmt: skip


def formula(config, card, vram_gib, only=None, **_):
    """A plan with about the right figures: every setting of the ladders saves something somewhere."""
    memory, video, bits = config.memory, config.video, {"none": 16, "int8": 8, "nf4": 4}
    size = config.micro_batch * video.width * video.height * video.frames / (832 * 480 * 81)
    weights = {"transformer": bits[config.model.storage] * (1.8 if "14B" in config.model.id else 0.16), "vae": 0.3,
               "critic": bits[config.critic.quant] * (1.4 if "7B" in config.critic.id else 0.7)}  # fmt: skip
    host = sum(gib for name, gib in weights.items() if name in (*memory.park, *memory.stream))
    host += size * (2 * memory.record_decode + 12 / memory.vae_cache_every)
    host += size * (5 * (memory.keep_attention == "host") + 9 * memory.record_rollout)
    host += size * (4 * (memory.checkpoint == "host") + 2 * (memory.vae_caches == "host"))
    caches, moments = 2 * (memory.vae_caches == "card"), 0.5 if config.optim.name == "adamw" else 0.2
    kept = {True: 3.0, "host": 0.5, False: 40.0}[memory.checkpoint] + 5 * (memory.keep_attention == "card")
    frames = config.critic.frames if isinstance(config.critic.frames, int) else 8
    works = {"rollout": 2 / memory.token_slices, "decode": 4 + caches, "critic": frames / 2, "update": 0.1,
             "vae_backward": caches + (6 if memory.vae_grad_dtype == "fp32" else 3) / memory.vae_strips,
             "denoise_backward": kept + 4 / memory.token_slices}  # fmt: skip
    stages = {}
    for name, used in USES.items():
        here = (0.1 if one in memory.stream else 0.0 if one in memory.park and one != used else gib
                for one, gib in weights.items())  # fmt: skip
        copies = 1.4 * size / memory.vae_strips if used == "vae" else 0.0
        peak = moments + sum(here) + size * works[name]
        stages[name] = StagePlan(peak, 0, 0, host, 1282.2, 0, 0, 0, 0, "", copies_gib=copies)
    text = {"card": 10.7, "stream": 0.8, "host": 0.0}[memory.text_device]
    stages["text"] = StagePlan(text, 0, 0, 10.7 - text, 1, 0, 0, 0, 0, "")
    seconds = 300 * size + 20 * (memory.checkpoint is not False) + 5 * len(memory.stream) + memory.token_slices
    return Plan(card.name, vram_gib, {only: stages[only]} if only else stages, seconds)


@pytest.fixture(autouse=True)
def formulas(monkeypatch):
    for module in (ladder, advice):
        monkeypatch.setattr(module, "make_plan", formula)


def advised(preset, vram_gib, *overrides):
    config = load_config(preset, overrides)
    return config, advise(config, CARD, formula(config, CARD, vram_gib), fakes=object())


@pytest.mark.parametrize("case", range(len(advice.SETTINGS)))
@pytest.mark.parametrize("fit", ["auto", "as_given"])
def test_what_is_set_or_advised_makes_it_fit_with_the_figures_that_are_said(case, fit):
    name, vram_gib, overrides = advice.SETTINGS[case]
    config, plan = advised(name, vram_gib, *overrides, f"memory.fit={fit}")
    assert advice.wrong(config, CARD, plan, object()) == []
    assert not plan.applied or (fit == "auto" and plan.fits and not plan.changes)
    if plan.changes and fit == "auto":  # what keeps the gradient is set by itself
        assert not any(map(keeps_gradient, plan.changes))
        assert advised(name, vram_gib, *overrides, *plan.changes)[1].fits
    said = words.refusal(plan, config)
    assert len(said.splitlines()) <= 5 and all(text.partition("=")[0] in said for text in plan.changes)


def test_no_setting_is_changed_that_need_not_be():
    """Whatever is taken back alone, it does not fit any more."""
    config, plan = advised("rtx4090-20step", 8)
    assert plan.fits and len(plan.applied) > 2
    less = change(config, plan.applied)
    for text in plan.applied:
        key = text.partition("=")[0]
        before = ladder.value_of(config, key)
        assert not formula(change(less, [f"{key}={ladder.compact(before)}"]), CARD, 8.0).fits, text


def test_a_smaller_clip_stays_on_the_grid_of_its_generator():
    smaller = LADDERS["decode"][-1]
    assert smaller(load_config("rtx4090-wan22-5b")) == "video.width=960 video.height=512"
    wide = load_config("rtx4060", ["video.width=1280", "video.height=720"])
    assert smaller(wide) == "video.width=960 video.height=528"


def test_a_card_with_room_changes_nothing():
    config, plan = advised("rtx4090-20step", 100)
    assert plan.fits and plan.applied == plan.changes == () and plan == formula(config, CARD, 100)


def test_where_nothing_helps_nothing_is_advised():
    config, plan = advised("rtx4090-20step", 0.1)
    assert not plan.fits and plan.applied == plan.changes == ()
    assert "No change of settings that is known here" in words.refusal(plan, config)


def test_what_fits_is_less_than_the_card():
    """CUDA, driver and desktop, 5% of the peak, cuDNN's copies."""
    assert free_of(8) == pytest.approx(6.4) and free_of(24) == pytest.approx(22.4) and free_of(1) == pytest.approx(0.8)
    assert fits_in(6.4, 1.0) == pytest.approx(5.4 / 1.05)
    assert Room(24.0, 20.0, True).within(0) == Room(24.0, 20.0, True)
    assert Room(24.0, 20.0, True).within(22) == Room(24.0, 20.0, True), "what is free is less than the limit"
    assert Room(24.0, 20.0, True).within(16) == Room(16, pytest.approx(15.4)), "no longer what is free"
    stage = StagePlan(5.0, 0, 0, 0, 1, 0, 0, 0, 0, "", copies_gib=1.0)
    for room, fits in ((6.24, False), (6.26, True)):
        assert Plan("", 8.0, {"decode": stage}, 1.0, free_gib=room).fits is fits


def test_the_host_s_memory_is_made_to_suffice_by_what_keeps_the_gradient():
    config, plan = advised("rtx4090-20step", 12, "memory.vae_cache_every=1")
    room = plan.host_gib - 8
    less = advise_host(config, CARD, plan, room, fakes=object())
    assert less.fits and less.host_gib <= room and all(map(keeps_gradient, less.applied))
    after = formula(change(config, less.applied), CARD, 12)
    assert (after.peak_gib, after.host_gib) == (less.peak_gib, less.host_gib)
    assert advise_host(config, CARD, plan, plan.host_gib, fakes=object()) is plan


def test_without_a_record_no_chunk_is_decoded_three_times():
    config, plan = advised("rtx4090", 24)
    less = advise_host(config, CARD, plan, 20, fakes=object())
    assert set(less.applied) == {"memory.record_decode=0", "memory.vae_cache_every=3"}


@pytest.mark.parametrize("fit", ["auto", "as_given"])
def test_advice_for_the_host_s_memory_is_tried(fit):
    """A model of 14B in 16 bit that streams: packed it takes half."""
    bf16 = "model.products=16bit", "model.quant=none"
    config, plan = advised("rtx4090-wan14b", 24, *bf16, f"memory.fit={fit}")
    room = plan.host_gib - 35
    less = advise_host(config, CARD, plan, room, fakes=object())
    assert 'model.quant="int8"' in less.changes and less.changed.host_gib <= room
    after = formula(change(config, less.changes), CARD, 24)
    assert after.fits and (after.peak_gib, after.host_gib) == (less.changed.peak_gib, less.changed.host_gib)
    said = words.host_refusal(less, room)
    assert "int8" in said and f"{less.changed.host_gib:.1f} GiB of host memory" in said and len(said.splitlines()) <= 5


def test_a_run_gets_what_its_card_and_its_host_need(monkeypatch):
    """And one line says so."""
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "RTX 4060")
    limit = math.inf

    def planned(config, card, room, console, advice=True, host_gib=None):
        plan = ladder.replace(formula(config, card, room.vram_gib), free_gib=room.free_gib, measured=room.measured)
        plan = advise(config, card, plan, fakes=object())
        return plan if host_gib is None else advise_host(config, card, plan, host_gib, fakes=object())

    monkeypatch.setattr(report, "planned", planned)
    monkeypatch.setattr(report, "_free_host", lambda processes: limit)
    config, out = load_config("rtx4090-20step"), Console(file=io.StringIO(), width=400)
    rooms = [Room(24.0, 22.0, True), None, Room(8.0, 6.5, True)]
    fitted, _ = report.require_fit(config, out, rooms)
    assert formula(fitted, CARD, 8.0).fits and report.require_fit(fitted, out, rooms)[0] == fitted
    line, *_ = out.file.getvalue().splitlines()
    assert line.startswith("to fit the 6.5 GiB that are free: memory.") and "same gradient" in line
    assert "unknown" not in out.file.getvalue()
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "RTX 4070")
    report.require_fit(config, out, [rooms[2].within(7)])
    text = out.file.getvalue()
    assert "to fit 7 GiB: memory." in text and "if this card were an RTX 4090: its own rates are unknown" in text
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "RTX 4060")
    limit = 20.0
    assert formula(report.require_fit(config, out, rooms)[0], CARD, 8.0).host_gib <= limit
    limit = 1.0
    with pytest.raises(report.BadInputError, match="host memory: .* would wait there.*1.0 are free"):
        report.require_fit(config, out, rooms)


@pytest.mark.parametrize("width", [60, 80])
def test_the_verdict_comes_first_and_no_line_is_cut(width, tmp_path, monkeypatch):
    monkeypatch.setenv("LOWMEM_DRF_CACHE", str(tmp_path))
    config, plan = advised("rtx4090-20step", 8)
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    print_plan(plan, "rtx4090-20step", config, console)
    lines = console.file.getvalue().splitlines()
    assert lines[0].startswith("fits: peak ") and "…" not in "".join(lines) and "measured" not in "".join(lines)
    assert max(map(len, lines)) <= width and "denoise_backward" in console.file.getvalue()
    config, plan = advised("rtx4090-20step", 3)
    learn(CARD, {"matmul": 0.5})
    print_plan(plan, "rtx4090-20step", config, console)
    refused = console.file.getvalue().splitlines()[len(lines) :]
    assert "lowmem-drf bench measured them here." in " ".join(map(str.strip, refused))
    assert refused[0].startswith("does not fit: ") and any(
        line.startswith("It would fit with, besides what is then set by itself: -s ") for line in refused
    )


def test_what_rounds_is_named():
    plan = Plan("", 8.0, {}, 1.0, applied=('memory.checkpoint="host"', "memory.vae_strips=4"))
    assert words.set_to_fit(plan).endswith("(same gradient; up to rounding by memory.vae_strips=4)")
    exact = Plan("", 8.0, {}, 1.0, applied=('memory.checkpoint="host"',))
    assert words.set_to_fit(exact).endswith("(same gradient, to the bit)")
    assert all(keeps_gradient(text) for text in ROUNDED)
