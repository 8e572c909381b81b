"""Resume is exact: a run that is killed at any moment and resumed gives the LoRA bytes of an unbroken one."""

import json
import os
import random
import re
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from _killed import train_until_killed

from lowmem_drf.commands.train import train_command
from lowmem_drf.errors import BadInputError, LowmemError
from lowmem_drf.prompts import Cursor
from lowmem_drf.questions.file import to_json
from lowmem_drf.training import manifest
from lowmem_drf.training.checkpoint import (
    Checkpoint,
    checkpoint_folder,
    checkpoint_steps,
    good_step,
    load_checkpoint,
    save_checkpoint,
)
from lowmem_drf.training.manifest import refuse_damaged, same_setting
from lowmem_drf.training.metrics import read_metrics
from lowmem_drf.training.run_folder import run_config
from lowmem_drf.types import Question

MOMENTS = {
    "between the files of the second save": ("safetensors.torch.save_file", 4),
    "in the rotation": ("shutil.rmtree", 1),
}
"""Moment of death -> the function in whose n-th call the process kills itself. All moments: ``test_killed.py``."""


def lora_bytes(run):
    return (checkpoint_folder(run) / "lora.safetensors").read_bytes()


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed_equals_unbroken(moment, processes, tiny_preset, tiny_run, tmp_path):
    run = tmp_path / "run"
    process = processes.Process(target=train_until_killed, args=(*MOMENTS[moment], tiny_preset, run))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert max(checkpoint_steps(run), default=0) < 4
    for step in checkpoint_steps(run):
        load_checkpoint(checkpoint_folder(run, step))  # whatever has its name is whole
    train_command(None, None, run, None, None, True, [], False)
    assert lora_bytes(run) == lora_bytes(tiny_run)
    timed = ("update_s", "stage_s", "stage_peak_gib")
    rows, expected = (
        [{k: v for k, v in row.items() if k not in timed} for row in read_metrics(r)] for r in (run, tiny_run)
    )
    assert rows == expected
    assert sorted(os.listdir(run / "checkpoints")) == sorted(os.listdir(tiny_run / "checkpoints"))


def test_a_run_in_two_halves_equals_one_in_one(tiny_preset, tiny_run, tmp_path):
    run = tmp_path / "run"
    train_command(str(tiny_preset), None, run, 1, None, False, [], False)
    train_command(None, None, run, 3, None, True, [], False)
    train_command(None, None, run, 4, None, True, [], False)
    assert lora_bytes(run) == lora_bytes(tiny_run)


def test_another_seed_is_another_run(tiny_preset, tiny_run, tmp_path):
    run = tmp_path / "run"
    train_command(str(tiny_preset), None, run, 1, 1, False, ["log.sample_every=0"], False)
    rewards, others = (read_metrics(r)[0]["reward_by_question"] for r in (run, tiny_run))
    assert rewards != others
    assert (
        load_checkpoint(checkpoint_folder(run)).lora.keys() == load_checkpoint(checkpoint_folder(tiny_run)).lora.keys()
    )


def test_changed_prompts_are_refused(tiny_run, tiny_preset, tmp_path):
    prompts, run = tmp_path / "prompts.txt", tmp_path / "run"
    prompts.write_text("a red circle moves left on a gray background\n")
    train_command(str(tiny_preset), prompts, run, 1, None, False, ["critic.questions=phrases"], False)
    prompts.write_text("a blue circle moves left on a gray background\n")
    with pytest.raises(BadInputError, match="prompts of .* have changed"):
        train_command(None, None, run, 2, None, True, [], False)


def test_changed_questions_are_refused_and_the_runs_own_stay(tiny_preset, tmp_path):
    prompt = "a red circle moves left on a gray background"
    prompts, file, run = tmp_path / "prompts.txt", tmp_path / "questions.json", tmp_path / "run"
    prompts.write_text(prompt + "\n")
    file.write_text(to_json({prompt: [Question("TA", "is it red ?", "yes")]}))
    train_command(str(tiny_preset), prompts, run, 1, None, False, [f"critic.questions={file}"], False)
    asked = (run / "questions.json").read_text()
    file.write_text(to_json({prompt: [Question("TA", "is it blue ?", "yes")]}))
    with pytest.raises(BadInputError, match="questions of .* have changed"):
        train_command(None, None, run, 2, None, True, [], False)
    assert (run / "questions.json").read_text() == asked
    file.write_text(asked)
    (run / "questions.json").unlink()
    train_command(None, None, run, 2, None, True, [], False)
    assert checkpoint_steps(run)[-1] == 2


@pytest.fixture
def checkpoint():
    lora = {"a.lora_A.weight": torch.randn(2, 3), "a.lora_B.weight": torch.randn(3, 2)}
    return Checkpoint(1, lora, {"a.lora_A.weight.exp_avg": torch.randn(2, 3)}, Cursor(2, 5), "hash")


def test_a_checkpoint_reads_back(checkpoint, tmp_path):
    torch.manual_seed(5)
    folder = save_checkpoint(tmp_path, checkpoint, 2.0, keep=3)
    expected = torch.rand(3)
    back = load_checkpoint(folder)
    assert torch.equal(torch.rand(3), expected)
    assert (back.step, back.cursor, back.prompts) == (1, Cursor(2, 5), "hash")
    for name in ("lora", "optimizer"):
        left, right = getattr(back, name), getattr(checkpoint, name)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)


def test_rotation_keeps_the_last_ones_and_clears_leftovers(checkpoint, tmp_path):
    (tmp_path / "checkpoints" / ".step-000009").mkdir(parents=True)
    for step in (1, 2, 10, 11):
        save_checkpoint(tmp_path, replace(checkpoint, step=step), 1.0, keep=2)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-000010", "step-000011"]
    assert checkpoint_folder(tmp_path).name == "step-000011"
    assert checkpoint_folder(tmp_path, 10).name == "step-000010"
    with pytest.raises(BadInputError, match="no checkpoint of step 1. Steps: 10, 11"):
        checkpoint_folder(tmp_path, 1)


def test_a_run_without_checkpoint_says_so(tmp_path):
    with pytest.raises(BadInputError, match="no checkpoint yet"):
        checkpoint_folder(tmp_path)


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def test_the_manifest_is_plain_json(tiny_run):
    row = manifest_of(checkpoint_folder(tiny_run))
    state = {"format", "step", "epoch", "index", "prompts", "spread", "skipped", "tiny_cosine", "steps"}
    assert set(row) == state | {"settings", "questions", "files", "digest"}
    assert (row["step"], row["index"]) == (4, 12)
    assert row["settings"]["lora.rank"] == 2 and "optim.lr" not in row["settings"]
    assert set(row["files"]) == {"lora.safetensors", "state.safetensors"}


def test_every_flipped_bit_is_noticed(tiny_run, tmp_path):
    folder = Path(shutil.copytree(checkpoint_folder(tiny_run), tmp_path / "step-000004"))
    load_checkpoint(folder)
    dice = random.Random(0)
    for _ in range(200):
        path = dice.choice(sorted(folder.iterdir()))
        whole = path.read_bytes()
        place, bit = dice.randrange(len(whole)), dice.randrange(8)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        with pytest.raises(LowmemError, match=rf"is damaged \({path.name}.*Delete its folder"):
            load_checkpoint(folder)
        if path.name == "lora.safetensors":
            with pytest.raises(LowmemError, match="belongs to a damaged checkpoint.*Take that of another one"):
                refuse_damaged(path)
        path.write_bytes(whole)
    load_checkpoint(folder)
    refuse_damaged(folder / "lora.safetensors")


def other_step(run, folder):
    shutil.copy(run / "checkpoints" / "step-000003" / "lora.safetensors", folder)


def renamed(run, folder):
    shutil.rmtree(folder)
    shutil.copytree(run / "checkpoints" / "step-000003", folder)


def cut(run, folder):
    (folder / "state.safetensors").write_bytes((folder / "state.safetensors").read_bytes()[:20])


def lost(run, folder):
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize("damage", [other_step, renamed, cut, lost])
def test_a_damaged_checkpoint_is_said_and_the_one_before_it_used(damage, tiny_run, tmp_path, capfd):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    damage(run, run / "checkpoints" / "step-000004")
    assert checkpoint_folder(run).name == "step-000003"  # what sample, eval and export-lora take
    with pytest.raises(LowmemError, match="step-000004 of .* is damaged.*Take another: 3"):
        checkpoint_folder(run, 4)  # export-lora --step 4
    assert re.search(r"The checkpoint step-000004 of .* is damaged \(.*\): step-000003 is used", capfd.readouterr().err)
    train_command(None, None, run, None, None, True, ["log.keep=1"], False)
    assert "resumed after update 3" in (said := capfd.readouterr()).out and "step-000004" in said.err
    assert lora_bytes(run) == lora_bytes(tiny_run)
    assert sorted(os.listdir(run / "checkpoints")) == ["damaged-step-000004", "step-000004"]
    with pytest.raises(BadInputError, match="is complete: 4 of 4"):
        train_command(None, None, run, None, None, True, [], False)


@pytest.mark.slow
def test_a_full_disk_is_said_with_what_is_saved(tiny_preset, tmp_path, monkeypatch):
    run, save_file = tmp_path / "run", safetensors.torch.save_file

    def full(tensors, path, **rest):
        if "step-000002" in str(path):
            raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
        save_file(tensors, path, **rest)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    settings = ["log.checkpoint_every=1", "log.sample_every=0", "batch=1", "micro_batch=1"]
    with pytest.raises(LowmemError, match=r"disk is full(.|\n)*Update 1 is the last one saved(.|\n)*--resume --output"):
        train_command(str(tiny_preset), None, run, 2, None, False, settings, False)
    assert os.listdir(run / "checkpoints") == ["step-000001"]


def test_a_run_whose_checkpoints_are_all_damaged_says_how_to_begin_anew(tiny_run, tmp_path):
    run = Path(shutil.copytree(tiny_run, tmp_path / "a run"))
    for step in (3, 4):
        lost(run, run / "checkpoints" / f"step-{step:06d}")
    for command in (
        lambda: checkpoint_folder(run),
        lambda: train_command(None, None, run, None, None, True, [], False),
    ):
        with pytest.raises(LowmemError, match="step-000004 is damaged.*Start a new run.*--preset '.*config.toml'"):
            command()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seed = 0", "seed = 1", "seed is 1, and was 0"),
        ("batch = 3", "batch = 6", "batch is 6, and was 3"),
        ("alpha = ", "alpha = 1", "lora.alpha is 1"),
        ("shift = ", "shift = 1", "sampler.shift is 1"),
        ('dtype = "fp32"', 'dtype = "bf16"', "dtype is 'bf16', and was 'fp32'"),
    ],
)
def test_an_edited_configuration_is_refused_by_name(old, new, said, tiny_run, tmp_path):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    text = (run / "config.toml").read_text()
    assert old in text
    (run / "config.toml").write_text(re.sub(rf"^{old}", new, text, count=1, flags=re.MULTILINE))
    resume = partial(train_command, None, None, run, 5, None, True, [], False)
    for command in (resume, lambda: run_config(run)):
        with pytest.raises(BadInputError, match=f"edited since update 4 was saved: {said}.*Put the old values back"):
            command()


def test_edited_questions_are_refused(tiny_run, tmp_path):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    text = (run / "questions.json").read_text()
    (run / "questions.json").write_text(text.replace('"answer": "yes"', '"answer": "no"', 1))
    with pytest.raises(BadInputError, match="questions of .* have changed.*questions.json was edited, delete it"):
        train_command(None, None, run, 5, None, True, [], False)
    (run / "questions.json").write_text("{")
    with pytest.raises(BadInputError, match="own questions cannot be read.*Delete .*questions.json and resume"):
        train_command(None, None, run, 5, None, True, [], False)
    (run / "questions.json").unlink()
    train_command(None, None, run, 5, None, True, [], False)
    assert (run / "questions.json").read_text() == text


def test_what_may_change_may_be_edited_and_models_may_be_moved(tiny_run, tiny_folders, tmp_path):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    moved = Path(shutil.copytree(tiny_folders[1], tmp_path / tiny_folders[1].name)).as_posix()
    text = (run / "config.toml").read_text().replace(tiny_folders[1].as_posix(), moved)
    (run / "config.toml").write_text(re.sub("^lr = .*", "lr = 1e-9", text, flags=re.MULTILINE))
    config = run_config(run)
    assert (config.optim.lr, config.critic.id) == (1e-9, moved)
    assert same_setting(["/old/a.safetensors", "o/r/b.safetensors"], ["/new/a.safetensors", "o/r/b.safetensors"])
    assert not same_setting(["/old/a.safetensors"], ["/old/b.safetensors"])


def as_format_1(folder, **changes):
    """A checkpoint as earlier versions wrote it."""
    row = manifest_of(folder)
    kept = {key: row[key] for key in ("step", "epoch", "index", "prompts", "spread")}
    (folder / "manifest.json").unlink()
    (folder / "cursor.json").write_text(json.dumps(kept | changes))


def test_a_checkpoint_of_format_1_is_resumed(tiny_run, tmp_path):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints" / "step-000004")
    as_format_1(run / "checkpoints" / "step-000003")
    train_command(None, None, run, None, None, True, [], False)
    assert lora_bytes(run) == lora_bytes(tiny_run)


@pytest.mark.parametrize(
    "changes",
    [{"step": 10**30}, {"step": -4}, {"epoch": -1}, {"index": -2}, {"index": None}, {"spread": [1]}, {"skipped": -1}],
    ids=str,
)
def test_wrong_values_of_format_1_are_damage(changes, tiny_run, tmp_path):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    as_format_1(run / "checkpoints" / "step-000004", **changes)
    assert good_step(run, lambda _: None) == 3


def test_an_index_behind_the_last_prompt_of_format_1_is_damage(tiny_run, tmp_path):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    as_format_1(run / "checkpoints" / "step-000004", index=10**9)
    with pytest.raises(LowmemError, match="damaged. Delete its folder"):
        train_command(None, None, run, 5, None, True, [], False)


def test_a_checkpoint_of_a_later_version_is_refused_and_not_called_damaged(checkpoint, tmp_path):
    folder = save_checkpoint(tmp_path, checkpoint, 1.0, keep=3)
    (folder / "manifest.json").write_bytes(manifest._sealed({"format": 3, "step": 1, "new": "unknown"}))
    with pytest.raises(LowmemError, match="written by another version.*format 3; this one reads 2.*Use that version"):
        good_step(tmp_path)


def test_a_checkpoint_that_a_program_has_open_on_windows_stops_no_run(tmp_path, monkeypatch):
    """Its deletion waits for the next save. What was loaded from it keeps no file of it open."""

    class InUse(PermissionError):
        winerror = 32

    def refuse(*paths):
        raise InUse

    monkeypatch.setattr("time.sleep", lambda seconds: None)
    checkpoint = Checkpoint(1, {"a": torch.ones(2000)}, {"moment": torch.ones(2000)}, Cursor(), "p")
    with monkeypatch.context() as patched:
        patched.setattr("lowmem_drf.training.checkpoint.discard", refuse)
        for step in (1, 2):
            save_checkpoint(tmp_path, replace(checkpoint, step=step), 1.0, keep=1)
    assert checkpoint_steps(tmp_path) == [1, 2]
    loaded = load_checkpoint(checkpoint_folder(tmp_path))
    maps = Path("/proc/self/maps")
    assert torch.equal(loaded.lora["a"], torch.ones(2000))
    assert str(tmp_path) not in (maps.read_text() if maps.exists() else "")
    save_checkpoint(tmp_path, replace(checkpoint, step=3), 1.0, keep=1)
    assert checkpoint_steps(tmp_path) == [3]
