"""One process at a time trains in a run's folder: a lock that the system drops when its process ends, however it ends.

No platform has both ``fcntl`` and ``msvcrt``, so they are imported where they are used.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from lowmem_drf.errors import BadInputError

LOCK = ".lock"
_TAKEN = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
_FAR = 1 << 30
"""A byte that is locked on Windows cannot be read by others: the one we lock is far behind the text."""
_TRIES = 10


@contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Holds the lock of a folder inside the block. The lock's file names the holder, and is deleted with the lock.

    Args:
        say: is told in one line if the system has no locks here; then nothing is locked.

    Raises:
        BadInputError: another process holds the lock.
    """
    path = folder / LOCK
    for _ in range(_TRIES):
        file = path.open("a+", encoding="utf-8")
        try:
            _take(file)
        except OSError as error:
            if error.errno in _TAKEN:
                with file:
                    raise BadInputError(
                        f"{folder} is in use: {_holder(file)} trains in it. "
                        "Wait until it has ended, stop it, or give another --output."
                    ) from None
            say(f"There are no locks here ({error.strerror}): let no other process train in {folder}.")
        except ImportError:
            say(f"There are no locks on this system: let no other process train in {folder}.")
        if _is_at(file, path):
            break
        file.close()  # its holder has just deleted it
    try:
        file.truncate(0)
        file.write(_us())
        file.flush()
        yield
    finally:
        _delete(file, path)
        file.close()


def lost(folder: Path, file: Path) -> bool:
    """Whether a locked folder was deleted or moved, with ``file`` in it, or is now another process's."""
    try:
        return (folder / LOCK).read_text(encoding="utf-8") != _us()
    except OSError:
        return not os.path.exists(file)


def _us() -> str:
    return f"{os.getpid()} {socket.gethostname()}\n"


def _take(file: IO[str]) -> None:
    try:
        import fcntl
    except ImportError:
        import msvcrt

        os.lseek(file.fileno(), _FAR, os.SEEK_SET)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _holder(file: IO[str]) -> str:
    file.seek(0)
    pid, _, host = file.read().strip().partition(" ")
    return f"process {pid} on {host}" if host else "another process"


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether the open file is the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError:
        return False


def _delete(file: IO[str], path: Path) -> None:
    """Deletes the lock's file while it is locked: a process that opened it earlier sees that it is gone."""
    if not _is_at(file, path):
        return
    try:
        path.unlink()
    except OSError:  # Windows deletes no open file, so not one that another process has opened either
        file.close()
        with suppress(OSError):
            path.unlink()
