"""Printing stops nothing, whatever stdout and stderr are, and commands the terminal to nothing."""

import errno
import io
import json
import os
import signal
import subprocess
import sys

import pytest
from _root import ROOT
from rich.table import Table

from lowmem_drf.terminal import can_redraw, hangup, lost_output, make_console, printable, quiet_streams, write_error


class Failing(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def flush(self):
        if self.error:
            raise self.error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), ""),
        (OSError(errno.EIO, "Input/output error"), ""),  # the terminal was closed
        (OSError(errno.ENOSPC, "No space left on device"), "[Errno 28] No space left on device"),
        (ValueError("I/O operation on closed file"), "I/O operation on closed file"),
    ],
    ids=["pipe", "terminal", "disk", "closed"],
)
def test_what_cannot_be_printed_is_dropped_and_the_rest_is_not(monkeypatch, error, said):
    log = Failing(error)
    monkeypatch.setattr(sys, "stdout", log)
    with quiet_streams():
        print("first", flush=True)
        make_console().print("second")
        assert lost_output() == said
        log.error = None
        print("third", flush=True)
    assert log.getvalue() == "first\nsecond\nthird\n" and sys.stdout is log


def test_no_file_gets_the_number_of_a_closed_handle(tmp_path):
    program = (
        "import sys\nfrom lowmem_drf.terminal import quiet_streams\nwith quiet_streams():\n"
        "    print('nowhere', file=sys.stderr, flush=True)\n    file = open(sys.argv[1], 'w')\n"
        "    file.write(str(file.fileno()))\n"
    )
    shell, file = '"$0" -c "$1" "$2" <&- >&- 2>&-', tmp_path / "handle"
    subprocess.run(["sh", "-c", shell, sys.executable, program, str(file)], cwd=ROOT, check=True)
    assert int(file.read_text()) > 2


def test_json_stays_json_where_the_terminal_has_ascii_alone(monkeypatch):
    out, said = io.BytesIO(), ["é 🎬 中", "\udcff"]
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
    with quiet_streams():
        print(json.dumps(said, ensure_ascii=False))
    assert json.loads(out.getvalue()) == said


@pytest.mark.parametrize("text", ["\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "a\rb", "\x7f"])
def test_control_characters_do_not_reach_the_terminal(text):
    screen = make_console(file=io.StringIO(), force_terminal=True, width=100)
    table = Table(text)
    table.add_row(text)
    screen.print(text, table, style="red", markup=False)
    assert "\x1b[31m" in screen.file.getvalue(), "rich's own are there"
    assert text not in screen.file.getvalue() and text not in printable(text)
    assert printable("two\n\tlines") == "two\n\tlines"


def test_a_narrow_terminal_shows_every_figure(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    screen = make_console(file=io.StringIO(), force_terminal=True)
    table = Table("reward, questions not trained on", "base", "tuned")
    table.add_row("velocity norm", "-3.6234", "-3.5987")
    screen.print(table)
    assert "-3.6234" in screen.file.getvalue() and "-3.5987" in screen.file.getvalue()
    assert not can_redraw(screen)


def test_a_dumb_terminal_gets_lines(monkeypatch):
    for term, redraws in (("xterm", True), ("dumb", False)):
        monkeypatch.setenv("TERM", term)
        assert can_redraw(make_console(file=io.StringIO(), force_terminal=True, width=80)) == redraws


def test_a_signal_handler_writes_or_does_not(monkeypatch, capfd):
    write_error("é")
    assert capfd.readouterr().err == "é\n"
    for stream in (None, io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        write_error("nobody reads it")


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="a closed session sends no signal there")
def test_nohup_is_respected():
    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler, expected in ((signal.SIG_DFL, [signal.SIGHUP]), (signal.SIG_IGN, [])):
            signal.signal(signal.SIGHUP, handler)
            assert hangup() == expected
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("shell", "code", "said"),
    [
        ('"$0" -m lowmem_drf presets show toy > /dev/full', 1, "The output is not complete: [Errno 28] No space left"),
        ('"$0" -m lowmem_drf presets show toy >&-', 0, ""),
        ('("$0" -m lowmem_drf presets show toy; echo $? >&2) | true', 0, "0\n"),
        ('"$0" -OO -m lowmem_drf plan --preset toy', 2, "Error: Python leaves docstrings out (-OO"),
    ],
    ids=["full", "closed", "pipe", "OO"],
)
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux's")
def test_a_command_ends_as_it_should_whoever_reads(shell, code, said):
    done = subprocess.run(["sh", "-c", shell, sys.executable], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert done.returncode == code
    assert done.stderr.startswith(said) and len(done.stderr.splitlines()) == bool(said)


def test_ctrl_c_while_the_program_is_imported_is_one_line(tmp_path):
    """A signal as of Ctrl-C comes while typer is imported, and its import would go on for long."""
    (tmp_path / "typer.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "lowmem_drf", "train"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Interrupted.\n")
