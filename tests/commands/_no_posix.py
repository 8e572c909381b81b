"""Runs commands in a process from which our code sees nothing of POSIX, as on Windows:
``python _no_posix.py '[["train", ...], ...]'``.

Only our code: the libraries look at ``sys.platform``, and would go their Windows way there.
"""

import builtins
import io
import json
import os
import signal
import sys

MODULES = {"fcntl", "grp", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"}
SIGNALS = ("SIGALRM", "SIGHUP", "SIGPIPE", "SIGQUIT", "SIGUSR1", "SIGUSR2", "alarm", "setitimer")
FUNCTIONS = (
    *("chown", "fchmod", "fchown", "fork", "forkpty", "getegid", "geteuid", "getgid", "getpgid", "getuid", "killpg"),
    *("mkfifo", "nice", "sched_getaffinity", "setsid", "statvfs", "sysconf", "uname", "wait3", "wait4"),
)
CONSTANTS = ("O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK")


def ours():
    """Whether the caller of a patched function is our code, perhaps through the standard library."""
    frame = sys._getframe(2)
    while frame and frame.f_globals.get("__name__", "").split(".")[0] in sys.stdlib_module_names - {"__main__"}:
        frame = frame.f_back
    return bool(frame) and frame.f_globals.get("__name__", "").startswith("lowmem_drf")


def hide():
    """What Windows has not, raises; but in the libraries."""
    import_, open_ = builtins.__import__, io.open

    def hidden_import(name, *args, **kwargs):
        if name.split(".")[0] in MODULES and sys._getframe(1).f_globals.get("__name__", "").startswith("lowmem_drf"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return import_(name, *args, **kwargs)

    def hidden_open(file, *args, **kwargs):
        if str(file).startswith(("/proc/", "/sys/")) and ours():
            raise FileNotFoundError(2, "No such file or directory", str(file))
        return open_(file, *args, **kwargs)

    def hidden(name, real):
        def function(*args, **kwargs):
            if ours():
                raise AttributeError(f"module 'os' has no attribute {name!r}")
            return real(*args, **kwargs)

        return function

    builtins.__import__, builtins.open, io.open = hidden_import, hidden_open, hidden_open
    for name in SIGNALS:
        delattr(signal, name)
    for name in CONSTANTS:
        delattr(os, name)
    for name in FUNCTIONS:
        setattr(os, name, hidden(name, getattr(os, name)))


if __name__ == "__main__":
    hide()
    from lowmem_drf.cli import main

    for arguments in json.loads(sys.argv[1]):
        try:
            main(arguments)
        except SystemExit as error:
            if error.code:
                sys.exit(f"{arguments[0]}: exit code {error.code}")
