"""Gives damaged files to every reader of what a user gives, for as long as one likes.

    python -m bench.fuzz --minutes 30            # --target lora: one reader; --output FOLDER: where findings are saved

A finding is an input that ends in anything but a refusal with a cure in at most six lines, or takes more than 5 s or
200 MiB; the process may also crash or hang. Each is saved, and makes the exit code 1. ``tests/fuzz`` has the readers
and their files, and tries a fixed few. Needs the ``dev`` extra.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOUND = 3
"""Exit code of a process with a finding. Where Python or ``faulthandler`` ends it, the code is another."""
HANGS_AFTER_S = 60
MOST_ADDRESSES = 8 * 2**30
"""Bytes of address space of a process."""
ROUND = 1000
"""Inputs that Hypothesis makes in one go; the next round has another seed."""


def attempt(name: str, seconds: float, folder: Path, output: Path) -> int:
    """Tries inputs of one target in this process. Returns ``FOUND`` at a finding, which it has made small and saved."""
    sys.path[:0] = [str(ROOT / "tests" / "fuzz"), str(ROOT / "tests" / "support")]
    from _targets import TARGETS, finding
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from hypothesis.errors import HypothesisWarning

    warnings.simplefilter("ignore", HypothesisWarning)  # the values that it samples are long
    target, tried = TARGETS[name], 0
    target.warm(folder)
    _limit_memory()
    end = time.monotonic() + seconds
    found: dict[str, bytes] = {}

    @settings(
        max_examples=ROUND,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
    )
    @given(target.files())
    def try_one(content: bytes) -> None:
        nonlocal tried
        if time.monotonic() > end and not found:
            return
        tried += 1
        faulthandler.dump_traceback_later(HANGS_AFTER_S, exit=True)
        said = finding(target, content, folder)
        faulthandler.cancel_dump_traceback_later()
        if said:
            found[said] = content
            raise AssertionError(said)

    while time.monotonic() < end and not found:
        number = int.from_bytes(os.urandom(4), "big")
        try:
            seed(number)(try_one)()
        except Exception:  # also Flaky, where an input was slow once
            if not found:
                raise
    for said, content in list(found.items())[-1:]:
        print(f"{name}: FOUND {said}\n  saved as {_save(output, target.name, name, content)}", flush=True)
    print(f"{name}: {tried:,} inputs, {'a finding' if found else 'no finding'}", flush=True)
    return FOUND if found else 0


def _limit_memory() -> None:
    """A reader that takes all memory ends with an error in place of the machine."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MOST_ADDRESSES, MOST_ADDRESSES))


def _save(output: Path, file: str, name: str, content: bytes) -> Path:
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{name.replace(' ', '-')}-{time.time_ns()}-{file}"
    path.write_bytes(content)
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30, help="for all readers together")
    parser.add_argument("--target", action="append", help="one reader; repeatable")
    parser.add_argument("--output", type=Path, default=Path("fuzz-findings"), help="folder for what was found")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        return attempt(options.target[0], options.minutes * 60, options.child, options.output)

    sys.path[:0] = [str(ROOT / "tests" / "fuzz"), str(ROOT / "tests" / "support")]
    from _targets import TARGETS

    chosen = options.target or list(TARGETS)
    if unknown := set(chosen) - TARGETS.keys():
        parser.error(f"there is no target {', '.join(unknown)}. Targets: {', '.join(TARGETS)}")
    bad = 0
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            share = options.minutes / len(chosen)
            command = [sys.executable, "-m", "bench.fuzz", "--target", name, "--minutes", str(share), "--child", folder]
            done = subprocess.run([*command, "--output", str(options.output)], check=False)
            if done.returncode not in (0, FOUND):  # a crash in a library, or it hung
                options.output.mkdir(parents=True, exist_ok=True)
                saved = options.output / f"{name.replace(' ', '-')}-crash-{TARGETS[name].name}"
                shutil.copy(Path(folder) / TARGETS[name].name, saved)
                print(f"{name}: FOUND a crash or hang ({done.returncode}); its input is saved as {saved}", flush=True)
            bad += done.returncode != 0
    print(f"{len(chosen)} readers, {bad} with a finding")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
