"""Writes are atomic."""

import os

import pytest

from lowmem_drf.files import discard, write_text, written_aside


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
