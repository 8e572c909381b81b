"""The exceptions of lowmem-drf, and their messages. Every message says what happened and what to do."""

import errno
import os
import re
import shlex
import subprocess


class LowmemError(Exception):
    """The work failed. The command ends with exit code 1."""

    exit_code = 1


class BadInputError(LowmemError):
    """A preset, key, file or folder that the user gave cannot be used. Exit code 2; nothing was written."""

    exit_code = 2


class NonFiniteError(LowmemError):
    """A reward, gradient or weight is NaN or infinite. ``stage``: the stage of an update that made it, if known."""

    def __init__(self, message: str, stage: str = "") -> None:
        super().__init__(message)
        self.stage = stage


class Ended(KeyboardInterrupt):
    """A run was ended by its ``on_update``, and is saved. Like Ctrl-C, it leaves out what comes after training."""


def quoted(word: object) -> str:
    """A word of a command that a message advises, so that it can be pasted into a shell."""
    return subprocess.list2cmdline([str(word)]) if os.name == "nt" else shlex.quote(str(word))


def system_error(error: BaseException) -> int | None:
    """The system's number of a failed call to it, whether Python or safetensors, which is no OSError, reports it."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(found[1]) if found else None


def disk_full(error: BaseException) -> bool:
    """Whether a disk, or the user's share of it, has no room for a file."""
    return system_error(error) in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


DEBUG = "--debug"
"""The option that shows tracebacks."""


def explain(error: BaseException) -> tuple[str, int]:
    """(message for the user, with the cure, and exit code). The caller prefixes "Error: ", except for code 130."""
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "Interrupted.", 130
    if isinstance(error, LowmemError):
        return str(error), error.exit_code
    from lowmem_drf.shortage import EXPANDABLE, allocator_settings, allocator_variable, shortage_of

    if shortage := shortage_of(error):
        cure = (
            "Take less: with -s micro_batch=1 (sample and eval: -s log.eval_batch=1), fewer video.frames or a smaller "
            "video.width."
        )
        return "\n".join([*shortage.lines(), cure]), 1
    if isinstance(error, OSError) and getattr(error, "winerror", None) == 206:
        cure = "Take a shorter folder, or let Windows have long paths (docs/windows.md)."
        return f"the path {error.filename} is too long: 260 characters are allowed. {cure}", 2
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        name = max(str(error.filename or "").split(os.sep), key=len)
        return f"the name {name[:40]}… is too long: file systems allow 255 bytes. Give a shorter one.", 2
    from lowmem_drf.libraries import broken

    if message := broken(error):
        return message, 1
    if system_error(error) is not None or isinstance(error, OSError):
        return f"{error}\nCheck the path, its permissions and the free disk space.", 1
    message = f"unexpected {type(error).__name__}: {error}\nRun the same command with {DEBUG} to see where."
    if "CUDA driver error" in str(error) and EXPANDABLE in allocator_settings():
        message += (
            f"\nIf that is where the first tensor goes to the card: {allocator_variable()}=expandable_segments:False."
        )
    return message, 1
