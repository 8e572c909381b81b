"""The study: its page says what its files say, and the other methods are what their papers say."""

import re
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from _root import ROOT
from _toys import batch_of, plan_of, toy_parts

from lowmem_drf.method.schedule import advance

sys.path.insert(0, str(ROOT))

from bench.evidence import __main__ as study
from bench.evidence import alarms, baselines, page
from bench.evidence.levers import _some
from bench.evidence.runs import BEFORE
from bench.evidence.variants import NOW, VARIANTS
from lowmem_drf.config import load_config
from lowmem_drf.questions.make import make_questions


def test_the_page_is_what_its_files_say(tmp_path):
    """``python -m bench.evidence --page`` changes nothing."""
    copy = tmp_path / "evidence.md"
    copy.write_text(page.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    results = page.read(study.FOLDER)
    page.write_page(results, copy)
    assert copy.read_text(encoding="utf-8") == page.PAGE.read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- table: (\w+) -->", copy.read_text(encoding="utf-8"))) == {
        *(variant.group for variant in VARIANTS.values()),
        *("scales", "late", "parts", "splits", "alarms"),
    }
    for result in results:  # each is of the variant as it is now
        variant = VARIANTS[result["variant"]]
        assert tuple(result["overrides"]) == variant.overrides and page.last(result)["step"] == variant.updates


def test_what_the_study_says_of_presets_is_what_they_are():
    """A row of "the preset" is a run of the preset."""
    assert load_config("toy", BEFORE) == load_config("toy")
    assert load_config("toy-fast", [*BEFORE, *NOW]) == load_config("toy-fast")


def gradient(parts, step, *given, **named):
    for parameter in parts.lora:
        parameter.grad = None
    stats = step(parts, *given, **named)
    return torch.cat([parameter.grad.flatten() for parameter in parts.lora]), stats


def generators():
    return [torch.Generator().manual_seed(seed) for seed in range(4)]


@pytest.fixture
def four():
    """(parts, noise, cond, uncond, questions) of one prompt's four clips."""
    noise, cond, uncond, questions = batch_of(4)
    return toy_parts(), noise, cond, uncond, questions


def test_weights_of_a_prompt_s_clips():
    rewards = torch.tensor([[-0.1, -0.2, -0.5, -0.2], [-1.0, -1.0, -1.0, -1.0]])
    better = baselines.better(rewards)
    assert better.mean(-1).tolist() == pytest.approx([1, 1]) and better[0].argmax() == 0
    assert baselines.advantages(rewards).sum(-1).tolist() == pytest.approx([0, 0], abs=1e-6)
    assert not baselines.advantages(rewards)[1].any()


def test_matching_learns_from_no_gradient_of_the_reward(four):
    """Equal rewards teach a policy gradient nothing; weights of 1 are plain flow matching on own clips."""
    parts, *batch = four
    plan = plan_of((3, 5))
    nothing, _ = gradient(parts, partial(baselines.matching_step, torch.zeros_like), plan, *batch, generators())
    assert not nothing.any()
    got, stats = gradient(parts, partial(baselines.matching_step, torch.ones_like), plan, *batch, generators())
    draws, x_0, cond = generators(), stats.latents_BCFhw, batch[1][[0] * 4]
    loss = 0.0
    for _ in range(baselines.DRAWS):
        noise = torch.stack([torch.randn(x_0.shape[1:], generator=one) for one in draws]).to(x_0)
        sigma = plan.sigmas[int(torch.randint(plan.steps, (), generator=draws[0]))].item()
        v = parts.velocity((1 - sigma) * x_0 + sigma * noise, sigma, cond)
        loss = loss + (v - (noise - x_0)).pow(2).mean() / baselines.DRAWS
    wanted = torch.cat([one.flatten() for one in torch.autograd.grad(loss, parts.lora)])
    assert (got - wanted).norm() <= 1e-10 * wanted.norm()


def test_refl_judges_what_a_random_step_predicts():
    from lowmem_drf.config import load_config

    config = load_config("toy")
    seen = {baselines.refl_spec(config, step).graded[0] for step in range(60)}
    assert seen == set(range(10))
    spec = baselines.refl_spec(config, 0)
    last = spec.graded[0]
    assert spec.steps == last + 1 and spec.sigmas[-1] == 0
    x, v = torch.randn(2, 3), torch.randn(2, 3)
    # the jump to 0 is the clip that this step's velocity predicts
    assert torch.equal(advance("euler", x, v, spec.sigmas[last].item(), 0.0, ()), x - spec.sigmas[last].item() * v)


def test_dropped_questions_leave_one_of_each_aspect():
    questions = make_questions("a red circle moves left on a gray background", "dense", "toyworld")
    counts = [len(_some(questions, seed)) for seed in range(40)]
    assert {q.aspect for q in _some(questions, 1)} == {"TA", "Phy", "VQ"}
    assert len(set(counts)) > 1 and max(counts) < len(questions) + 1


def test_every_method_and_lever_is_there():
    for variant in VARIANTS.values():
        with baselines.method(variant.method):
            pass
        assert replace(variant, updates=60).says


def test_a_collapse_needs_an_alarm_and_a_good_mark():
    def rows(*rates, diversity=(0.16, 0.16, 0.16)):
        found = ((0.5, 0.16), *zip(rates, diversity, strict=True))  # the base first
        return [
            {"step": 50 * i, "scale": 1, "oracle": {"all": a, "physics": 1.0, "quality": 1.0}, "diversity": d}
            for i, (a, d) in enumerate(found)
        ]

    base = {"heldout_reward": -0.6, "heldout_TA": -0.6, "flicker": 1.0, "noise": 1.0}
    spread = dict.fromkeys(base, 0.2)
    good = {"heldout_reward": -0.1, "heldout_TA": -0.1, "flicker": 1.0, "noise": 1.0}
    bad = {"heldout_reward": -0.3, "heldout_TA": -0.3, "flicker": 9.0, "noise": 9.0}
    looks = [{"step": 0, "measures": base, "spread": spread}]
    looks += [
        {"step": s, "measures": m, "reward": r} for s, m, r in ((50, good, -1.0), (100, good, -0.5), (150, bad, -0.1))
    ]
    run = {"variant": "vanilla", "seed": 0, "looks": looks}
    fallen = alarms.judged(run | {"rows": rows(0.8, 0.9, 0.7)})
    assert (fallen.fallen, fallen.alarm, fallen.marked, fallen.lost) == (("all",), 150, 100, 0.0) and fallen.right
    sound = alarms.judged(run | {"rows": rows(0.8, 0.9, 0.89)})
    assert sound.fallen == () and not sound.right  # a false alarm
    back = alarms.judged(run | {"rows": rows(0.9, 0.7, 0.89)})
    assert back.fallen == () and back.deepest == pytest.approx(0.2) and back.right  # an alarm while it was down
    late = alarms.judged(run | {"rows": rows(0.95, 0.9, 0.7)})
    assert late.lost == pytest.approx(0.05) and not late.right
    alike = alarms.judged(run | {"rows": rows(0.8, 0.9, 0.99, diversity=(0.16, 0.09, 0.07))})  # right, and all the same
    assert (alike.fallen, alike.marked, alike.lost) == (("diversity",), 100, 0.0) and alike.right and not alike.sound
    marked = alarms.judged(run | {"rows": rows(0.8, 0.9, 0.99, diversity=(0.16, 0.07, 0.07))})
    assert marked.lost < 0 and marked.alike and not marked.right  # what is marked is alike already
