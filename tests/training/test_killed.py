"""A run that is killed or interrupted at any moment, and resumed, is the unbroken run: weights, metrics, checkpoints.

Each run is forked from this process, which has imported everything.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from lowmem_drf.__main__ import main
from lowmem_drf.commands.train import train_command
from lowmem_drf.training import loop
from lowmem_drf.training.checkpoint import checkpoint_folder, checkpoint_steps
from lowmem_drf.training.metrics import read_metrics

PRESET = """
extends = "{tiny}"
batch = 1
micro_batch = 1
video.frames = 5
sampler.steps = 2
sampler.graded_steps = 1
critic.frames = 1
log.sample_every = 0
"""
OPERATIONS = ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(scope="module")
def preset(tiny_preset, tmp_path_factory):
    file = tmp_path_factory.mktemp("preset") / "small.toml"
    file.write_text(PRESET.format(tiny=tiny_preset.as_posix()), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def unbroken(preset, tmp_path_factory):
    """The folder of a run, and the seconds that one in a process of its own takes."""
    return _unbroken(preset, tmp_path_factory.mktemp("unbroken"), 4)


@pytest.fixture(scope="module")
def long(preset, tmp_path_factory):
    """The same of a run that spends half of its time in updates."""
    return _unbroken(preset, tmp_path_factory.mktemp("long"), 12)


def _unbroken(preset, folder, steps):
    train_command(str(preset), None, folder / "run", steps, None, False, [], False)
    start = time.monotonic()
    _end(_started(preset, folder / "forked", options=["--steps", str(steps)]))
    return folder / "run", time.monotonic() - start


@pytest.mark.slow
def test_killed_at_every_operation_of_a_save(preset, unbroken, tmp_path):
    """The third save also deletes the first."""
    seen = tmp_path / "operations"
    _end(_started(preset, tmp_path / "watched", seen=seen))
    operations = seen.read_text().split()
    assert {"fsync", "replace", "unlink", "rmdir", "mkdir"} <= set(operations) and len(operations) > 12
    for number in range(len(operations)):
        folder = tmp_path / str(number)
        assert _end(_started(preset, folder, fatal=number)) == -signal.SIGKILL
        _resumes(folder / "run", preset, unbroken[0])


@pytest.mark.slow
def test_killed_at_random_moments(preset, unbroken, tmp_path):
    dice = random.Random(1)
    for number in range(10):
        folder = tmp_path / str(number)
        _killed_after(dice.uniform(0, unbroken[1]), signal.SIGKILL, _started(preset, folder, tee=number % 2 == 1))
        _resumes(folder / "run", preset, unbroken[0])


@pytest.mark.slow
@pytest.mark.parametrize("tee", [False, True], ids=["alone", "with tee"])
def test_interrupted_at_random_moments_no_finished_update_is_lost(tee, preset, long, tmp_path):
    """Checkpoints are far apart: what is saved was saved because of the signal."""
    dice = random.Random(2)
    saved = []
    for number in range(10):
        folder, sent = tmp_path / str(number), SIGNALS[number % 3]
        started = _started(preset, folder, tee, options=["--steps", "12", "-s", "log.checkpoint_every=99"])
        assert _killed_after(dice.uniform(0, long[1]), sent, started) in (130, 0, -sent)
        run = folder / "run"
        finished = len(read_metrics(run)) if (run / "metrics.jsonl").exists() else 0
        saved.append(max(checkpoint_steps(run), default=0))
        assert saved[-1] == finished
        _resumes(run, preset, long[0], ["steps=12", "log.checkpoint_every=1"])
    assert set(saved) & set(range(1, 12))


def _started(preset, folder, tee=False, seen=None, fatal=None, options=()):
    """Forks a training run, in a process group of its own, which ``tee`` leads where the output goes there. Returns its
    process id and that of the group.

    Args:
        seen: a file for the names of the ``OPERATIONS`` of the third save.
        fatal: number of the operation before which the group is killed.
    """
    folder.mkdir(exist_ok=True)
    log = folder / "log"
    reader = subprocess.Popen(["tee", log], stdin=-1, stdout=subprocess.DEVNULL, process_group=0) if tee else None
    group = reader.pid if reader else 0
    if child := os.fork():
        with suppress(OSError):  # the child has done so itself
            os.setpgid(child, group)
        if reader:
            reader.stdin.close()
            reader.returncode = 0  # it ends when its input does, or with the group
        return child, group or child
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.setpgid(0, group)
        output = reader.stdin.fileno() if reader else os.open(log, os.O_WRONLY | os.O_CREAT)
        for handle in (1, 2):
            os.dup2(output, handle)
        sys.stdout, sys.stderr = (os.fdopen(handle, "w", buffering=1, closefd=False) for handle in (1, 2))
        _watch_third_save(seen, fatal)
        sys.argv = ["lowmem-drf", "train", "--preset", str(preset), "--output", str(folder / "run"), *options]
        main()
        code = 0
    except SystemExit as error:
        code = error.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def _watch_third_save(seen, fatal):
    count, saves, save_checkpoint = -1, 0, loop.save_checkpoint
    inside = False

    def watched(name, original):
        def operation(*args, **kwargs):
            nonlocal count
            if inside:
                count += 1
                if count == fatal:
                    os.killpg(0, signal.SIGKILL)
                if seen is not None:
                    with seen.open("a") as file:
                        file.write(f"{name}\n")
            return original(*args, **kwargs)

        return operation

    def save(*args, **kwargs):
        nonlocal saves, inside
        saves += 1
        inside = saves == 3
        folder = save_checkpoint(*args, **kwargs)
        inside = False
        return folder

    loop.save_checkpoint = save
    for name in OPERATIONS:
        setattr(os, name, watched(name, getattr(os, name)))


def _killed_after(seconds, number, started):
    time.sleep(seconds)
    with suppress(ProcessLookupError):
        os.killpg(started[1], number)
    return _end(started)


def _end(started):
    """The exit code of a process, negative if a signal ended it."""
    process, group = started
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.killpg(group, signal.SIGKILL)
    raise AssertionError("the run did not end")


def _resumes(run, preset, unbroken, overrides=()):
    """Goes on with a run, as its user would, and compares it with an unbroken one."""
    complete = max(checkpoint_steps(run), default=0) == max(checkpoint_steps(unbroken))
    if (run / "config.toml").exists():
        if not complete:
            train_command(None, None, run, None, None, True, list(overrides), False)
    else:
        train_command(str(preset), None, run, None, None, False, list(overrides), False)
    ours, theirs = ((checkpoint_folder(r) / "lora.safetensors").read_bytes() for r in (run, unbroken))
    assert ours == theirs
    timed = ("update_s", "stage_s", "stage_peak_gib")
    ours, theirs = (
        [{k: v for k, v in row.items() if k not in timed} for row in read_metrics(r)] for r in (run, unbroken)
    )
    assert ours == theirs
    left, kept = (set(os.listdir(r / "checkpoints")) for r in (run, unbroken))
    # killed while its last save deleted an older checkpoint, a run is complete, and nothing deletes it later
    assert left == kept or overrides or (complete and kept < left)
    shutil.rmtree(run)
