"""Atomic writes of files and folders (written beside the target, flushed, renamed), and the rule for what a user names
as output (``require_output``)."""

from __future__ import annotations

import gc
import hashlib
import os
import shutil
import stat
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lowmem_drf.errors import BadInputError

MOST_NAME_BYTES = 80
"""Of a file name that is made from a prompt. File systems allow 255, encrypted home folders 143."""

IN_USE = (5, 32, 33, 1224)
"""Windows' error numbers for a file that a program has open or mapped."""
PATIENCE_S = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
"""Waits between the tries to rename or delete a file in use: a virus scanner opens every new file for a moment."""

RUN_FILES = (
    *("config.toml", "metrics.jsonl", "questions.json", "left_out.json", "kernels.json"),
    *("run.json", "eval.json", "watch.jsonl", "tracker.json"),
)
"""Files of a run's folder; nothing but the run writes them."""


@contextmanager
def written_aside(path: Path, ending: str = ".part") -> Iterator[Path]:
    """Yields a hidden path beside ``path``, for a file or a folder. When the block ends, the hidden path is flushed to
    the disk and replaces ``path``; if the block raises, it is deleted and ``path`` is unchanged. If ``path`` is a link,
    what it points to is replaced.

    A process that is killed leaves ``path`` whole, and at most the hidden path behind. If two processes write the same
    ``path``, the last one wins. A file gets the permissions of the one it replaces, a new file those of the umask.

    Args:
        ending: suffix of the hidden path, for libraries that choose a file's format by its name.
    """
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    # cut, since the name may be as long as the file system allows
    aside = path.with_name(f".{_cut(path.name, 200)}.{os.getpid()}{ending}")
    try:
        yield aside
        for written in (*aside.rglob("*"), aside):
            _set_permissions(written, path)
            _flush(written)
        if aside.is_dir() and path.is_dir():  # os.replace cannot replace a folder that is not empty
            discard(path)
        patiently(lambda: os.replace(aside, path))
        _flush(path.parent)
    finally:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            with suppress(OSError):
                aside.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file through ``written_aside``. A device or a pipe is written to."""
    if not replaceable(path):
        path.write_text(text, encoding="utf-8")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def replaceable(path: Path) -> bool:
    """True for a file, or a name that is free; False for what must not be replaced: a folder, a device, a pipe."""
    return path.is_file() or not os.path.exists(path)


def require_output(
    path: Path, option: str, ours: Callable[[Path], bool], force: bool, streams: bool = False, kind: str = "file"
) -> None:
    """Checks, before any work is done, that a command may write a file where its user wants it. Creates nothing.

    Args:
        option: the option that named the path, for the cure.
        ours: tells whether an existing file is one that the command made and nobody edited.
        force: replace any other file too, but none that a run needs.
        streams: the file can be written from first to last byte, so a device or a pipe will do.
        kind: what is written, in words.

    Raises:
        BadInputError: with the cure.
    """
    real = Path(os.path.realpath(path))
    cure = f"Give another {option}"
    if os.path.islink(real):
        raise BadInputError(f"{path} is a link that leads to itself. {cure}.")
    if os.path.isdir(real):
        raise BadInputError(f"{option} {path} is a folder. Give the name of a {kind}.")
    refuse_in_run(path, option)
    if not replaceable(real):
        if streams:
            return
        raise BadInputError(f"{path} is a device or a pipe, and a {kind} is not written in one go. Give a file's name.")
    if os.path.exists(real) and not force and not ours(real):
        raise BadInputError(
            f"{path} exists, and was edited or made in another way. {cure}, or replace it with --force."
        )
    release(make_writable((real if path.is_symlink() else path).parent, option))


def refuse_in_run(path: Path, option: str) -> None:
    """Raises BadInputError for what only a run itself may write, such as its checkpoints and its ``config.toml``."""
    real = Path(os.path.realpath(path))
    for run in real.parents:
        inside = real.relative_to(run).parts
        match inside:
            case ("checkpoints", step, _, *_):
                needed = step.startswith("step-")
            case ("tensorboard", _, *_):
                needed = True
            case (name,):
                needed = name in RUN_FILES
            case _:
                needed = False
        if needed and holds_run(run):
            raise BadInputError(f"{path} belongs to the run {run}, which needs it as it is. Give another {option}.")


def holds_run(folder: Path) -> bool:
    """True if the folder was written by ``train``: a configuration alone may be any program's."""
    beside = ("metrics.jsonl", "checkpoints", "tensorboard")
    return os.path.isfile(folder / "config.toml") and any(os.path.exists(folder / name) for name in beside)


def readable_name(text: str, before: str = "", after: str = "") -> str:
    """``before``, the beginning of ``text``, ``after``: a file name of at most ``MOST_NAME_BYTES`` bytes. Letters and
    digits of every script stay if the file system's encoding has them; what lies between them becomes a hyphen."""
    encoding = sys.getfilesystemencoding()
    letters = [
        letter if unicodedata.category(letter)[0] in "LMN" and letter.encode(encoding, "ignore") else " "
        for letter in unicodedata.normalize("NFC", text.lower())
    ]
    room = MOST_NAME_BYTES - len(f"{before}{after}".encode())
    return f"{before}{_cut('-'.join(''.join(letters).split()), room).rstrip('-') or 'clip'}{after}"


def text_hash(text: str) -> str:
    """The SHA-256 of a text, in hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def short_hash(text: str) -> str:
    """Eight digits that tell texts apart whose names begin alike."""
    return text_hash(text)[:8]


def _cut(text: str, most: int) -> str:
    """The beginning of a text, at most this many bytes of UTF-8."""
    return text.encode("utf-8", "surrogatepass")[: max(most, 0)].decode("utf-8", "ignore")


def discard(folder: Path) -> None:
    """Deletes a folder. It is renamed first, so that nobody takes a half-deleted folder for a whole one."""
    doomed = folder.with_name(f".{folder.name}.deleted")
    patiently(lambda: os.replace(folder, doomed))
    patiently(lambda: shutil.rmtree(doomed))


def in_use(error: OSError) -> bool:
    """Whether Windows refused because a program has the file open. Other systems rename and delete open files."""
    return getattr(error, "winerror", None) in IN_USE


def patiently(act: Callable[[], None]) -> None:
    """Renames or deletes; while a file is in use on Windows, tries again (``PATIENCE_S``). We may have it open
    ourselves: tensors that were read from a safetensors file keep it mapped until they are collected."""
    for seconds in PATIENCE_S:
        try:
            return act()
        except OSError as error:
            if not in_use(error):
                raise
            gc.collect()
            time.sleep(seconds)
    act()


def make_writable(folder: Path, option: str = "--output") -> list[Path]:
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
        cure = f"Give another folder with {option}."
        raise BadInputError(f"{folder} cannot be written to: {error.strerror}. {cure}") from error
    return missing


def release(made: list[Path]) -> None:
    """Removes those folders of ``make_writable`` that are still empty, so that a run that did not start leaves no
    trace."""
    for path in made:
        if os.path.isdir(path) and not os.listdir(path):
            path.rmdir()


def _set_permissions(written: Path, path: Path) -> None:
    """Libraries that write through temporary files leave them readable for their owner only. Some file systems have no
    permissions to set."""
    if written.is_dir():
        return
    if path.is_file():
        mode = stat.S_IMODE(path.stat().st_mode)
    else:
        umask = os.umask(0o077)  # there is no other way to read it
        os.umask(umask)
        mode = stat.S_IMODE(written.stat().st_mode) | 0o666 & ~umask
    with suppress(OSError):
        written.chmod(mode)


def _flush(path: Path) -> None:
    """Waits until a file, or a folder's list of entries, is on the disk (fsync)."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders, and journals their entries
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
