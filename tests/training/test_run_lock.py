"""Two processes do not train in one folder."""

import errno
import os
import shutil
import socket
import sys
import types

import pytest

from lowmem_drf.commands.train import train_command
from lowmem_drf.errors import BadInputError, LowmemError
from lowmem_drf.files import write_text
from lowmem_drf.training import loop, run_lock
from lowmem_drf.training.checkpoint import checkpoint_steps
from lowmem_drf.training.run_folder import claim
from lowmem_drf.training.run_lock import LOCK, locked, lost

US = f"process {os.getpid()} on {socket.gethostname()}"


def test_the_second_is_told_who_is_there(tmp_path):
    with locked(tmp_path, pytest.fail):
        with pytest.raises(BadInputError, match=f"is in use: {US} trains in it. Wait until it has ended"):
            locked(tmp_path, pytest.fail).__enter__()
        assert os.listdir(tmp_path) == [LOCK]
    assert os.listdir(tmp_path) == []


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    (tmp_path / LOCK).write_text("1 elsewhere\n")
    with locked(tmp_path, pytest.fail):
        assert (tmp_path / LOCK).read_text().split()[0] == str(os.getpid())


def test_a_file_that_its_holder_deletes_meanwhile_is_no_lock(tmp_path, monkeypatch):
    take, taken = run_lock._take, []

    def late(file):
        if not taken:
            (tmp_path / LOCK).unlink()
        taken.append(file.fileno())
        take(file)

    monkeypatch.setattr(run_lock, "_take", late)
    with locked(tmp_path, pytest.fail), pytest.raises(BadInputError, match=US):
        locked(tmp_path, pytest.fail).__enter__()
    assert len(taken) == 3


def test_without_locks_it_is_said_in_one_line_and_the_run_goes_on(tmp_path, monkeypatch):
    said = []

    def none(file):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with monkeypatch.context() as patch:
        patch.setattr(run_lock, "_take", none)
        with locked(tmp_path, said.append):
            pass
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", None)
    with locked(tmp_path, said.append):
        pass
    assert [line.partition(":")[0] for line in said] == [
        f"There are no locks here ({os.strerror(errno.ENOLCK)})",
        "There are no locks on this system",
    ]


def test_windows_locks_a_byte_that_nobody_reads(tmp_path, monkeypatch):
    calls = []

    def locking(handle, mode, count):
        calls.append((os.lseek(handle, 0, os.SEEK_CUR), mode, count))
        if len(calls) == 2:
            raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK=2))
    with locked(tmp_path, pytest.fail), pytest.raises(BadInputError, match=US):
        locked(tmp_path, pytest.fail).__enter__()
    assert calls == [(1 << 30, 2, 1)] * 2


def test_a_folder_is_lost_when_it_is_gone_or_anothers(tmp_path):
    file = tmp_path / "run" / "metrics.jsonl"
    file.parent.mkdir()
    with locked(file.parent, pytest.fail):
        assert not lost(file.parent, file)
        write_text(file.parent / LOCK, "1 elsewhere\n")
        assert lost(file.parent, file)
        shutil.rmtree(file.parent)
        assert lost(file.parent, file)
    assert not file.parent.exists()


@pytest.mark.parametrize("resume", [False, True])
def test_train_refuses_a_folder_in_use(tiny_run, tiny_preset, resume, tmp_path):
    run = tiny_run if resume else tmp_path / "run"
    with claim(run, pytest.fail, resume), pytest.raises(BadInputError, match=US):
        train_command(None if resume else str(tiny_preset), None, run, 8, None, resume, [], False)


def test_a_run_whose_folder_is_deleted_is_saved_there_again(tiny_preset, tmp_path, monkeypatch):
    original, run = loop.update, tmp_path / "run"

    def update(config, models, parts, trainer, step, *rest):
        if step == 1:
            shutil.rmtree(run)
            (run / "samples").mkdir(parents=True)  # as previews do
        return original(config, models, parts, trainer, step, *rest)

    monkeypatch.setattr(loop, "update", update)
    with pytest.raises(LowmemError, match="was deleted or moved while it trained. Update 2 is saved there again"):
        train_command(str(tiny_preset), None, run, 3, None, False, ["log.sample_every=0"], False)
    assert checkpoint_steps(run) == [2] and not (run / LOCK).exists()
    train_command(None, None, run, None, None, True, ["log.sample_every=0"], False)
    assert checkpoint_steps(run) == [2, 3]
