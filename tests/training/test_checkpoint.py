"""Resume is exact: a run that is killed at any moment and resumed gives the LoRA bytes of an unbroken one."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from _killed import train_until_killed

from lowmem_drf.commands.train import train_command
from lowmem_drf.errors import BadInputError, LowmemError
from lowmem_drf.prompts import Cursor
from lowmem_drf.questions.file import to_json
from lowmem_drf.training.checkpoint import (
    Checkpoint,
    checkpoint_folder,
    checkpoint_steps,
    load_checkpoint,
    save_checkpoint,
)
from lowmem_drf.training.metrics import read_metrics
from lowmem_drf.types import Question

MOMENTS = {
    "before the first save": ("lowmem_drf.training.loop.save_checkpoint", 1),
    "between the files of the second save": ("safetensors.torch.save_file", 4),
    "before the rename of the second save": ("os.replace", 5),
    "in the rotation": ("shutil.rmtree", 1),
    "between an update and its line": ("lowmem_drf.training.metrics.Metrics.write", 3),
    "in the last save": ("os.fsync", 25),
}
"""Moment of death -> the function in whose n-th call the process kills itself."""


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


@pytest.mark.parametrize("name", ["lora.safetensors", "state.safetensors", "cursor.json"])
def test_damage_is_named_with_its_cure(checkpoint, tmp_path, name):
    folder = save_checkpoint(tmp_path, checkpoint, 1.0, keep=3)
    (folder / name).write_bytes((folder / name).read_bytes()[:20])
    with pytest.raises(LowmemError, match="is damaged.*Delete the folder"):
        load_checkpoint(folder)


def test_the_cursor_is_plain_json(tiny_run):
    row = json.loads((checkpoint_folder(tiny_run) / "cursor.json").read_text())
    assert {"step", "epoch", "index", "prompts", "spread", "skipped"} == set(row)
    assert (row["step"], row["index"]) == (4, 12)
