"""Base against tuned on ToyWorld's own models."""

import json
from types import SimpleNamespace

from rich.console import Console

from lowmem_drf.assembly.assemble import critic_rate
from lowmem_drf.assembly.loading import load_models
from lowmem_drf.config import load_config
from lowmem_drf.models.lora.adapter import add_lora
from lowmem_drf.scoring.evaluate import compare, judge_evenly, make_trial
from lowmem_drf.scoring.result import Result


def test_a_lora_that_is_not_trained_changes_nothing_and_the_result_has_the_schema():
    config = load_config("toy")
    trial = make_trial(config, (), count=5, seeds=1)
    models = load_models(config, trial.prompts)
    add_lora(models.transformer, 2, 2.0, config.lora.targets, seed=0)
    result = Result.model_validate(json.loads(json.dumps(compare(config, models, trial, Console(quiet=True)))))
    assert result.base == result.tuned
    assert result.base.oracle and set(result.base.oracle) == {
        "color",
        "shape",
        "direction",
        "physics",
        "quality",
        "all",
    }
    assert result.base.drift and result.base.drift["mean"] > 0
    assert {"reward", "reward_by_aspect.TA", "heldout_reward", "oracle.all", "motion", "blur"} < set(result.change)
    assert all((c.mean, c.low, c.high, c.prompts) == (0, 0, 0, 5) for c in result.change.values())
    assert (result.wins["heldout_reward"].mean, result.base.diversity) == (0.5, 0)


def test_the_critic_is_told_the_rate_of_the_frames_it_is_shown():
    """Updates may show others: of 81 frames at 16 a second 8 at random phases are 1.58 a second, evenly spaced 1.4."""
    told, config = [], load_config("rtx4090")
    critic = SimpleNamespace(fps=critic_rate(config))
    models = SimpleNamespace(critic=critic, judge=lambda frames, asked: told.append(critic.fps))
    kept, judge = judge_evenly(config, models)
    judge(None, [])
    assert kept == [0, 11, 22, 34, 45, 57, 68, 80] and told == [16 * 7 / 80] and critic.fps == 16 * 8 / 81
    critic.fps = None  # ToyWorld's: trained at one rate
    judge(None, [])
    assert told[1] is None and critic.fps is None
