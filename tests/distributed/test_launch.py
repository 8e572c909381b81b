"""Starting the processes of a run: each knows its place, the user reads one message, and nothing is left running."""

import json
import os
import signal
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
from lowmem_drf.distributed.launch import launch

HERE = ROOT / "tests" / "support"
DIED = "Error: rank 1 died without a word (killed, or out of host memory: see dmesg). The run was stopped."
RANK = "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n"
HANGS = "time.sleep(60)\n"


@pytest.fixture
def run(monkeypatch, capfd):
    """Runs a Python text in processes of their own; returns (exit code, stdout, stderr)."""
    monkeypatch.setattr(module, "LEAVE_S", 0.3)
    monkeypatch.setattr(module, "TERM_S", 0.3)

    def run(text, count=2, arguments=()):
        code = launch(count, arguments, [sys.executable, "-I", "-c", RANK + text])
        return code, *capfd.readouterr()

    return run


def driver(*program):
    """A process that launches two, as ``train --num-processes 2`` is one; a group of its own, as on a terminal."""
    code = f"import sys\nfrom lowmem_drf.distributed.launch import launch\nsys.exit(launch(2, [], {list(program)}))"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )


def alive(pid):
    """Not counting what nobody has asked for its exit code yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_every_process_knows_its_place(run, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(module, "_cores", lambda: 7)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS", "MASTER_PORT")
    text = f"import json\nopen(sys.argv[1] + str(rank), 'w').write(json.dumps([os.environ[name] for name in {names}]))\nprint('rank', rank)\n"
    assert run(text, 3, [str(tmp_path / "rank")]) == (0, "rank 0\n", "")
    places = [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in range(3)]
    assert [place[:-1] for place in places] == [[str(rank), str(rank), "3", "3", "127.0.0.1", "2"] for rank in range(3)]
    assert len({place[-1] for place in places}) == 1


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("print('all', file=sys.stderr)", 0, ["all"]),
        ("sys.exit(2 if rank else 0)", 2, ["Error: rank 1 ended with exit code 2. The run was stopped."]),
        ("sys.exit(3 - rank)", 3, []),
        (
            f"print('why', file=sys.stderr)\nif rank: sys.exit(2)\n{HANGS}",
            2,
            ["why", "Error: rank 1 ended with exit code 2. The run was stopped.", "why"],
        ),
        (
            f"if rank: import nonesuch\n{HANGS}",
            1,
            ["Error: rank 1 ended with exit code 1. The run was stopped.", "Traceback (most recent call last):"],
        ),
        (
            f"if rank: os.kill(os.getpid(), 9)\n{HANGS}",
            1,
            ["Error: rank 1 was killed by SIGKILL (out of host memory? see dmesg). The run was stopped."],
        ),
        (
            f"if not rank: os.abort()\n{HANGS}",
            1,
            ["Error: rank 0 was killed by SIGABRT (out of host memory? see dmesg). The run was stopped."],
        ),
        (
            "if not rank: os.kill(os.getpid(), 9)\nprint('a warning\\nError: rank 0 died\\nGo on', file=sys.stderr)\nsys.exit(1)",
            1,
            ["Error: rank 0 died", "Go on"],
        ),
        (
            f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\nif rank: sys.exit(2)\n{HANGS}",
            2,
            ["Error: rank 1 ended with exit code 2. The run was stopped."],
        ),
    ],
    ids=["well", "second", "first", "second-with-words", "import", "killed", "first-aborts", "second-speaks", "deaf"],
)
def test_one_that_ends_badly_ends_all_with_one_message(run, text, code, said):
    started = time.monotonic()
    got, out, err = run(text)
    assert (got, out, err.splitlines()[: len(said)]) == (code, "", said)
    assert len(err.splitlines()) == len(said) or "nonesuch" in err.splitlines()[-1]
    assert time.monotonic() - started < 30


def test_ctrl_c_reaches_each_process_once(tmp_path):
    counts = "got = []\nsignal.signal(signal.SIGINT, lambda *_: got.append(1))\nprint('ready', flush=True)\n"
    counts += f"open({str(tmp_path / 'ready')!r} + str(rank), 'w').close()\n"
    counts += "until = time.monotonic() + 1\nwhile time.monotonic() < until: time.sleep(0.05)\n"
    counts += f"open({str(tmp_path / 'rank')!r} + str(rank), 'w').write(str(len(got)))\n"
    process = driver(sys.executable, "-I", "-c", RANK + counts + "sys.exit(130)")
    assert process.stdout.readline() == "ready\n"
    while not (tmp_path / "ready1").exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "")
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == ["1", "1"]


def test_two_signals_end_also_who_does_not_listen(tmp_path):
    deaf = "signal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('ready', flush=True)\n" + HANGS
    start = "import sys\nfrom lowmem_drf.distributed import launch\n"
    code = start + f"launch.LEAVE_S = 0.3\nsys.exit(launch.launch(1, [], {[sys.executable, '-I', '-c', RANK + deaf]}))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG is of Linux")
def test_processes_do_not_outlive_the_one_that_started_them(tmp_path):
    process = driver(
        sys.executable,
        "-I",
        "-c",
        f"{RANK}open({str(tmp_path / 'pid')!r} + str(rank), 'w').write(str(os.getpid()))\nprint('ready', flush=True)\n{HANGS}",
    )
    files = [tmp_path / "pid0", tmp_path / "pid1"]
    while not all(file.exists() and file.read_text() for file in files):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    until = time.monotonic() + 10
    while time.monotonic() < until and any(alive(file.read_text()) for file in files):
        time.sleep(0.01)
    assert not any(alive(file.read_text()) for file in files)


def test_launching_loads_no_torch():
    code = "import sys, lowmem_drf.distributed.launch, lowmem_drf.distributed.ranks, lowmem_drf.distributed.watch; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize("launcher", ["ours", "torchrun", "deepspeed"])
def test_a_killed_rank_ends_the_run_under_every_launcher(launcher):
    """One message of ours; torchrun and deepspeed add their own report."""
    worker = [str(HERE / "_ranks.py"), "second_is_killed"]
    if launcher == "ours":
        process = driver(sys.executable, *worker)
    else:
        if launcher == "deepspeed":
            pytest.importorskip("deepspeed", reason="an optional library")
        start = {
            "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", "2"],
            "deepspeed": [
                "-m",
                "deepspeed.launcher.runner",
                "--num_accelerators",
                "2",
                "--master_port",
                str(module._free_port()),
            ],
        }[launcher]
        env = dict(os.environ, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
        process = subprocess.Popen(
            [sys.executable, *start, *worker],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=env,
        )
    _, err = process.communicate(timeout=100)
    assert process.returncode not in (0, None)
    said = err.splitlines()
    assert said.count(DIED) == 1, err
    assert said[said.index(DIED) + 1] == ADVICE
    if launcher == "ours":
        assert (process.returncode, said) == (1, [DIED, ADVICE])


@pytest.mark.parametrize("option", ["--local_rank=1", "--local-rank=1"])
def test_what_launchers_add_to_the_command_is_taken(option):
    result = CliRunner().invoke(cli.app, [option, "presets", "list"])
    assert result.exit_code == 0
    assert "local" not in CliRunner().invoke(cli.app, ["--help"]).stdout


def test_a_run_has_at_least_one_process():
    result = CliRunner().invoke(cli.app, ["train", "--num-processes", "0"])
    assert result.exit_code == 2
    assert "--num-processes" in result.stderr
