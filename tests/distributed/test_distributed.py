"""ToyWorld trained by two processes under ZeRO-3 with CPU offload: files, Ctrl-C, a killed process, resuming."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import pytest
import torch
from _processes import trained
from _root import ROOT
from safetensors.torch import load_file

from lowmem_drf.commands.train import start, train_command
from lowmem_drf.config import load_config
from lowmem_drf.distributed.ranks import Ranks
from lowmem_drf.errors import BadInputError
from lowmem_drf.toy.captions import train_prompts
from lowmem_drf.training.checkpoint import checkpoint_steps
from lowmem_drf.training.manifest import read_manifest
from lowmem_drf.training.metrics import read_metrics

SETTINGS = [
    *("video.frames=5", "critic.frames=2", "steps=4", "batch=2", "micro_batch=1"),
    *("sampler.steps=2", "sampler.graded_steps=1", "critic.normalize=true", "optim.schedule=constant"),
    *("log.checkpoint_every=1", "log.keep=10", "log.sample_every=4", "log.sample_prompts=3", "log.eval_prompts=3"),
]
ZERO = ["engine=zero3", "processes=2"]
QUICKLY = ["log.sample_every=0", "log.eval_prompts=0", "log.watch_every=0"]
WITHIN_S = 30.0


def command_line(*words, settings=()):
    """``lowmem-drf train`` in a new process."""
    options = [word for text in settings for word in ("-s", text)]
    command = [sys.executable, "-m", "lowmem_drf", "train", *map(str, words), *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(train_prompts()[:6]), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def one(prompts, tmp_path_factory):
    """A run of one process."""
    before, run = torch.get_num_threads(), tmp_path_factory.mktemp("one") / "run"
    torch.set_num_threads(1)
    train_command("toy", prompts, run, None, None, False, SETTINGS, False)
    torch.set_num_threads(before)
    return run


@pytest.fixture(scope="module")
def two(prompts, pair, tmp_path_factory):
    """The same run by two processes, and the output of each."""
    run = tmp_path_factory.mktemp("two") / "run"
    return run, pair(trained, prompts, run, [*SETTINGS, *ZERO])


def files(run):
    return sorted(
        str(path.relative_to(run)) for path in run.rglob("*") if path.is_file() and path.parent.name != "tensorboard"
    )


def test_the_files_are_those_of_one_process(one, two):
    run, _ = two
    assert files(run) == files(one)
    assert len(list((run / "tensorboard").iterdir())) == 1
    for ours, theirs in zip(read_metrics(run), read_metrics(one), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(ours[key] == theirs[key] for key in ("step", "prompts", "seed", "lr"))
        assert ours["reward_by_question"].keys() == theirs["reward_by_question"].keys()
    for step in checkpoint_steps(one):
        ours, theirs = (folder / "checkpoints" / f"step-{step:06d}" for folder in (run, one))
        for name in ("lora.safetensors", "state.safetensors"):
            assert _shapes(ours / name) == _shapes(theirs / name)
        assert _without_spread(ours) == _without_spread(theirs)
    assert (run / "questions.json").read_bytes() == (one / "questions.json").read_bytes()


def _shapes(file):
    return {name: (tensor.shape, tensor.dtype) for name, tensor in load_file(file).items()}


def _without_spread(folder):
    row = asdict(read_manifest(folder))
    return row | {"spread": sorted(row["spread"]), "files": sorted(row["files"])}


def test_the_samples_of_both_processes_are_written_under_their_own_names(one, two):
    """Before training, each clip is closest to the clip of the same name from one process."""
    from lowmem_drf.video import read_video

    ours, theirs = (
        {path.name: read_video(path)[0] for path in (run / "samples" / "step-000000").iterdir()}
        for run in (two[0], one)
    )
    assert len(ours) == 3
    for name, clip in ours.items():
        assert min(theirs, key=lambda other: (clip - theirs[other]).abs().mean()) == name


def test_one_process_talks(two):
    _, (out, silence) = two
    lines = [line.split(" ")[1] for line in out.splitlines() if line.startswith("update ")]
    assert lines == sorted(set(lines)) and lines[-1] == "4/4"
    assert "on cpu, fp32, 2 processes under DeepSpeed (zero3)\n" in out
    assert out.count("Next:") == 1
    assert out.count("oracle: color") == 1  # the table of the clips of both processes
    assert silence == ""


def at_update_2(run, copy):
    shutil.copytree(run, copy)
    for step in (3, 4):
        shutil.rmtree(copy / "checkpoints" / f"step-{step:06d}")
    return copy


def lora(run, step):
    return (run / "checkpoints" / f"step-{step:06d}" / "lora.safetensors").read_bytes()


def test_a_run_goes_on_with_one_process_and_then_with_two(two, pair, tmp_path):
    """test_zero.py tests that any number of processes loads the state exactly."""
    run = at_update_2(two[0], tmp_path / "run")
    train_command(None, None, run, 3, None, True, [*QUICKLY, "engine=single", "processes=1"], False)
    assert lora(run, 2) == lora(two[0], 2)
    pair(trained, None, run, [*QUICKLY, *ZERO, "steps=4"], True)
    assert checkpoint_steps(run) == [1, 2, 3, 4]
    for ours, theirs in zip(read_metrics(run), read_metrics(two[0]), strict=True):
        assert (ours["prompts"], ours["seed"]) == (theirs["prompts"], theirs["seed"])


def interrupted(ranks, prompts, run, overrides):
    """``train``, in which one process gets Ctrl-C at the start of the second update. Returns the final message."""
    from lowmem_drf.training import loop as train

    def update(config, models, parts, trainer, step, *rest):
        if step == 1 and not ranks.chief:
            os.kill(os.getpid(), signal.SIGINT)
        return original(config, models, parts, trainer, step, *rest)

    original = train.update
    config = load_config("toy", [*overrides, f"prompts={json.dumps(str(prompts))}"])
    with mock.patch.object(train, "update", update), pytest.raises(KeyboardInterrupt) as ended:
        start(config, run, False, "", ranks)
    return str(ended.value)


def test_ctrl_c_in_one_process_finishes_the_update_of_all_and_saves(prompts, two, pair, tmp_path):
    """test_launch.py tests that the launcher forwards Ctrl-C, waits, and prints the message once."""
    run = tmp_path / "run"
    said = pair(interrupted, prompts, run, [*SETTINGS, *ZERO, *QUICKLY, "steps=1000", "log.checkpoint_every=1000"])
    wanted = f"Interrupted after update 2; it is saved. Go on with: lowmem-drf train --resume --output {run}"
    assert said == [wanted] * 2
    assert checkpoint_steps(run) == [2]
    assert lora(run, 2) == lora(two[0], 2)


@pytest.mark.slow
def test_a_killed_process_ends_the_run_with_one_message_and_resumed_it_gives_the_bytes_of_the_unbroken_one(
    prompts, two, pair, tmp_path
):
    """From the command line."""
    run = tmp_path / "run"
    words = ("--preset", "toy", "--prompts", prompts, "--output", run, "--num-processes", 2)
    process = command_line(*words, settings=[*SETTINGS, "engine=zero3", *QUICKLY, "steps=1000"])
    while max(checkpoint_steps(run), default=0) < 2:  # an update is saved before its line is printed
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.kill(_rank(process.pid, 1), signal.SIGKILL)
    killed = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - killed < WITHIN_S
    assert process.returncode == 1
    saved = checkpoint_steps(run)[-1]
    assert err.splitlines() == [
        "Error: rank 1 died with SIGKILL (out of host memory? see dmesg). The run was stopped.",
        f"Update {saved} is saved. Go on with: lowmem-drf train --resume --output {run}",
    ]
    assert out.count("update 1/1000 ") == 1  # from rank 0 alone
    assert saved < 4
    pair(trained, None, run, ["steps=4"], True)
    assert lora(run, 4) == lora(two[0], 4)


def _rank(parent, rank):
    """The child process of this rank."""
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"there is no rank {rank}")


def test_fewer_prompts_than_processes_are_refused_by_all(tmp_path):
    (tmp_path / "prompts.txt").write_text(train_prompts()[0])
    config = load_config("toy", [*ZERO, f"prompts={json.dumps(str(tmp_path / 'prompts.txt'))}"])
    for rank in range(2):
        with pytest.raises(BadInputError, match="^there are 1 prompts for 2 processes"):
            start(config, tmp_path / "run", False, "", Ranks(rank, 2, rank, 2))
    assert not (tmp_path / "run").exists()


def test_a_dry_run_prints_what_deepspeed_is_told_and_the_plan_of_each_process(capfd):
    import tomllib

    settings = [*SETTINGS, "engine=zero3", "zero.critic=true"]
    train_command("toy", None, None, None, None, False, settings, True, num_processes=2)
    out, err = capfd.readouterr()
    assert tomllib.loads(out)["processes"] == 2
    told = "\n".join(line.removeprefix("# ") for line in out.splitlines() if line.startswith("# "))
    assert told.count('"stage": 3') == 2  # the transformer's engine and the critic's
    assert told.count('"offload_param"') == 2 and told.count('"offload_optimizer"') == 1
    assert "each of 2 processes" in err
