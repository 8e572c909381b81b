"""One line of the result: what was expected, what was measured, and how far apart they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "off", "wrong", "failed", "info"]

FAR = 0.25
"""A speed or peak that differs by more than this share of what was expected is "off" and asks for an explanation."""


@dataclass(frozen=True)
class Row:
    """``expected`` and ``measured`` are numbers in ``unit``, or words."""

    what: str
    measured: float | str
    unit: str = ""
    expected: float | str | None = None
    state: State = "info"
    note: str = ""
    """Where the expected figure is from, or why something failed."""


def near(what: str, measured: float, unit: str, expected: float | None, note: str = "") -> Row:
    """A speed or peak: ``ok`` within ``FAR``, else ``off``; without an expected figure ``info``."""
    if not expected:
        return Row(what, measured, unit, None, "info", note)
    return Row(what, measured, unit, expected, "ok" if abs(measured / expected - 1) <= FAR else "off", note)


def at_most(what: str, measured: float, unit: str, limit: float, note: str = "") -> Row:
    """An error: above the limit, or NaN, it is ``wrong``."""
    return Row(what, measured, unit, f"<= {limit:.3g}", "ok" if measured <= limit else "wrong", note)


def failed(what: str, error: BaseException) -> Row:
    """What raised, in one line."""
    lines = str(error).strip().splitlines() or ["no message"]
    return Row(what, "failed", state="failed", note=f"{type(error).__name__}: {lines[0]}"[:160])
