"""Windows and WSL2, as far as Linux can show it: nothing of POSIX is needed, and what cannot run is refused."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from _root import ROOT
from test_cli import run_cli  # noqa: F401

from lowmem_drf import libraries
from lowmem_drf.distributed import ranks
from lowmem_drf.doctor import machine
from lowmem_drf.ops import why_no_triton
from lowmem_drf.terminal import hangup


@pytest.mark.slow
def test_a_run_needs_nothing_of_posix(tmp_path):
    few = ["-s", "log.watch_every=0", "-s", "log.eval_prompts=0", "-s", "log.sample_every=0"]
    commands = [
        ["train", "--preset", "toy", "--steps", "1", "--output", "a run", *few],
        ["train", "--resume", "--output", "a run", "--steps", "2"],
        ["sample", "--run", "a run", "--prompt", "a red circle moves left"],
        ["export-lora", "a run", "--output", "lora.safetensors"],
    ]
    command = [sys.executable, ROOT / "tests/commands/_no_posix.py", json.dumps(commands)]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, encoding="cp1252")
    assert done.returncode == 0, done.stderr
    assert "There are no locks on this system" in done.stdout, "the hiding works"
    rows = [json.loads(line) for line in (tmp_path / "a run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 2 and all(peak > 0 for row in rows for peak in row["stage_peak_gib"].values())
    assert (tmp_path / "lora.safetensors").is_file() and len(list((tmp_path / "a run/samples").rglob("*.mp4"))) == 1


def test_deepspeed_is_refused_before_any_work(run_cli, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setattr(ranks, "sys", SimpleNamespace(platform="win32"))
    code, out, err = run_cli("train --preset toy -s engine=zero1 -s processes=2")
    assert (code, out) == (2, "") and "engine=single" in err and len(err.splitlines()) <= 6
    assert not (tmp_path / "runs").exists()


def test_triton_has_another_name_on_windows(monkeypatch):
    monkeypatch.setattr(libraries.sys, "platform", "win32")
    monkeypatch.setattr(libraries.platform, "machine", lambda: "AMD64")
    found = {package.module: package for package in libraries.requirements()[1]}
    assert found["triton"].distribution == "triton-windows"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(libraries, "installed", lambda package: None)
    assert 'pip install "triton-windows>=3.6,<3.8"' in why_no_triton(SimpleNamespace(type="cuda"))


def test_ctrl_break_of_windows_is_an_interrupt(monkeypatch):
    import signal

    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)
    assert signal.SIGUSR1 in hangup()


def test_doctor_knows_the_traps_of_windows_and_wsl2(monkeypatch):
    monkeypatch.setattr(machine.platform, "release", lambda: "6.6.87.2-microsoft-standard-WSL2")
    monkeypatch.setattr(machine.Path, "cwd", lambda: machine.Path("/mnt/c/runs"))
    said = {check.name: check for check in machine.host()}
    assert ".wslconfig" in said["WSL2"].cure and "sysmem fallback" in said["WSL2"].cure
    assert said["WSL2's disk"].status == "warning"
    monkeypatch.setattr(machine.platform, "release", lambda: "11")
    monkeypatch.setattr(machine, "sys", SimpleNamespace(platform="win32"))
    assert "sysmem fallback" in {check.name: check for check in machine.host()}["Windows"].cure


def test_a_user_without_a_home_has_a_cache(monkeypatch, tmp_path):
    from lowmem_drf.assembly.cache import cache_folder

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("LOWMEM_DRF_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pathlib.Path.home", no_home)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert cache_folder() == tmp_path / "lowmem-drf"
