"""What a plan says of time, and what it decides by it."""

import io

import pytest
from rich.console import Console

from lowmem_drf.config import load_config
from lowmem_drf.planner import report, words
from lowmem_drf.planner.cards import Room
from lowmem_drf.planner.stages import Plan, StagePlan

NOTHING = dict.fromkeys(("peak_gib", "weights_gib", "kept_gib", "host_gib", "stall_s", "copy_s", "moved_gib"), 0.0)


@pytest.mark.parametrize(("clip_s", "first"), [(100.0, False), (3.0, True)])
def test_clips_of_the_base_are_made_first_where_they_are_quick(clip_s, first, monkeypatch):
    """Of two clips an update the rollout takes a half and the decode the other half; there are four sample clips."""
    stages = dict.fromkeys(("rollout", "decode"), StagePlan(**NOTHING, s=clip_s, tflop=0.0, what=""))
    plan = Plan("RTX 4060", 8.0, stages, update_s=387.0)
    monkeypatch.setattr(report, "planned", lambda *_: plan)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "RTX 4060")
    said = Console(file=io.StringIO(), width=300)

    def decided(*settings):
        config = load_config("toy", ["batch=2", "micro_batch=2", "steps=500", *settings])
        return report.require_fit(config, said, [Room(8.0, 6.4)])[0].log.sample_first

    assert decided() is first
    _, line, *more = said.file.getvalue().splitlines()
    assert line == "500 updates, about 2.2 days on this card: 387 s an update"
    why = [
        "4 sample clips of the base model would take about 6.7 min: left out. To have them: -s log.sample_first=true"
    ]
    assert more == ([] if first else why)
    assert decided("log.sample_first=true") is True and decided("log.sample_first=false") is False
    assert decided("log.sample_every=0") == "auto"


def test_a_plan_says_what_clips_take_besides():
    stages = dict.fromkeys(("rollout", "decode"), StagePlan(**NOTHING, s=10.0, tflop=0.0, what=""))
    plan = Plan("RTX 4060", 8.0, stages, update_s=387.0)
    every = ["batch=2", "micro_batch=2", "steps=110", "log.watch_every=50", "log.watch_prompts=4"]
    both = load_config("toy", [*every, "log.sample_every=100", "log.sample_prompts=3"])
    said = "besides, about 5.3 min for 4 x 8 watch clips (log.watch_every) and 60 s for 2 x 3 sample clips"
    assert words.watching(plan, both) == f"{said} (log.sample_every)"
    # two clips of twice the width and half of the ten steps
    own = ['log.sample_prompts=["a", "b"]', "log.sample_width=64", "log.sample_steps=5"]
    said = words.watching(plan, load_config("toy", [*every, "log.watch_every=0", "log.sample_every=110", *own]))
    assert said == "besides, about 20 s for 1 x 2 sample clips (log.sample_every)"
    assert words.watching(plan, load_config("toy", ["log.watch_every=0", "log.sample_every=0"])) == ""


def test_time_has_two_figures_or_three_of_its_largest_unit():
    seconds = (0.04, 9.96, 50, 119, 120, 390, 7199, 7200, 38_700, 193_500, 12 * 86_400, 400 * 86_400)
    assert list(map(words.in_words, seconds)) == [
        *("0.04 s", "10.0 s", "50 s", "119 s", "2.0 min", "6.5 min", "120 min", "2.0 h", "10.8 h", "2.2 days"),
        *("12.0 days", "400 days"),
    ]
