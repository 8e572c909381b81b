"""Progress and Ctrl-C, once and twice, while a command works."""

import io
import json
import os
import signal
import time

import pytest
from _killed import run_cli
from rich.console import Console

from lowmem_drf.commands.train import train_command
from lowmem_drf.terminal import clock, showing, work_bar, working
from lowmem_drf.training.checkpoint import checkpoint_folder, checkpoint_steps
from lowmem_drf.training.metrics import read_metrics
from lowmem_drf.training.progress import ASCII_BARS, TrainProgress, sparkline


@pytest.fixture
def started(processes, tiny_preset, tmp_path):
    """Starts a training run in ``tmp_path/run``; returns its process and a function that waits until a file of its
    output holds a text."""
    made = []

    def start(options="", blocked=None, unread=False):
        words = ["train", "--preset", str(tiny_preset), "--output", str(tmp_path / "run"), *options.split()]
        made.append(processes.Process(target=run_cli, args=(words, tmp_path, blocked, unread)))
        made[0].start()
        return made[0], wait

    def wait(name, text):
        file = tmp_path / name
        while not (file.exists() and text in file.read_text()):
            assert made[0].is_alive(), (tmp_path / "err").read_text()
            time.sleep(0.02)

    yield start
    made[0].kill()


def test_ctrl_c_finishes_the_update_saves_and_exits_130(started, tmp_path):
    # checkpoints far apart: the one that is found was made because of the signal
    process, wait = started("--steps 10000 -s log.checkpoint_every=10000 -s log.sample_every=0")
    wait("out", "\nupdate")
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    err = (tmp_path / "err").read_text()
    assert "Interrupted after update" in err and "Traceback" not in err
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    step = json.loads((folder / "manifest.json").read_text())["step"]
    assert step == read_metrics(tmp_path / "run")[-1]["step"]


def test_a_closed_session_whose_output_nobody_reads_loses_no_update(started, tmp_path):
    """As Ctrl-C under ``| tee log``, or a lost SSH connection: the pipe breaks, and several signals come."""
    process, wait = started("--steps 10000 -s log.checkpoint_every=10000 -s log.sample_every=0", unread=True)
    wait("run/metrics.jsonl", "\n")
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
        os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 130
    assert checkpoint_steps(tmp_path / "run") == [read_metrics(tmp_path / "run")[-1]["step"]]


def test_a_line_is_printed_after_its_update_was_saved(tiny_preset, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(TrainProgress, "update", lambda self, report: saved.append(checkpoint_steps(tmp_path / "run")))
    train_command(str(tiny_preset), None, tmp_path / "run", 2, None, False, ["log.sample_every=0"], False)
    assert saved == [[1], [1, 2]]


def test_a_second_ctrl_c_stops_at_once_and_costs_nothing_that_is_saved(started, tiny_run, tmp_path):
    process, wait = started(blocked=2)
    run, said = tmp_path / "run", "Finishing this update, then saving. Press Ctrl-C again to stop at once.\n"
    wait("out", "blocked\n")
    os.kill(process.pid, signal.SIGINT)
    wait("err", said)
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 130
    cure = f"Go on with: lowmem-drf train --resume --output {run}"
    told = f"{said}Stopped at once; update 2 is the last one saved. {cure}\n"
    assert (tmp_path / "err").read_text().endswith(told)  # after transformers' bars of loading
    train_command(None, None, run, None, None, True, [], False)
    lora, expected = (checkpoint_folder(r) / "lora.safetensors" for r in (run, tiny_run))
    assert lora.read_bytes() == expected.read_bytes()


def test_ctrl_c_while_base_and_tuned_are_compared_says_that_all_is_saved(tiny_preset, tmp_path, monkeypatch):
    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr("lowmem_drf.scoring.evaluate.compare", interrupted)
    with pytest.raises(KeyboardInterrupt, match="all of it is saved. To compare base and tuned: lowmem-drf eval"):
        train_command(str(tiny_preset), None, tmp_path / "run", 1, None, False, ["log.eval_prompts=1"], False)
    assert checkpoint_folder(tmp_path / "run").name == "step-000001"


@pytest.mark.parametrize(
    ("steps", "said"),
    [(4, "after update 1; it is saved. Go on with"), (1, "after update 1; it is saved. The run is complete.")],
)
def test_ctrl_c_while_samples_are_written_saves_too(tiny_preset, tmp_path, monkeypatch, steps, said):
    seen = []

    def interrupted(config, run, models, texts, step, ranks):
        seen.append(step)
        if step:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("lowmem_drf.training.loop.write_previews", interrupted)
    overrides = ["log.sample_every=1", "log.checkpoint_every=100", f"log.sample_first={json.dumps(steps > 1)}"]
    with pytest.raises(KeyboardInterrupt, match=said):
        train_command(str(tiny_preset), None, tmp_path / "run", steps, None, False, overrides, False)
    assert checkpoint_folder(tmp_path / "run").name == "step-000001"
    assert seen == ([0, 1] if steps > 1 else [1])


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
    monkeypatch.setattr("lowmem_drf.terminal.PLAIN_WORK_FIRST_S", 0.0)
    monkeypatch.setattr("lowmem_drf.terminal.PLAIN_WORK_EVERY_S", 0.01)
    log = Console(file=io.StringIO())

    def until(said):
        while said not in log.file.getvalue():
            time.sleep(0.001)

    with work_bar(log, "clips", 4) as advance, showing(log), working("tensors", 9):
        until("clips 0/4\n")  # also while the first one takes long
        advance(2)
        until("clips 2/4  ETA 0:00\n")
        advance(2)
    with showing(log), working("tensors", 9) as advance, working("in them", 5):
        advance(1)
        until("tensors 1/9  ETA 0:00\n")
    said = log.file.getvalue()
    assert "4/4" not in said and "in them" not in said


def test_progress_words():
    assert sparkline([0.0, 1.0], 4, ASCII_BARS) == "_#  "
    assert (clock(75), clock(3700)) == ("1:15", "1:01:40")
    assert sparkline([0.0, 1.0], 4) == "▁█  "
    assert len(sparkline([float(i) for i in range(101)], 30)) == 30
