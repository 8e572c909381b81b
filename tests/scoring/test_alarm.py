"""The alarm: looks with measures outside of the base's bands, and the best update before it."""

import pytest

from lowmem_drf.errors import BadInputError
from lowmem_drf.scoring.alarm import HELDOUT, NOISE, RULES, Alarm, best_step, mark_best, read_looks, save_looks, spreads

BASE = {
    **{"heldout_reward": [-0.8, -0.6, -0.4], "heldout_Phy": [-0.5, -0.3, -0.1]},
    **{"diversity": [0.1, 0.2], "blur": [4.0, 5.0, 6.0], "lora_norm": [0.0]},
}
GOOD = {"heldout_reward": -0.5, "heldout_Phy": -0.3, "diversity": 0.15, "blur": 5.0, "lora_norm": 3.0}
WORSE = {**GOOD, "diversity": 0.06, "blur": 9.0}
WORST = {**WORSE, "heldout_Phy": -0.9}


def begun():
    alarm = Alarm()
    alarm.begin(BASE)
    return alarm


def test_a_band_is_what_the_base_s_own_prompts_differ_by():
    look = begun().looks[0]
    assert look.bands["blur"] == (None, 5 + RULES["blur"].width)  # a standard deviation of 1; only more blur is worse
    assert look.bands["diversity"][1] is None and "lora_norm" not in look.bands
    spread = spreads({"motion": [0.5, 0.5], "freeze": [0.0, 0.0]})
    assert spread == {"motion": 0.02 * 0.5, "freeze": RULES["freeze"].least}  # hardly differ: a least spread


def test_two_measures_outside_and_a_reward_that_rose_are_suspect_and_twice_the_alarm():
    alarm = begun()
    assert not alarm.add(25, GOOD, -1.0).suspect
    assert not alarm.add(50, {**GOOD, "blur": 9.0}, -0.5).suspect  # one may leave
    assert not alarm.add(75, WORSE, -1.1).suspect  # nothing is gained by it
    look = alarm.add(100, WORSE, -0.4)
    assert (look.suspect, look.alarm, sorted(look.outside)) == (True, None, ["blur", "diversity"])
    assert alarm.add(125, WORSE, -0.3).alarm == 125
    assert alarm.add(150, WORSE, -0.3).alarm == alarm.began == 125  # since when
    assert alarm.add(175, GOOD, -0.3).alarm is None
    assert alarm.add(200, WORSE, -0.3).alarm is None  # the look before was not


def test_looks_that_begin_anew_know_what_those_before_did():
    """A first look has nothing to have risen from; one after others has, and an update that they doubted is no best."""
    for notes, (suspect, best) in (({}, (False, 300)), ({"reward": -1.0, "best": 200}, (True, 200))):
        alarm = Alarm()
        alarm.begin(BASE, **notes)
        look = alarm.add(300, WORSE, -0.4)
        assert (look.suspect, look.best) == (suspect, best)


def test_three_measures_outside_are_the_alarm_at_once():
    alarm = begun()
    alarm.add(25, GOOD, -1.0)
    assert alarm.add(50, WORST, -0.5).alarm == 50


def test_diversity_far_outside_counts_as_two():
    alarm = begun()
    alarm.add(25, GOOD, -1.0)
    mean, low = 0.15, alarm.looks[0].bands["diversity"][0]
    outside, far = ({**GOOD, "diversity": mean - times * (mean - low)} for times in (1.49, 1.51))
    assert not alarm.add(50, outside, -0.5).suspect
    look = alarm.add(75, far, -0.4)
    assert look.suspect and look.outside == ["diversity"] and look.alarm is None
    assert alarm.add(100, far, -0.3).alarm == 100 and alarm.best == 50
    assert begun_with(GOOD).add(50, {**far, "blur": 9.0}, -0.5).alarm == 50  # two and one
    assert begun_with(GOOD).add(50, {**GOOD, "blur": 99.0}, -0.5).suspect is False  # diversity alone


def begun_with(look):
    alarm = begun()
    alarm.add(25, look, -1.0)
    return alarm


def test_answers_worse_than_the_base_s_are_suspect_whatever_the_reward_does():
    alarm = begun()
    alarm.add(25, GOOD, -1.0)
    nearly = {**WORST, "heldout_reward": -0.6 - 0.99 * HELDOUT.width * 0.2}  # a spread of 0.2
    assert alarm.add(50, nearly, -1.1).alarm is None
    look = alarm.add(75, {**nearly, "heldout_reward": -0.6 - 1.01 * HELDOUT.width * 0.2}, -1.2)
    assert look.worse and look.alarm == 75
    assert not alarm.add(100, {**GOOD, "heldout_reward": -0.9}, -1.2).suspect  # one measure is not enough


def test_held_out_questions_of_an_aspect_may_not_fall_back_from_their_best():
    alarm = begun()
    better = {**GOOD, "heldout_Phy": -0.05}
    alarm.add(25, better, -1.0)
    look = alarm.add(50, {**better, "heldout_Phy": -0.25, "blur": 9.0}, -0.5)  # still better than the base
    assert sorted(look.outside) == ["blur", "heldout_Phy"] and look.suspect
    alarm.add(75, {**better, "heldout_Phy": float("nan")}, -0.5)
    assert alarm.add(100, better, -0.5).outside == []  # a clip that was NaN is not the best for good


def test_a_measure_that_clips_no_longer_have_is_outside():
    alarm = begun()
    alarm.add(25, GOOD, -1.0)
    assert alarm.add(50, {"heldout_reward": float("nan"), "diversity": 0.15}, -0.5).suspect


def test_a_broken_clip_is_no_best_look_and_does_not_hide_a_later_one():
    alarm = Alarm()
    alarm.begin({**BASE, "diversity": [0.1, float("nan")]})
    assert alarm.add(25, {**GOOD, "heldout_reward": float("nan")}, -1.0).best is None
    assert alarm.add(50, GOOD, -0.9).best == 50


def test_the_best_look_has_no_alarm_and_the_best_held_out_answers():
    alarm = begun()
    scores = {25: -0.5, 50: -0.2, 75: -0.3}
    for step, score in scores.items():
        alarm.add(step, {**GOOD, "heldout_reward": score}, -1 + step / 100)
    assert alarm.best == 50
    assert alarm.add(100, {**WORSE, "heldout_reward": -0.1}, 0.0).best == 50
    nearly = -0.2 - 0.9 * NOISE * 0.2  # a spread of 0.2: the later update is the better one
    assert alarm.add(125, {**GOOD, "heldout_reward": nearly}, 0.0).best == 125
    assert alarm.add(150, {**GOOD, "heldout_reward": -0.006}, 0.0).best == 150  # a hundredth of the base's -0.6
    assert alarm.add(175, {**GOOD, "heldout_reward": -0.006 - 0.9 * 0.01 * 0.2}, 0.0).best == 175
    assert alarm.add(200, {**GOOD, "heldout_reward": -0.006 - 1.1 * 0.01 * 0.2}, 0.0).best == 175


def test_looks_are_kept_and_those_after_the_checkpoint_dropped(tmp_path):
    alarm = begun()
    alarm.add(25, GOOD, -1.0)
    alarm.add(50, WORST, -0.5)
    save_looks(tmp_path, alarm.looks)
    assert [look.step for look in read_looks(tmp_path, 25)] == [0, 25]
    again = Alarm(read_looks(tmp_path, 50))
    assert (again.began, again.best) == (50, 25)
    assert again.add(75, WORSE, -0.4) == alarm.add(75, WORSE, -0.4)
    (tmp_path / "watch.jsonl").write_text('{"step": 0')
    assert read_looks(tmp_path, 50) == []  # looked at anew


def test_the_best_update_is_a_file(tmp_path):
    with pytest.raises(BadInputError, match="no best update yet"):
        best_step(tmp_path)
    mark_best(tmp_path, 75)
    assert best_step(tmp_path) == 75
