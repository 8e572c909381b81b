"""8 bit on auto: what a card decides by its timings, what a run keeps of that, and what a plan says of it."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from _plans import FAKES
from test_kernel_choice import Clock, work

from lowmem_drf.assembly import eight_bit as levers
from lowmem_drf.assembly import kernel_choice, trials
from lowmem_drf.assembly.eight_bit import GRADED, PRODUCTS, ROLLOUT, as_chosen, on_auto
from lowmem_drf.assembly.kernel_choice import KERNELS, as_run, choose, choose_planned, record_text, saved_choice
from lowmem_drf.assembly.rungs import LADDERS
from lowmem_drf.assembly.trials import Work
from lowmem_drf.config import load_config
from lowmem_drf.errors import BadInputError
from lowmem_drf.models.weights.packed_linear import PackedLinear
from lowmem_drf.ops import naive_ops, sdpa_forward
from lowmem_drf.planner.cards import card_named
from lowmem_drf.planner.ledger import Ledger
from lowmem_drf.planner.plan import _rates, make_plan
from lowmem_drf.planner.stages import Plan, StagePlan
from lowmem_drf.planner.words import eight_bit
from lowmem_drf.training.skips import advice

AUTO = tuple(f"{key}=auto" for key in (ROLLOUT, GRADED, PRODUCTS))
SHORT = ("sampler.steps=4", "sampler.graded_steps=1", "memory.checkpoint=true", "memory.keep_attention=none")


@pytest.fixture
def timed(monkeypatch):
    """(seconds of the back ends, of int8 attention, of a block's layers in 8 and in 16 bit, settings) -> the record."""

    def run(costs, int8=1.0, layers=(1.0, 1.0), *settings):
        clock, (config, here) = Clock(costs), work(*SHORT, *(settings or AUTO))

        def forward(*tensors):
            clock.now += int8
            return sdpa_forward(*tensors)

        monkeypatch.setattr(kernel_choice, "why_not", lambda name, device: None if name in costs else "absent")
        monkeypatch.setattr(kernel_choice, "attention_named", clock.named)
        monkeypatch.setattr(trials, "int8_forward", lambda device: forward)
        monkeypatch.setattr(trials, "why_no_int8", lambda dtype, head_dim: None)
        monkeypatch.setattr(Work, "layers_seconds", lambda self, in_8, seconds: layers[0 if in_8 else 1])
        record = kernel_choice._timed(config, here, naive_ops(), clock.seconds)
        return record, {key.partition(".")[2]: answer["taken"] for key, answer in record["int8"].items()}

    return run


def test_8_bit_is_taken_where_it_is_faster_by_a_clear_margin(timed):
    record, taken = timed({"sdpa": (1.0, 2.0)}, 0.9, (0.9, 1.0))
    assert taken == {"rollout_attention": True, "graded_attention": True, "products": True}
    assert record["int8"][ROLLOUT]["why"] == "in 8 bit (900.0 ms; 16 bit: 1000.0 ms)"
    record, taken = timed({"sdpa": (1.0, 2.0)}, 0.92, (0.92, 1.0))
    assert not any(taken.values())
    assert record["int8"][GRADED]["why"] == (
        "in 16 bit (1000.0 + 2000.0 ms with sdpa; 8 bit: 920.0 + 2000.0 ms with sdpa)"
    )
    assert record["int8"][PRODUCTS]["why"] == "in 16 bit (1000.0 ms for a block in an update; 8 bit: 920.0 ms)"


def test_only_what_is_auto_is_decided(timed):
    record, taken = timed({"sdpa": (1.0, 2.0)}, 0.5, (0.5, 1.0), f"{GRADED}=auto", f"{ROLLOUT}=int8")
    assert taken == {"graded_attention": True}


def test_int8_with_its_best_backward_is_compared_with_the_fastest_pair_as_a_whole(timed):
    """xformers' backward cannot follow a forward in 8 bits: 2 forwards and 1 backward of a layer."""
    costs = {"xformers": (6.0, 8.0), "sdpa": (9.0, 12.0)}
    record, taken = timed(costs, 5.0, (1, 1), f"{GRADED}=auto")  # 4 x 6 + 2 x 6 + 8 beside 4 x 9 + 2 x 5.5 + 12
    assert (record["attention"], taken) == ("xformers", {"graded_attention": False})
    record, taken = timed(costs, 1.0, (1, 1), f"{GRADED}=auto", f"{ROLLOUT}=auto")
    assert (record["attention"], set(taken.values())) == ("sdpa", {True})
    _, taken = timed({"xformers": (6.0, 8.0)}, 0.1, (1, 1), f"{GRADED}=auto", "kernels.attention=xformers")
    assert taken == {"graded_attention": False}


def test_where_a_rollout_has_no_passes_of_its_own_it_stays_exact(timed):
    recorded = ("memory.record_rollout=true", "memory.keep_attention=host", "sampler.graded_steps=4")
    record, taken = timed({"sdpa": (1.0, 2.0)}, 0.5, (1, 1), *AUTO, *recorded)
    assert taken == {"rollout_attention": False, "graded_attention": True, "products": False}
    assert "no pass of an update would take it" in record["int8"][ROLLOUT]["why"]


def test_what_cannot_run_is_exact_with_the_reason(monkeypatch):
    """Here for want of channels, of 16 bit, and of integers; by whatever a library raises too."""
    config, here = work(*AUTO[:2], "dtype=bf16")
    monkeypatch.setattr(kernel_choice, "why_not", lambda name, device: None if name == "sdpa" else "absent")

    def seconds(run):
        run()
        return 1.0

    record = kernel_choice._timed(config, here, naive_ops(), seconds)
    assert record["int8"][GRADED] == {
        "taken": False, "why": "in 16 bit (not in 8: heads have 16 channels, and it takes 64 or 128)"
    }  # fmt: skip
    config, here = work(AUTO[2], "model.quant=nf4")
    record = kernel_choice._timed(config, here, naive_ops(), seconds)
    assert record["int8"][PRODUCTS] == {"taken": False, "why": "in 16 bit (not in 8: nf4 has no integers)"}
    config, here = work(AUTO[2])
    monkeypatch.setattr(Work, "_layer", lambda *sizes: {}["a kernel"])
    record = kernel_choice._timed(config, here, naive_ops(), seconds)
    assert "not in 8: KeyError" in record["int8"][PRODUCTS]["why"]


@pytest.mark.parametrize("int8", [True, False])
def test_layers_are_timed_as_they_will_run(int8, monkeypatch):
    """Six square layers and the feed-forward's two; 4 passes of the rollout, a graded one twice, and its backward."""
    config, here = work(*SHORT, AUTO[2])
    forms, real = [], PackedLinear.forward
    monkeypatch.setattr(
        PackedLinear, "forward", lambda layer, x: (forms.append(layer.int8_products), real(layer, x))[1]
    )
    assert here.layers_seconds(int8, lambda run: (run(), 1.0)[1]) == 8 * (4 + 2 + 1)
    assert set(forms) == {int8}


@pytest.fixture
def card(monkeypatch):
    """A card of which only the name is known, and what it answers."""
    stand_in = SimpleNamespace(name="NVIDIA GeForce RTX 4090", taken=True, asked=[])

    def timed(config, here, rows):
        assert here.config is config
        auto = on_auto(config)
        stand_in.asked.append(auto)
        record = {"attention": "sdpa", "why": "the fastest here", "failed": {}, "critic": "sdpa", "tiles": []}
        bits = 8 if stand_in.taken else 16
        return record | {"int8": {key: {"taken": stand_in.taken, "why": f"in {bits} bit (5 ms)"} for key in auto}}

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: stand_in.name)
    monkeypatch.setattr(kernel_choice, "_timed", timed)
    monkeypatch.setattr(kernel_choice, "int8_attention", lambda device: "int8")
    monkeypatch.setattr(kernel_choice, "with_int8_forward", lambda attention, device: "int8")
    return stand_in


def forms(chosen):
    return chosen.rollout_attention == "int8", chosen.graded_attention == "int8", chosen.integers


def test_a_resumed_run_takes_its_answers_again(card, tmp_path):
    config, here = work(*AUTO, device="cuda:0")
    first = choose(config, here)
    assert forms(first) == (True, True, True)
    assert "; 8 bit on auto: taken where it is 1.1 times as fast: attention without gradient in 8 bit (5 ms), " in str(
        first
    )
    (tmp_path / KERNELS).write_text(record_text(first.record))
    before, card.taken = saved_choice(tmp_path, pytest.fail), False
    again = choose(config, here, before)
    assert forms(again) == (True, True, True) and len(card.asked) == 1
    assert as_run(config, tmp_path).model.products == "int8" == as_run(config, tmp_path).kernels.graded_attention


def test_another_card_decides_anew_and_that_is_said_plainly(card):
    config, here = work(*AUTO, device="cuda:0")
    before, card.name, card.taken = choose(config, here).record, "NVIDIA GeForce RTX 3060", False
    other = choose(config, here, before)
    assert forms(other) == (False, False, False) and len(card.asked) == 2
    assert "chosen anew, card was NVIDIA GeForce RTX 4090 and is NVIDIA GeForce RTX 3060" in other.why
    assert "gradients differ by more than rounding: attention without gradient from 8 bit to 16" in other.why


def test_settings_that_keep_the_gradient_do_not_ask_again(card):
    config, here = work(*AUTO, "memory.checkpoint=true", "memory.keep_attention=host", device="cuda:0")
    before, card.taken = choose(config, here).record, False
    config, here = work(*AUTO, "memory.checkpoint=true", device="cuda:0")
    other = choose(config, here, before)
    assert "kept attentions was True" in other.why and "rounding" not in other.why
    assert forms(other) == (True, True, True) and card.asked[1] == []


def test_a_setting_that_becomes_auto_is_asked(card):
    before = choose(*work(device="cuda:0")).record
    assert not before["int8"]
    other = choose(*work(AUTO[2], device="cuda:0"), before)
    assert other.integers and "chosen anew, model.products is auto" in other.why


def test_damaged_answers_are_made_anew(tmp_path):
    record = {"about": {}, "attention": "sdpa", "critic": "sdpa", "tiles": []}
    said = []
    for answers in ([], {GRADED: 1}, {GRADED: {"taken": "yes", "why": "x"}}):
        (tmp_path / KERNELS).write_text(json.dumps(record | {"int8": answers}))
        assert saved_choice(tmp_path, said.append) is None or not answers
    assert all("more than those" in line for line in said) and len(said) == 3


def test_on_a_cpu_and_for_the_same_bits_it_is_exact(card, monkeypatch):
    chosen = choose(*work(*AUTO))
    assert forms(chosen) == (False, False, False) and "8 bit on auto: not used: this is a CPU" in str(chosen)
    monkeypatch.setattr(kernel_choice, "_same_bits", lambda: None)
    monkeypatch.setattr(kernel_choice, "refusal", lambda *_: None)
    chosen = choose(*work(*AUTO, "kernels.deterministic=true", device="cuda:0"))
    assert forms(chosen) == (False, False, False) and "kernels.deterministic asks for the same bits" in str(chosen)


def test_a_run_that_meets_nan_is_advised_what_it_took(tmp_path):
    config = load_config("toy", AUTO)
    answers = {key: {"taken": key != ROLLOUT, "why": "x"} for key in (ROLLOUT, GRADED, PRODUCTS)}
    said = advice(as_chosen(config, {"int8": answers}), [], prompts=9)
    assert f"-s {GRADED}=same" in said and not any(ROLLOUT in words for words in said)
    assert as_run(config, tmp_path).kernels.graded_attention == "same", "no card has chosen anything"


def test_weights_are_stored_in_8_bit_whatever_the_card_decides():
    auto = load_config("toy", AUTO)
    assert auto.model.storage == "int8" and as_chosen(auto, None).model.storage == "int8"
    assert load_config("toy", [*AUTO, "model.quant=nf4"]).model.storage == "nf4"
    with pytest.raises(BadInputError, match='model.products: .*"auto" does not go with ZeRO-3'):
        load_config("toy", [*AUTO, "engine=zero3"])
    packed = {override for rung in LADDERS["rollout"] if (override := rung(auto)) and "quant" in override}
    assert packed == {'model.quant="nf4"'}, "8 bit is there already"


@pytest.mark.parametrize("rows, inside, outside", [(16, 128, 512), (16, 512, 128), (1024, 128, 512)])
def test_a_layer_is_planned_for_either_outcome(rows, inside, outside):
    """Bytes of the larger of both ways, forward and backward; the seconds that 16 bit would take more."""
    layer = PackedLinear(inside, outside, True, "int8")
    layer.pack(torch.randn(outside, inside, dtype=torch.bfloat16))
    layer.bias = torch.nn.Parameter(torch.zeros(outside, dtype=torch.bfloat16), requires_grad=False)
    x = torch.randn(rows, inside, dtype=torch.bfloat16, requires_grad=True)

    def counted(int8, *auto):
        layer.int8_products, peaks = int8, []
        with Ledger(512, _rates(card_named(""), load_config("toy")), auto=auto) as ledger:
            ledger.adopt([x, *layer.parameters(), *layer.buffers()])
            y = layer(x)
            peaks.append(ledger.peak_card_bytes)
            ledger.reset_peak()
            torch.autograd.grad(y, x, y.detach())
            return [*peaks, ledger.peak_card_bytes], ledger

    (auto, ledger), (integers, alone), (unpacked, exact) = counted(True, PRODUCTS), counted(True), counted(False)
    for planned, ways in zip(auto, zip(integers, unpacked, strict=True), strict=True):
        assert max(ways) <= planned <= max(ways) + 2048, "of the scales"
    assert (ledger.seconds, alone.more) == (alone.seconds, 0)
    assert ledger.seconds + ledger.more == pytest.approx(exact.seconds, rel=0.7), "tiny: all of it is traffic"


@pytest.mark.slow  # three plans
def test_a_plan_is_right_for_either_outcome():
    """Peaks of the larger of both ways, seconds of 8 bit, and beside them those of 16."""
    settings = ("dtype=bf16", "micro_batch=1", "batch=1", "memory.checkpoint=true", "memory.token_slices=4")
    plan = partial(make_plan, card=card_named(""), fakes=FAKES)
    auto, integers, unpacked = (
        plan(load_config("toy", [*settings, way])) for way in (AUTO[2], f"{PRODUCTS}=int8", "model.quant=int8")
    )
    for stage, planned in auto.stages.items():
        most = max(integers.stages[stage].peak_gib, unpacked.stages[stage].peak_gib)
        assert planned.peak_gib == pytest.approx(most, rel=0.02), stage
    assert auto.update_s == pytest.approx(integers.update_s) and integers.exact_s is None
    assert integers.update_s < auto.exact_s < unpacked.update_s, "tiny: all of it is traffic, which is counted in part"


def test_a_plan_says_what_the_card_will_decide():
    stage = StagePlan(1, 1, 0, 0, 10.0, 2.0, 0, 0, 0, "")
    stages = {"rollout": replace(stage, more_s=5.0), "decode": stage, "denoise_backward": replace(stage, more_s=1.0)}
    plan = Plan("RTX 4090", 24, stages, 30.0)
    assert eight_bit(plan) == (
        "8 bit where this card shows that it is faster: assumed here; without it about 33 s an update"
    ), "what hides behind waiting for copies costs nothing"
    assert eight_bit(replace(plan, stages={"decode": stage})) is None


def test_a_plan_takes_int8_attention_for_models_that_it_runs_for():
    config = load_config("toy", ["dtype=bf16", *AUTO])
    assert None not in (choose_planned(config, 128).rollout_attention, choose_planned(config, 64).graded_attention)
    assert choose_planned(config, 32).graded_attention is None
    assert choose_planned(load_config("toy", ["dtype=fp32", *AUTO]), 128).rollout_attention is None


def test_a_plan_without_8_bit_needs_no_triton(monkeypatch):
    monkeypatch.delattr(levers, "why_no_int8")  # imports it
    assert choose_planned(load_config("toy")).rollout_attention is None
