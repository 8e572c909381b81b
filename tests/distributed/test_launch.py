"""The launcher: each process knows its rank, the user reads one message, and no process is left running."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from _ranks import ADVICE
from _root import ROOT
from typer.testing import CliRunner

from lowmem_drf import cli
from lowmem_drf.distributed import launch as module
from lowmem_drf.distributed.launch import fail, failing_together, launch
from lowmem_drf.distributed.ranks import OURS
from lowmem_drf.errors import BadInputError, NonFiniteError

WORKER = [sys.executable, str(Path(__file__).with_name("_ranks.py"))]
KILLED = "Error: rank 1 died with SIGKILL (out of host memory? see dmesg). The run was stopped."
RANK = "import os, sys, time\nrank = int(os.environ['RANK'])\n"
HANGS = "time.sleep(60)\n"
WITHIN_S = 30.0
"""Time limit for the other processes to end."""


@pytest.fixture
def run(capfd):
    """Runs a Python program in ``count`` processes; returns (exit code, stdout, stderr)."""

    def run(text, count=2, arguments=()):
        code = launch(count, [sys.executable, "-I", "-c", RANK + text, *arguments], lambda: ADVICE)
        return code, *capfd.readouterr()

    return run


class Driver:
    """A process that launches others, as ``train --num-processes 2`` does; a new process group, as on a terminal."""

    def __init__(self, work, folder, count=2):
        self._said = folder / "out", folder / "err"
        self._process = multiprocessing.get_context("fork").Process(target=self._run, args=(work, folder, count))
        self._process.start()
        self.pid = self._process.pid

    def _run(self, work, folder, count):
        os.setsid()
        for number, path in enumerate(self._said, start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        sys.stderr = open(2, "w")  # noqa: SIM115
        code = launch(count, [*WORKER, work, str(folder)], lambda: ADVICE)
        sys.stderr.flush()
        os._exit(code)

    def ended(self):
        """(exit code, stdout, stderr)"""
        self._process.join(60)
        return self._process.exitcode, *(path.read_text() for path in self._said)


def until_there(*files):
    until = time.monotonic() + 120
    while not all(file.exists() and (file.stat().st_size or "ready" in file.name) for file in files):
        assert time.monotonic() < until, "the processes did not start"
        time.sleep(0.01)


def alive(pid):
    """False for zombies too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_every_process_knows_its_place(run, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(7)))
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS", "MASTER_PORT")
    text = "import json\nplace = [os.environ[name] for name in sys.argv[2:]]\n"
    text += "open(sys.argv[1] + str(rank), 'w').write(json.dumps(place))\n"
    text += "print('rank', rank)\nprint(rank, file=sys.stderr)\n"
    assert run(text, 3, [str(tmp_path / "rank"), *names]) == (0, "rank 0\n", "0\n")
    places = [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in range(3)]
    assert [place[:-1] for place in places] == [[str(rank), str(rank), "3", "3", "127.0.0.1", "2"] for rank in range(3)]
    assert len({place[-1] for place in places}) == 1


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("if rank: import nonesuch", 1, "Error: rank 1 died with exit code 1. The run was stopped."),
        ("if not rank: os._exit(3)", 3, "Error: rank 0 died with exit code 3. The run was stopped."),
        ("if rank: os.kill(os.getpid(), 9)", 1, KILLED),
        ("if not rank: os.abort()", 1, "Error: rank 0 died with SIGABRT. The run was stopped."),
    ],
    ids=["import", "exit", "killed", "aborts"],
)
def test_one_that_dies_ends_all_with_one_message(run, text, code, said):
    started = time.monotonic()
    got, out, err = run(f"{text}\n{HANGS}")
    assert (got, out) == (code, "")
    first, advice, *rest = err.splitlines()
    assert (first, advice) == (said, ADVICE)
    if "import" in text:
        assert rest[0].startswith("Traceback") and rest[-1] == "ModuleNotFoundError: No module named 'nonesuch'"
    else:
        assert rest == []
    assert time.monotonic() - started < WITHIN_S


@pytest.mark.parametrize(
    ("work", "code", "said"),
    [
        ("second_fails", 1, ["Error: rank 1: the reward is nan", ADVICE]),
        ("all_fail", 2, ["the prompts have changed", ADVICE]),
        ("second_is_killed_and_the_first_is_in_a_collective", 1, [KILLED, ADVICE]),
    ],
)
def test_one_that_fails_ends_all_with_its_message(capfd, tmp_path, work, code, said):
    assert launch(2, [*WORKER, work, str(tmp_path)], lambda: ADVICE) == code
    out, err = capfd.readouterr()
    lines = err.splitlines()
    if work == "all_fail":  # either may be seen first
        assert lines[0] in ("Error: the prompts have changed", "Error: rank 1: the prompts have changed")
        lines[0] = said[0]
    assert (out, lines) == ("", said)


@pytest.fixture
def ends(monkeypatch, capfd, tmp_path):
    """Ends process ``rank`` with an error: (exit code, stderr, message for our launcher)."""

    def ends(error, rank, ours=True, argv=()):
        report = tmp_path / "error.json"
        report.unlink(missing_ok=True)
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(report))
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", OURS["TORCHELASTIC_RUN_ID"] if ours else "none")
        monkeypatch.setattr(sys, "argv", ["lowmem-drf", *argv])
        monkeypatch.setattr(os, "_exit", sys.exit)
        with pytest.raises(SystemExit) as ended:
            fail(error, lambda: ADVICE)
        message = json.loads(report.read_text())["message"] if report.exists() else ""
        return ended.value.code, capfd.readouterr().err, message

    return ends


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (NonFiniteError("the reward is nan"), 1, f"the reward is nan\n{ADVICE}\n"),
        (BadInputError("the prompts have changed"), 2, f"the prompts have changed\n{ADVICE}\n"),
        (
            KeyError("lost"),
            1,
            f"unexpected KeyError: 'lost'\nRun the same command with --debug to see where.\n{ADVICE}\n",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_a_failure_is_said_once(ends, error, code, said):
    """By our launcher, or by the process itself under another launcher."""
    assert ends(error, rank=0) == (code, "", f"Error: {said}")
    assert ends(error, rank=1) == (code, "", f"Error: rank 1: {said}")
    assert ends(error, rank=0, ours=False) == (code, f"Error: {said}", "")
    assert ends(error, rank=1, ours=False) == (code, f"Error: rank 1: {said}", "")


def test_of_an_interruption_in_order_rank_0_speaks(ends):
    agreed = "Interrupted after update 3; it is saved."
    assert ends(KeyboardInterrupt(agreed), rank=0) == (130, "", f"{agreed}\n")
    assert ends(KeyboardInterrupt(agreed), rank=0, ours=False) == (130, f"{agreed}\n", "")
    assert ends(KeyboardInterrupt(agreed), rank=1, ours=False)[:2] == (0, "")
    assert ends(KeyboardInterrupt(agreed), rank=1)[:2] == (0, "")
    assert ends(KeyboardInterrupt(), rank=1) == (
        130,
        "",
        "Interrupted.\n",
    )  # before training the processes agree on nothing
    assert ends(KeyboardInterrupt(), rank=1, ours=False) == (130, "", "")


def test_what_may_be_the_death_of_another_waits_for_the_launcher(ends, monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    ends(RuntimeError("Connection closed by peer"), rank=0)
    assert slept == [module.SETTLE_S]
    ends(type("OutOfMemoryError", (RuntimeError,), {})("2 GiB"), rank=0)
    ends(ValueError("odd"), rank=0)
    assert slept == [module.SETTLE_S]


def test_debug_shows_where_a_process_failed(ends):
    def where():
        raise NonFiniteError("the reward is nan")

    with pytest.raises(NonFiniteError) as caught:
        where()
    first, *between, last, _ = ends(caught.value, rank=1, argv=["--debug"])[2].splitlines()
    assert (first, last) == ("Traceback (most recent call last):", "Error: rank 1: the reward is nan")
    assert any("in where" in line for line in between)


def test_an_advice_that_cannot_be_given_hides_nothing(ends, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ADVICE", property())
    code, _, message = ends(KeyError("lost"), rank=0)
    assert (code, message.splitlines()[0]) == (1, "Error: unexpected KeyError: 'lost'")


def test_without_a_launcher_errors_are_raised(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(KeyError, match="odd"), failing_together(lambda: ADVICE) as fails:
        fails(KeyError("returns"))
        raise KeyError("odd")


def test_ctrl_c_reaches_each_process_once_and_is_waited_for(tmp_path):
    driver = Driver("updates", tmp_path)
    until_there(tmp_path / "ready0", tmp_path / "ready1")
    os.killpg(driver.pid, signal.SIGINT)  # as a terminal does
    assert driver.ended() == (130, "", "Interrupted after update 3; it is saved.\n")
    assert [(tmp_path / f"got{rank}").read_text() for rank in (0, 1)] == ["1", "1"]


def test_a_session_that_ends_sends_several_signals_and_counts_once():
    with module._signals() as got:
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(number)
        assert got == [signal.SIGHUP]
        signal.raise_signal(signal.SIGINT)
        assert got == [signal.SIGHUP, signal.SIGINT]


def test_a_second_ctrl_c_ends_at_once_also_who_does_not_listen(tmp_path):
    driver = Driver("deaf", tmp_path)
    until_there(tmp_path / "ready0", tmp_path / "ready1")
    os.killpg(driver.pid, signal.SIGINT)
    time.sleep(0.3)
    assert alive(driver.pid)
    os.killpg(driver.pid, signal.SIGINT)
    assert driver.ended() == (130, "", f"Interrupted. {ADVICE}\n")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG is of Linux")
def test_processes_do_not_outlive_the_one_that_started_them(tmp_path):
    driver, file = Driver("stays", tmp_path, count=1), tmp_path / "pid0"
    until_there(file)
    os.kill(driver.pid, signal.SIGKILL)
    assert driver.ended()[0] == -signal.SIGKILL
    until = time.monotonic() + 10
    while time.monotonic() < until and alive(file.read_text()):
        time.sleep(0.01)
    assert not alive(file.read_text())


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_killed_rank_ends_the_run_under_other_launchers(launcher, tmp_path):
    """They print their report; a process that they end prints nothing."""
    if launcher == "deepspeed":
        pytest.importorskip("deepspeed", reason="an optional library")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    start = {
        "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port],
        "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", port],
    }[launcher]
    env = dict(os.environ, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    command = [sys.executable, *start, *WORKER[1:], "second_is_killed", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=120)
    assert done.returncode != 0
    lines = (done.stdout + done.stderr).splitlines()
    assert not [line for line in lines if line.startswith("Error: ") or ADVICE in line]


@pytest.mark.parametrize("option", ["--local_rank=1", "--local-rank=1"])
def test_what_launchers_add_to_the_command_is_taken(option):
    result = CliRunner().invoke(cli.app, [option, "presets", "list"])
    assert result.exit_code == 0
    assert "local" not in CliRunner().invoke(cli.app, ["--help"]).stdout


def test_a_run_has_at_least_one_process():
    result = CliRunner().invoke(cli.app, ["train", "--num-processes", "0"])
    assert result.exit_code == 2
    assert "--num-processes" in result.stderr
