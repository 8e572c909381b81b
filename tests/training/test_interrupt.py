"""What a person sees and does while a command works: progress, Ctrl-C once and twice."""

import io
import json
import os
import signal
import subprocess
import sys

import pytest
from _root import ROOT
from rich.console import Console

from lowmem_drf.commands.train import train_command
from lowmem_drf.terminal import clock, work_bar
from lowmem_drf.training.checkpoint import checkpoint_folder
from lowmem_drf.training.metrics import read_metrics
from lowmem_drf.training.progress import TrainProgress, sparkline


def test_ctrl_c_finishes_the_update_saves_and_exits_130(tiny_preset, tmp_path):
    command = [
        sys.executable,
        "-m",
        "lowmem_drf.cli",
        "train",
        "--preset",
        str(tiny_preset),
        "--output",
        str(tmp_path / "run"),
        "--steps",
        "10000",
    ]
    # checkpoints far apart: the one that is found was made because of the signal
    command += ["-s", "log.checkpoint_every=10000", "-s", "log.sample_every=0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    for line in process.stdout:
        if line.startswith("update"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Interrupted after update" in err
    assert "Traceback" not in err
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    step = json.loads((folder / "cursor.json").read_text())["step"]
    assert step == read_metrics(tmp_path / "run")[-1]["step"]


def test_a_second_ctrl_c_stops_at_once_and_costs_nothing_that_is_saved(tiny_preset, tiny_run, tmp_path):
    run = tmp_path / "run"
    code = (
        "import sys, time\nfrom lowmem_drf import cli\nfrom lowmem_drf.training import loop as train\noriginal = train.update\n"
        "def update(config, models, parts, optimizer, step, *rest):\n"
        "    if step == 2:\n        print('blocked', flush=True)\n        time.sleep(60)\n"
        "    return original(config, models, parts, optimizer, step, *rest)\n"
        "train.update = update\nimport torch\ntorch.set_num_threads(1)\ncli.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "train", "--preset", str(tiny_preset), "--output", str(run)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert any(line == "blocked\n" for line in process.stdout)
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "Finishing this update, then saving. Press Ctrl-C again to stop at once.\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert (
        err
        == f"Stopped at once; update 2 is the last one saved. Go on with: lowmem-drf train --resume --output {run}\n"
    )
    train_command(None, None, run, None, None, True, [], False)
    assert (checkpoint_folder(run) / "lora.safetensors").read_bytes() == (
        checkpoint_folder(tiny_run) / "lora.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("steps", "said"),
    [(4, "after update 1; it is saved. Go on with"), (1, "after update 1; it is saved. The run is complete.")],
)
def test_ctrl_c_while_samples_are_written_saves_too(tiny_preset, tmp_path, monkeypatch, steps, said):
    def interrupted(config, run, models, texts, step, ranks):
        if step:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("lowmem_drf.training.loop.write_previews", interrupted)
    overrides = ["log.sample_every=1", "log.checkpoint_every=100"]
    with pytest.raises(KeyboardInterrupt, match=said):
        train_command(str(tiny_preset), None, tmp_path / "run", steps, None, False, overrides, False)
    assert checkpoint_folder(tmp_path / "run").name == "step-000001"


def test_a_notice_is_seen_on_a_terminal_and_in_a_log(capfd):
    text = "Finishing this update"
    screen = Console(file=io.StringIO(), force_terminal=True, width=100)
    progress = TrainProgress(screen, steps=3, done=0)
    with progress.live():
        progress.notice(text)
    assert text in screen.file.getvalue()
    assert text not in capfd.readouterr().err
    TrainProgress(Console(file=io.StringIO()), steps=3, done=0).notice(text)
    assert capfd.readouterr().err == f"{text}\n"


def test_clips_are_counted_in_a_log(monkeypatch):
    monkeypatch.setattr("lowmem_drf.terminal.PLAIN_WORK_EVERY_S", -1.0)
    log = Console(file=io.StringIO())
    with work_bar(log, "clips", 4) as advance:
        for _ in range(2):
            advance(2)
    assert log.file.getvalue().startswith("clips 2/4  ETA 0:0")
    assert len(log.file.getvalue().splitlines()) == 1


def test_progress_words():
    assert (clock(75), clock(3700)) == ("1:15", "1:01:40")
    assert sparkline([0.0, 1.0], 4) == "▁█  "
    assert len(sparkline([float(i) for i in range(101)], 30)) == 30
