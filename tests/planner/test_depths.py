"""Stacks planned at two smaller depths: the figures are those of a plan with all blocks."""

from dataclasses import replace

import pytest
from _plans import FAKES, SMALL

from lowmem_drf.config import load_config
from lowmem_drf.models.generators import generator_config
from lowmem_drf.planner import depths, plan
from lowmem_drf.planner.cards import card_named
from lowmem_drf.planner.depths import LEAST, Line, line_to
from lowmem_drf.planner.plan import make_plan
from lowmem_drf.preset_files import preset_card, presets

slow = pytest.mark.slow
EXACT = ("peak_gib", "weights_gib", "kept_gib", "host_gib", "tflop", "moved_gib", "between_gib")
CLOSE = ("s", "stall_s", "copy_s")

SMALL_CLIP = ("video.width=64", "video.height=64", "video.frames=5", "critic.frames=2", "batch=1")
STREAMED = ('memory.park=["transformer","vae","critic"]', 'memory.stream=["transformer","critic"]')
SETTINGS = {
    "streamed, at true size": ("rtx4060",),
    "recorded": ("rtx4090-20step", *SMALL_CLIP, *STREAMED, "memory.record_rollout=true", "memory.token_slices=2"),
    "two experts": (
        "rtx4090-20step",
        *SMALL_CLIP,
        "model.id=Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        'memory.park=["transformer"]',
    ),
}


def both(config, card):
    return make_plan(config, card, fakes=FAKES), make_plan(config, card, fakes=FAKES, deep=True)


def agree(extended, deep):
    assert extended.stages.keys() == deep.stages.keys()
    for name, one in deep.stages.items():
        other = extended.stages[name]
        for figure in EXACT:
            # but the vector of all gradients' norms, which the allocator rounds up to 512 bytes
            near = 1e-5 if name == "update" else 0
            assert getattr(other, figure) == pytest.approx(getattr(one, figure), rel=0, abs=near), (name, figure)
        for figure in CLOSE:
            assert getattr(other, figure) == pytest.approx(getattr(one, figure), rel=1e-6, abs=1e-9), (name, figure)


def test_a_plan_of_fewer_blocks_has_the_figures_of_all(monkeypatch):
    """ToyWorld's four blocks, from two and three."""
    for name in ("FIRST", "LAST"):
        monkeypatch.setattr(depths, name, 1)
    line = Line({"transformer": 2}, {"transformer": 3}, steps=1)
    monkeypatch.setattr(plan, "line_to", lambda depths: line if depths.get("transformer") == 4 else None)
    config = load_config("toy", [*SMALL, "memory.checkpoint=true", 'memory.park=["transformer"]'])
    agree(*both(config, card_named("")))


@slow
@pytest.mark.parametrize("name", SETTINGS)
def test_all_settings_extend_exactly(name):
    preset, *overrides = SETTINGS[name]
    agree(*both(load_config(preset, overrides), card_named(preset_card(presets()[preset]))))


@pytest.mark.parametrize(
    "found", [{"transformer": 30, "language": 28, "windowed": 28}, {"transformer": 40, "language": 36}]
)
def test_a_line_leads_to_the_true_depths_and_costs_less(found):
    line = line_to(found)
    ends = {name: line.second[name] + line.steps * (line.second[name] - line.first[name]) for name in found}
    assert ends == found
    assert all(LEAST <= line.first[name] < line.second[name] for name in found)
    assert sum(line.first.values()) + sum(line.second.values()) < sum(found.values()) / 2


@slow
def test_depths_that_run_differently_are_not_extended(monkeypatch):
    """With one named block at each end, a stack of one block has none that is last."""
    for name in ("FIRST", "LAST"):
        monkeypatch.setattr(depths, name, 1)
    line = Line({"transformer": 1}, {"transformer": 2}, steps=2)
    monkeypatch.setattr(plan, "line_to", lambda depths: line if depths.get("transformer") == 4 else None)
    config = load_config("toy", SMALL)
    agree(*both(config, card_named("")))


@slow
def test_a_stage_that_is_not_run_again_has_the_same_figures():
    """As the ladder plans: every change leaves some stages as they were, and the last one all."""
    seen, changes = {}, ("memory.park=[]", 'memory.park=["critic"]', "memory.vae_caches=host", "memory.token_slices=2")
    changes += ('memory.stream=["transformer"]', "memory.park=[]")
    for number in range(1, len(changes) + 1):
        config = load_config("rtx4090-20step", [*SMALL_CLIP, *changes[:number]])
        before = len(seen)
        again = make_plan(config, card_named(""), fakes=FAKES, seen=seen)
        agree(again, make_plan(config, card_named(""), fakes=FAKES))
        assert len(seen) - before <= (3 if number == 1 else 1)


def test_shallow_stacks_and_unlike_experts_are_planned_whole():
    assert line_to({"transformer": LEAST, "language": LEAST}) is None
    wan = generator_config("Wan-AI/Wan2.2-T2V-A14B-Diffusers")
    unlike = replace(wan, transformer_2=wan.transformer_2 | {"num_layers": 3})
    critic = {"text_config": {"num_hidden_layers": 9, "layer_types": ["a", "b"]}, "vision_config": {"depth": 9}}
    assert depths.depths_of(wan, critic) == {"transformer": 40}
    assert depths.depths_of(unlike, critic) == {}
