"""Bad input to every command is refused with a cure, also in surroundings that are odd."""

import os
import shlex
import subprocess
import sys

import pytest
from _root import ROOT

from bench.bad_inputs.refusals import faults
from bench.bad_inputs.rows import ROWS

COMMAND = [sys.executable, "-m", "lowmem_drf"]


@pytest.mark.slow  # 30 s on one core
def test_every_row_of_the_table_is_refused_as_it_should_be():
    assert len(ROWS) >= 120
    assert len(set(ROWS)) == len(ROWS)
    done = subprocess.run([sys.executable, "-m", "bench.bad_inputs"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow  # a process each
@pytest.mark.parametrize(
    "surroundings",
    [
        {"TERM": "dumb"},
        {"TERM": "", "NO_COLOR": "1"},
        {"COLUMNS": "20"},
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONOPTIMIZE": "1"},
    ],
    ids=str,
)
def test_errors_keep_their_form_in_odd_surroundings(surroundings, tmp_path):
    folder = tmp_path / "a folder 红"
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **surroundings}
    done = subprocess.run([*COMMAND, "presets", "show", "红"], capture_output=True, cwd=folder, env=environment)
    text = done.stderr.decode("ascii" if "PYTHONIOENCODING" in surroundings else "utf-8")
    assert faults(done.returncode, text, "or give a path to a TOML file") == []
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_errors_are_said_with_closed_streams():
    for closed, said in ((">&-", "Did you mean toy?"), ("2>&-", ""), (">&- 2>&-", "")):
        done = subprocess.run(
            ["sh", "-c", f"{shlex.join(COMMAND)} presets show toi {closed}"], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
