"""A check's result, and how checks are run: one that raises is a failure, and the others go on.

What imports torch or another library runs in a process of its own (``Child``): a library that crashes or hangs at
import ends only that process, and the check that it had begun is the failure.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lowmem_drf
from lowmem_drf.libraries import broken, cure, requirements

Status = Literal["ok", "warning", "failure"]

DEBUG_CURE = "Ask with this line at the project's issues."
LIMIT_S, FULL_LIMIT_S = 120.0, 900.0
"""A child that takes longer hangs. A first import of torch from a slow disk takes a minute."""


class Check(NamedTuple):
    """One line of the answer."""

    name: str
    status: Status
    detail: str
    cure: str = ""


Steps = dict[str, Callable[[], Iterator[Check]]]
"""Name of what is looked at -> the function that looks."""


def looked_at(name: str, look: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """The results of one function. What it raises is a failure under ``name``."""
    try:
        yield from look()
    except (Exception, SystemExit) as error:  # some libraries end the process at import
        yield failed(name, error)


def failed(name: str, error: BaseException, cure: str = DEBUG_CURE) -> Check:
    """A failure from an exception. A broken library names itself and its own cure."""
    if message := broken(error):
        what, mend, *_ = message.splitlines()
        return Check(what.split()[0], "failure", what, mend.removeprefix("Mend it with: "))
    lines = str(error).strip().splitlines()
    return Check(name, "failure", f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:160], cure)


def tell(steps: Steps) -> None:
    """A child's whole work: prints what it begins and what it found, as lines of JSON."""
    gc.disable()  # collecting takes a fifth of the time of the imports
    for name, look in steps.items():
        say(begins=name)
        for check in looked_at(name, look):
            say(**check._asdict())


class Child:
    """Runs a module of this room in a process of its own, at once; ``checks`` waits for it."""

    def __init__(self, module: str, full: bool) -> None:
        root = str(Path(lowmem_drf.__file__).parents[1])
        paths = [path for path in (os.environ.get("PYTHONPATH"), root) if path]
        # torch.compile is not used here, and importing it for bitsandbytes takes a second
        quiet = {"TORCHDYNAMO_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONPATH": os.pathsep.join(paths)}
        self._module, self._limit_s = module, FULL_LIMIT_S if full else LIMIT_S
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *(["--full"] if full else [])],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | quiet,
            encoding="utf-8",
            errors="replace",
        )
        self.facts: dict[str, Any] = {}
        """What a child says besides: ``{"fact": …}``."""

    def checks(self) -> Iterator[Check]:
        name, why = self._module.rpartition(".")[2], ""
        try:
            text = self._process.communicate(timeout=self._limit_s)[0]
        except subprocess.TimeoutExpired:
            self._process.kill()
            text, why = self._process.communicate()[0], f"did not end within {self._limit_s:.0f} s"
        finally:
            self._process.kill()  # after Ctrl-C
        for line in text.splitlines():
            try:
                said = json.loads(line)
                name = said.get("begins", name)
            except (ValueError, AttributeError):
                continue  # printed by a library
            self.facts |= said.get("fact", {})
            if "status" in said:
                yield Check(**said)
        code = self._process.returncode
        if code and not why:
            why = f"ended the process ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"
        if why:
            known = name in {package.module for package in requirements()[1]}
            mend = cure(name) if known else "Run it alone to see why: python -X faulthandler -P -m " + self._module
            yield Check(name, "failure", f"looking at {name} {why}", mend)


def say(**line: Any) -> None:
    """For a child: a line for its parent."""
    print(json.dumps(line), flush=True)
