"""A training run in a process of its own that kills itself (SIGKILL) in the n-th call of a function."""

import os
import pkgutil
import signal
from pathlib import Path
from unittest import mock

import torch

from lowmem_drf.commands.train import train_command


def train_until_killed(function: str, call: int, preset: Path, run: Path) -> None:
    """``function``: dotted name, patched where it is looked up. Returns only if it was called less often than
    ``call``."""
    torch.set_num_threads(1)
    original = pkgutil.resolve_name(function)
    calls = 0

    def killing(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    with mock.patch(function, killing):
        train_command(str(preset), None, run, None, None, False, [], False)
