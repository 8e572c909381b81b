"""The packaged models keep the contract of docs/toyworld.md. ``python -m lowmem_drf.toy.build.check`` prints the same
figures on more clips."""

from pathlib import Path

import pytest
from _trainer import Keeping

import lowmem_drf
from lowmem_drf.assembly.loading import load_models
from lowmem_drf.assembly.questions import draft_questions
from lowmem_drf.config import load_config
from lowmem_drf.models.lora.adapter import add_lora, lora_parameters
from lowmem_drf.prompts import as_prompts
from lowmem_drf.toy.build.check import GENERATORS, check_critic, check_explanations, check_generator, check_oracle
from lowmem_drf.toy.captions import train_prompts
from lowmem_drf.toy.defects import DEFECTS
from lowmem_drf.training.update import update


def at_least(rate: float, bound: float, n: int) -> bool:
    """True if the share ``rate`` of n draws is at most two standard deviations below ``bound``."""
    return rate >= bound - 2 * (bound * (1 - bound) / n) ** 0.5


def test_the_weights_are_small():
    folder = Path(lowmem_drf.__file__).parent / "toy" / "weights"
    files = list(folder.rglob("*.safetensors"))
    assert len(files) == 8 and sum(f.stat().st_size for f in files) <= 12e6


@pytest.mark.slow
def test_the_oracle_sees_through_the_vae():
    found = check_oracle(every=7)
    for kind in ("clean", "vae"):
        assert all(rate > 0.97 for rate in found[kind].values()), found[kind]
    for name, chance in found["chance"].items():
        spread = 4 * (chance * (1 - chance) / 540) ** 0.5  # four standard deviations of a fair guess on the 540 clips
        assert abs(found["shuffled captions"][name] - chance) < spread, name
    assert min(found["defect recall"].values()) > 0.85


@pytest.mark.slow
def test_the_base_generator_is_well_formed_and_follows_the_prompt_partly():
    rates = check_generator(prompts=128, seeds=1)
    assert at_least(rates["physics"], 0.85, 128) and at_least(rates["quality"], 0.85, 128), rates
    assert at_least(rates["all"], 0.25, 128) and at_least(1 - rates["all"], 0.5, 128), rates


def test_the_distilled_generator_is_well_formed_in_4_steps():
    """And follows the prompt better than the base, from the same noise: its guided teacher is distilled in."""
    base, few = (check_generator(16, 1, **GENERATORS[f"{name}, 4 steps"]) for name in ("base", "fewstep"))
    assert few["quality"] == 1 and few["physics"] > base["physics"] and few["all"] > base["all"], (base, few)


def test_an_update_of_the_distilled_generator():
    config = load_config("toy-fast", ["batch=1", "micro_batch=1"])
    prompts = as_prompts(train_prompts()[:1])
    models = load_models(config, prompts)
    add_lora(models.transformer, config.lora.rank, config.lora.alpha, seed=0)
    parts, keeping = models.parts(lora_parameters(models.transformer)), Keeping(config, models.transformer)
    report = update(config, models, parts, keeping, 0, prompts, draft_questions(config, prompts), None)
    assert report.grad_norm > 0 and config.sampler.graded_steps == config.sampler.steps == 4


@pytest.fixture(scope="module")
def recalls():
    return check_critic(clips=240)


@pytest.mark.parametrize("name", ["color", "shape", "direction", "background", "global", *DEFECTS])
def test_the_critic_says_yes_and_no_where_it_should(recalls, name):
    bound = 0.85 if name in DEFECTS else 0.9
    assert set(recalls[name]) == ({"yes", "no", "sound? no", "sound? yes"} if name in DEFECTS else {"yes", "no"})
    for answer, rate in recalls[name].items():
        has_it = name in DEFECTS and answer in ("yes", "sound? no")
        assert at_least(rate, bound, 16 if has_it else 200), (answer, recalls[name])


@pytest.mark.slow
def test_the_critics_explanations_are_right():
    found = check_explanations(clips=240)
    for name, rates in found.items():
        assert at_least(rates["sound"], 0.85, 130), (name, rates)
    for name in ("motion", "picture"):
        assert at_least(found[name]["defect"], 0.85, 40), (name, found[name])
