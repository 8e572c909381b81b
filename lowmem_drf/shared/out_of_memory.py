"""What ``train`` does when memory runs out: it says where, what held the memory and which settings take less, or starts
anew with these (``memory.on_oom``).

A new process, because only that has an allocator without fragments, and models that are loaded where they are to stay.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import lowmem_drf
from lowmem_drf.assembly.assemble import resolve_device
from lowmem_drf.assembly.rungs import keeps_gradient
from lowmem_drf.errors import DEBUG, LowmemError, quoted
from lowmem_drf.planner.cards import card_named, fits_in
from lowmem_drf.planner.ladder import Lowered, StagePlanner, lowered
from lowmem_drf.planner.plan import new_fakes
from lowmem_drf.planner.report import laid_out
from lowmem_drf.schema import Config
from lowmem_drf.shortage import GIB, Shortage, let_go, shortage_of, size
from lowmem_drf.terminal import say
from lowmem_drf.training.checkpoint import saved_step


@contextmanager
def surviving(config: Config, run: Path, begin: Sequence[str], may_change: tuple[str, ...]) -> Iterator[None]:
    """Around a run in one process.

    Args:
        begin: the arguments of this command, for a run that fails before its folder holds its settings.
        may_change: prefixes of the keys that a resumed run may change.

    Raises:
        LowmemError: memory ran out. The message, of at most 6 lines, says what to do.
    """
    try:
        yield
    except Exception as error:
        if (shortage := shortage_of(error)) is None:
            raise
        let_go(error)
        # a resumed run that failed early has not saved its new settings: they are given again
        saved = "--resume" not in begin and (run / "config.toml").is_file()
        again = ["train", "--resume", "--output", str(run)] if saved else list(begin)
        less = _less(config, shortage)
        if saved_step(run) >= config.steps:
            raise LowmemError("\n".join([*shortage.lines(), *_complete(run, less)])) from error
        if less.overrides and config.memory.on_oom == "adapt":
            say(f"{shortage.lines()[0]} {_saved(run, shortage)}")
            say(f"Starting anew, with the same gradient from less memory: {' '.join(_options(less))}")
            _start_anew([*again, *_options(less)])
        lines = shortage.lines("" if less.peak_gib is None else f"planned peak: {size(less.peak_gib * GIB)}")
        raise LowmemError("\n".join([*lines, *_advice(config, run, shortage, less, again, may_change)])) from error


def _advice(
    config: Config, run: Path, shortage: Shortage, less: Lowered, again: Sequence[str], may_change: tuple[str, ...]
) -> list[str]:
    """Two lines: what is saved, and the command that goes on."""
    what, notes = "These settings take less memory and keep the gradient", list[str]()
    if less.overrides and config.memory.on_oom != "adapt":
        notes = ["-s memory.on_oom=adapt does it by itself"]
    if not less.overrides:
        less = _less(config, shortage, dear=True)
        what = "Only settings that change the gradient take less memory"
        if "--resume" in again and not all(text.startswith(may_change) for text in less.overrides):
            return [f"{_saved(run, shortage)} {what}.", f"Start a new run with: {_pasted(_options(less))}"]
        what = what if less.overrides else "No setting that is known here takes less memory"
    if less.lowered_gib is not None:
        notes.insert(0, f"planned peak: {size(less.lowered_gib * GIB)}")
    more = f" ({'; '.join(notes)})" if notes else ""
    return [f"{_saved(run, shortage)} {what}{more}:", f"  {_command([*again, *_options(less)])}"]


def _less(config: Config, shortage: Shortage, dear: bool = False) -> Lowered:
    """The next settings of the ladder: those that change no gradient, or with ``dear`` those that do."""
    on_card = resolve_device(config.device).type == "cuda"

    def fits(override: str) -> bool:
        return keeps_gradient(override) != dear and (on_card or "quant" not in override and "8bit" not in override)

    if on_card and shortage.kind != "card":
        return lowered(config, "host", on_card, fits=fits)
    if on_card:
        with suppress(Exception):  # a plan that fails here must not hide what happened
            import torch

            whole, room = (shortage.total or 0) / GIB, shortage.room
            planner = StagePlanner(card_named(torch.cuda.get_device_name()), whole, new_fakes())
            room_gib = fits_in(room / GIB) if room is not None else None
            return lowered(laid_out(config), shortage.stage, on_card, planner, room_gib, fits)
    return lowered(config, shortage.stage, on_card, fits=fits)


def _complete(run: Path, less: Lowered) -> list[str]:
    """Two lines, for a run that failed after its last update. Nothing is started anew for the comparison alone."""
    settings = f"after setting {', '.join(less.overrides)} in {run / 'config.toml'}" if less.overrides else "later"
    return [f"The run is complete, and all of it is saved. Compare base and tuned {settings}:",
            f"  {_command(['eval', str(run)])}"]  # fmt: skip


def _saved(run: Path, shortage: Shortage) -> str:
    saved = saved_step(run)
    said = f"Update {saved} is saved" if saved else "No update is saved yet"
    return f"{said} ({shortage.lost})." if shortage.lost else f"{said}."


def _options(less: Lowered) -> list[str]:
    return [word for override in less.overrides for word in ("-s", override)]


def _command(arguments: Sequence[str]) -> str:
    return f"lowmem-drf {_pasted(arguments)}"


def _pasted(words: Sequence[str]) -> str:
    return " ".join(map(quoted, words))


def _start_anew(arguments: Sequence[str]) -> NoReturn:
    """Becomes a new process with these arguments. Windows has no such thing: there it waits for one."""
    root = Path(lowmem_drf.__file__).parents[1]
    if (root / "cli.py").is_file():  # a checkout, which may not be installed
        os.environ["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "lowmem_drf", *([DEBUG] if DEBUG in sys.argv else []), *arguments]
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name != "nt":
        os.execv(sys.executable, command)
    import torch

    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a card
    child = subprocess.Popen(command)
    while True:
        with suppress(KeyboardInterrupt):  # the new process has got it too, and ends by it
            raise SystemExit(child.wait())
