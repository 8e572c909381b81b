"""Writes are atomic, follow links and the umask, and replace nothing that a user or a run needs."""

import os
import stat

import pytest

from lowmem_drf.errors import BadInputError
from lowmem_drf.files import (
    MOST_NAME_BYTES,
    discard,
    readable_name,
    refuse_in_run,
    require_output,
    short_hash,
    write_text,
    written_aside,
)


def write_file(aside, text):
    aside.write_text(text)


def write_folder(aside, text):
    (aside / "deep").mkdir(parents=True)
    (aside / "deep" / "file").write_text(text)


def read(path):
    return (path / "deep" / "file" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_the_old_stays_until_the_new_is_whole_and_flushed(write, tmp_path, monkeypatch):
    path = tmp_path / "name.txt"
    flushed, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (flushed.append(os.fstat(handle).st_ino), fsync(handle)))
    for text in ("old", "new"):
        flushed.clear()
        with written_aside(path) as aside:
            write(aside, text)
            assert aside.parent == path.parent and aside.name.startswith(".name.txt.")
            assert read(path) == "old" if text == "new" else not path.exists()
            inodes = {written.stat().st_ino for written in (aside, *aside.rglob("*"))}
        assert inodes < set(flushed) and flushed[-1] == tmp_path.stat().st_ino, "the name itself is flushed last"
        assert read(path) == text and os.listdir(tmp_path) == ["name.txt"]


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_a_failure_leaves_the_old_and_nothing_else(write, tmp_path):
    path = tmp_path / "name"
    with written_aside(path) as aside:
        write(aside, "old")
    with pytest.raises(KeyboardInterrupt), written_aside(path) as aside:
        write(aside, "new")
        raise KeyboardInterrupt
    assert read(path) == "old" and os.listdir(tmp_path) == ["name"]


def test_a_failure_to_write_is_the_one_that_is_raised(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError), written_aside(tmp_path / "file" / "name") as aside:
        write_file(aside, "text")


def test_a_file_does_not_take_the_place_of_a_folder(tmp_path):
    write_folder(tmp_path / "folder", "old")
    with pytest.raises(OSError):
        write_text(tmp_path / "folder", "new")
    assert read(tmp_path / "folder") == "old" and os.listdir(tmp_path) == ["folder"]


def test_a_folder_loses_its_name_before_it_is_deleted(tmp_path, monkeypatch):
    write_folder(tmp_path / "folder", "old")

    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        discard(tmp_path / "folder")
    assert os.listdir(tmp_path) == [".folder.deleted"]


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(("umask", "given"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_of_every_library_follow_the_umask(umask, given, tmp_path):
    """safetensors writes a file that only its owner may read."""
    before = os.umask(umask)
    try:
        with written_aside(tmp_path / "folder") as aside:
            aside.mkdir()
            os.close(os.open(aside / "private", os.O_CREAT | os.O_WRONLY, 0o600))
        write_text(tmp_path / "text", "a")
    finally:
        os.umask(before)
    assert mode(tmp_path / "folder" / "private") == mode(tmp_path / "text") == given
    (tmp_path / "text").chmod(0o640)
    write_text(tmp_path / "text", "b")
    assert mode(tmp_path / "text") == 0o640, "whoever could read it still can, and nobody else"


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path):
    path = tmp_path / ("映" * 85)  # 255 bytes
    write_text(path, "text")
    assert path.read_text() == "text" and os.listdir(tmp_path) == [path.name]


def test_what_a_user_names_is_replaced_only_if_we_made_it_or_are_told_to(tmp_path):
    def check(name, force=False, streams=False):
        require_output(tmp_path / name, "--output", lambda path: path.read_text() == "ours", force, streams)

    for name, text in (("ours", "ours"), ("theirs", "notes")):
        (tmp_path / name).write_text(text)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    links = {"to ours": "ours", "to theirs": "theirs", "to nowhere": "new/file", "loop": "loop", "null": "/dev/null"}
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    before = sorted(os.listdir(tmp_path))
    for name in ("free", "deep/er/free", "ours", "to ours", "to nowhere"):
        check(name)
    for name in ("theirs", "to theirs"):
        check(name, force=True)
        with pytest.raises(BadInputError, match="Give another --output, or replace it with --force"):
            check(name)
    for name in ("pipe", "null"):
        check(name, streams=True)
        with pytest.raises(BadInputError, match="is a device or a pipe"):
            check(name, force=True)
    for name, said in (("folder", "is a folder"), ("loop", "leads to itself"), ("theirs/file", "cannot be written to")):
        with pytest.raises(BadInputError, match=said):
            check(name, force=True)
    assert sorted(os.listdir(tmp_path)) == before, "a check leaves nothing behind"


def test_a_link_stays_when_a_file_or_a_folder_is_written_through_it(tmp_path):
    for write, target in ((write_file, "file"), (write_folder, "folder")):
        link = tmp_path / f"to {target}"
        link.symlink_to(target)
        for text in ("first", "second"):
            with written_aside(link) as aside:
                write(aside, text)
            assert link.is_symlink() and read(tmp_path / target) == text


def test_what_a_run_needs_is_never_replaced(tmp_path):
    run, plain = tmp_path / "run", tmp_path / "plain"
    checkpoint = run / "checkpoints" / "step-000004"
    checkpoint.mkdir(parents=True)
    plain.mkdir()
    for folder in (run, plain):
        (folder / "config.toml").touch()
    (tmp_path / "link").symlink_to(checkpoint / "lora.safetensors")
    needed = ("config.toml", "questions.json", "metrics.jsonl", "checkpoints/step-000004/lora.safetensors")
    for path in (*(run / name for name in needed), checkpoint / "new", run / "tensorboard" / "x", tmp_path / "link"):
        with pytest.raises(BadInputError, match="belongs to the run"):
            require_output(path, "--output", lambda path: True, force=True)
    for path in (
        run / "run.safetensors",
        run / "samples" / "clip.mp4",
        plain / "config.toml",
        plain / "questions.json",
    ):
        refuse_in_run(path, "--output")


def test_names_made_of_prompts_are_readable_and_short():
    name = readable_name("A red ball, rolling: off a table!", "01-", ".mp4")
    assert name == "01-a-red-ball-rolling-off-a-table.mp4"
    assert readable_name("红色的球 滚动") == "红色的球-滚动" and readable_name("नीला घन") == "नीला-घन"
    assert readable_name("🎬🎬", after=".mp4") == "clip.mp4" and readable_name("../\0\udc80/") == "clip"
    for text in ("球" * 400, "a" * 400):
        name = readable_name(text, after=f"-{short_hash(text)}-seed0.mp4")
        assert MOST_NAME_BYTES - 3 < len(name.encode()) <= MOST_NAME_BYTES and name.endswith("-seed0.mp4")
    assert short_hash("球" * 400) != short_hash("球" * 401)


class InUse(PermissionError):
    """What Windows raises for a file that another program has open."""

    winerror = 32


def test_a_file_in_use_on_windows_is_waited_for(tmp_path, monkeypatch):
    refusals, waits, replace = [InUse(), InUse()], [], os.replace

    def refused(*paths):
        if refusals:
            raise refusals.pop()
        replace(*paths)

    monkeypatch.setattr(os, "replace", refused)
    monkeypatch.setattr("time.sleep", waits.append)
    write_text(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text" and waits == [0.1, 0.2]
    refusals += [InUse()] * 99
    with pytest.raises(InUse):
        write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "text" and sum(waits) < 10
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("text", ["CON", "aux", 'a: "b"? <c>|*/\\', "ends with a dot. ", "\x07\n", "LPT1.txt"])
def test_names_made_of_prompts_are_names_on_windows_too(text):
    name = readable_name(text, after=f"-{short_hash(text)}.mp4")
    assert not set(name) & set('<>:"/\\|?*') and name.isprintable() and name == name.lower()
    assert name.split(".")[0].upper() not in {"CON", "PRN", "AUX", "NUL", "COM1", "LPT1"} and name.endswith(".mp4")
