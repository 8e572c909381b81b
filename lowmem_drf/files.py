"""Atomic writes of files and folders (written beside the target, flushed, renamed), and folders to write to."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lowmem_drf.errors import BadInputError


@contextmanager
def written_aside(path: Path, ending: str = ".part") -> Iterator[Path]:
    """Yields a hidden path beside ``path``, for a file or a folder. When the block ends, the hidden path is flushed to
    the disk and replaces ``path``; if the block raises, it is deleted and ``path`` is unchanged.

    A process that is killed leaves ``path`` whole, and at most the hidden path behind. If two processes write the same
    ``path``, the last one wins.

    Args:
        ending: suffix of the hidden path, for libraries that choose a file's format by its name.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}{ending}")
    try:
        yield aside
        for written in (*aside.rglob("*"), aside):
            _flush(written)
        if aside.is_dir() and path.is_dir():  # os.replace cannot replace a folder that is not empty
            discard(path)
        os.replace(aside, path)
        _flush(path.parent)
    finally:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            with suppress(OSError):
                aside.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file through ``written_aside``: a link stays, and the file it points to is replaced. A device
    or a pipe is written to."""
    if not replaceable(path):
        path.write_text(text, encoding="utf-8")
        return
    with written_aside(path.resolve()) as aside:
        aside.write_text(text, encoding="utf-8")


def replaceable(path: Path) -> bool:
    """True for a file, or a name that is free; False for what must not be replaced: a folder, a device, a pipe."""
    return path.is_file() or not os.path.exists(path)


def discard(folder: Path) -> None:
    """Deletes a folder. It is renamed first, so that nobody takes a half-deleted folder for a whole one."""
    doomed = folder.with_name(f".{folder.name}.deleted")
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def make_writable(folder: Path) -> list[Path]:
    """Creates a folder and proves that files can be created in it. Returns the folders it created, for ``release``.

    Raises:
        BadInputError: the path is a file or cannot be written to. Nothing is left behind.
    """
    # os.path: Path.exists raises where a parent folder may not be read
    missing = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    probe = folder / f".writable-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        release(missing)
        cure = "Give another folder with --output."
        raise BadInputError(f"{folder} cannot be written to: {error.strerror}. {cure}") from error
    return missing


def release(made: list[Path]) -> None:
    """Removes those folders of ``make_writable`` that are still empty, so that a run that did not start leaves no
    trace."""
    for path in made:
        if os.path.isdir(path) and not os.listdir(path):
            path.rmdir()


def _flush(path: Path) -> None:
    """Waits until a file, or a folder's list of entries, is on the disk (fsync)."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders, and journals their entries
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
