"""A run that is watched: its looks, an alarm that ends it, and the best update for the commands after it."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest

from lowmem_drf.commands.eval import eval_command
from lowmem_drf.commands.export_lora import export_run
from lowmem_drf.commands.sample import sample_command
from lowmem_drf.commands.train import train_command
from lowmem_drf.config import load_config
from lowmem_drf.errors import BadInputError
from lowmem_drf.prompts import as_prompts, fingerprint
from lowmem_drf.scoring import alarm, watch
from lowmem_drf.scoring.alarm import best_step, read_looks

WATCHED = ("log.watch_every=2", "log.watch_prompts=2", "log.sample_every=0", "log.keep=1")


@pytest.fixture(scope="module")
def watched_run(tiny_preset, tmp_path_factory):
    run = tmp_path_factory.mktemp("watched") / "run"
    train_command(str(tiny_preset), None, run, None, None, False, list(WATCHED), False)
    return run


def test_a_run_looks_at_the_base_and_every_so_many_updates(watched_run):
    looks = read_looks(watched_run, 4)
    assert [look.step for look in looks] == [0, 2, 4]
    for look in looks:
        assert {"heldout_reward", "diversity", "velocity_norm", "lora_norm", "motion", "si"} <= set(look.measures)
    assert looks[0].measures["lora_norm"] == 0 < looks[1].measures["lora_norm"] < looks[2].measures["lora_norm"]


def test_watching_changes_no_weight(watched_run, tiny_run):
    files = [run / "checkpoints" / "step-000004" / "lora.safetensors" for run in (watched_run, tiny_run)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_resumed_run_looks_as_an_unbroken_one(watched_run, tiny_preset, tmp_path):
    run = tmp_path / "run"
    train_command(str(tiny_preset), None, run, 2, None, False, list(WATCHED), False)
    train_command(None, None, run, 4, None, True, [], False)
    assert (run / "watch.jsonl").read_bytes() == (watched_run / "watch.jsonl").read_bytes()


def test_the_alarm_is_said_ends_the_run_and_leaves_the_best_update(tiny_preset, tmp_path, monkeypatch, capfd):
    run, add = tmp_path / "run", alarm.Alarm.add

    def hacked(self, step, measures, reward):
        worse = {"diversity": -1.0, "saturation": -1.0, "freeze": 2.0} if step > 1 else {}
        return add(self, step, {**measures, **worse}, float(step))

    monkeypatch.setattr(alarm.Alarm, "add", hacked)
    stops = ["optim.stop=alarm", "lora.scale=3", *WATCHED, "log.watch_every=1", "log.eval_prompts=1"]
    train_command(str(tiny_preset), None, run, None, None, False, stops, False)
    said = capfd.readouterr().out
    assert "update 2: the reward rises, but" in said and "diversity" in said and "update before it is 1" in said
    lasts = "The alarm of update 2 lasts: the clips of update 2 are outside of their bands."
    assert f"{lasts} Of the updates without it 1 is the best: --best takes that one." in said
    assert "It ends here" in said and json.loads((run / "eval.json").read_text())["step"] == 2
    assert sorted(os.listdir(run / "checkpoints")) == ["best", "step-000001", "step-000002"] and best_step(run) == 1
    prompts = ["a red circle moves left on a gray background"]
    sample_command(run, None, prompts, None, None, False, 1.0, 0, None, best=True)
    assert "step-000001" in capfd.readouterr().out
    assert "step-000001" in str(export_run(run, best=True).paths[0])
    (tmp_path / "one.txt").write_text("a red circle moves left on a gray background\n")
    eval_command(run, tmp_path / "one.txt", False, seeds=1, best=True)
    best = capfd.readouterr()
    assert "step 1: " in best.out and "lasts" not in best.err
    own = json.loads((run / "eval.json").read_text())["result"]
    (tmp_path / "own.txt").write_text(own["by_prompt"][0]["prompt"] + "\n")
    eval_command(run, tmp_path / "own.txt", True, seeds=own["seeds"])
    again = capfd.readouterr()
    assert json.loads(again.out)["tuned"] == own["tuned"]  # of a LoRA with half of what 3 adds
    assert lasts in again.err and lasts in export_run(run).lines[-1]
    with pytest.raises(BadInputError, match="give one of them"):
        export_run(run, 2, best=True)
    copy = shutil.copytree(run, tmp_path / "copy")
    train_command(None, None, copy, None, None, True, ["log.watch_every=0"], False)
    assert sorted(os.listdir(copy / "checkpoints")) == ["best", "step-000001", "step-000004"]
    train_command(None, None, run, None, None, True, [], False)  # goes on, though the alarm lasts
    assert sorted(os.listdir(run / "checkpoints")) == ["best", "step-000001", "step-000004"]


def test_a_look_that_a_killed_run_missed_is_made_on_resume(watched_run, tiny_preset, tmp_path):
    run = tmp_path / "run"
    train_command(str(tiny_preset), None, run, 2, None, False, list(WATCHED), False)
    looks = (run / "watch.jsonl").read_text().splitlines(keepends=True)
    (run / "watch.jsonl").write_text(looks[0])
    train_command(None, None, run, 4, None, True, [], False)
    steps = [look.step for look in read_looks(run, 4)]
    assert steps == [0, 2, 4]
    last = [folder.joinpath("watch.jsonl").read_text().splitlines()[-1] for folder in (run, watched_run)]
    assert json.loads(last[0])["measures"] == json.loads(last[1])["measures"]


def test_other_prompts_are_looked_at_anew(watched_run, tmp_path, capfd):
    """What the looks before knew is not lost."""
    run = shutil.copytree(watched_run, tmp_path / "run")
    before = (run / "watch.jsonl").read_bytes()
    _, first, last = read_looks(run, 4)
    train_command(None, None, run, 5, None, True, ["log.watch_prompts=3"], False)
    looks = read_looks(run, 5)
    assert [look.step for look in looks] == [0, 4, 5] and looks[0].best == last.best is not None
    assert [look.reward for look in looks[:2]] == [first.reward, last.reward]
    assert (run / "watch-until-000004.jsonl").read_bytes() == before
    said = f"anew: it has other prompts. The best until update 4 was update {last.best}. watch-until-000004.jsonl has"
    assert said in capfd.readouterr().out


def test_one_prompt_cannot_be_judged_and_that_is_said(watched_run, tmp_path, capfd):
    run = shutil.copytree(watched_run, tmp_path / "run")
    train_command(None, None, run, 5, None, True, ["log.watch_prompts=1"], False)
    assert "so there can be no alarm" not in capfd.readouterr().out  # what was said is that looks begin anew
    train_command(None, None, run, 6, None, True, [], False)
    assert "one prompt is watched: " in capfd.readouterr().out
    assert [look.step for look in read_looks(run, 6)] == [0, 4, 5, 6]
    with pytest.raises(BadInputError, match=r'optim\.stop = "alarm": one prompt is watched'):
        train_command(None, None, run, 7, None, True, ["optim.stop=alarm"], False)


def test_a_lora_that_is_used_otherwise_is_looked_at_anew(watched_run, tmp_path):
    """The base's look stays; the update so far is looked at at once, so that --best is one that was seen so."""
    run = shutil.copytree(watched_run, tmp_path / "run")
    base = read_looks(run, 0)[0]
    train_command(None, None, run, 5, None, True, ["lora.scale=1.5", "log.watch_every=3"], False)
    looks = read_looks(run, 5)
    assert [look.step for look in looks] == [0, 4, 5] and looks[0].measures == base.measures
    assert looks[0].use == "lora.scale=1.5 lora.max_sigma=1" != base.use


def test_a_run_without_a_watch_has_no_best_update(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    assert not (run / "watch.jsonl").exists()
    with pytest.raises(BadInputError, match="no best update yet"):
        export_run(run, best=True)


def test_looks_are_lines_of_json(watched_run):
    rows = [json.loads(line) for line in (watched_run / "watch.jsonl").read_text().splitlines()]
    assert rows[0]["bands"]["diversity"][1] is None and "bands" not in rows[1]
    assert all(row["alarm"] is None and row["outside"] == [] for row in rows[:1])


def test_answers_worse_than_the_bases_are_said_though_the_reward_falls(tmp_path, monkeypatch):
    prompts = as_prompts(["a red circle", "a blue square"])
    base = {"heldout_reward": [-0.5, -0.6], "heldout_TA": [-0.5, -0.6], "diversity": [0.2, 0.21], "si": [1.0, 1.1]}
    looks = alarm.Alarm()
    looks.begin(base, prompts=fingerprint(prompts))
    alarm.save_looks(tmp_path, looks.looks)
    watched = watch.Watch(load_config("toy"), tmp_path, None, SimpleNamespace(prompts=prompts), done=1)
    said = []
    for step, reward, answers in ((1, -0.4, base), (2, -0.5, {name: [-9.0] for name in base})):
        monkeypatch.setattr(watch, "look", lambda *given, answers=answers: answers)
        watched.rewards.append(reward)
        said.append(watched.look(step, 0.1))
    assert said[0] == "" and said[1].startswith("update 2: held-out answers are worse than the base's, and heldout TA")
    assert said[1].endswith("the best update before it is 1 (--best).")
