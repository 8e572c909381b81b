"""``lowmem-drf doctor``: what works on this machine and what does not, each with its cure."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from typing import Any

from lowmem_drf.doctor.checks import Check, Child, looked_at
from lowmem_drf.doctor.machine import HARDWARE, REST, SOFTWARE, fitting

OWN = (("imports", SOFTWARE), ("card", HARDWARE), ("", REST))
"""What this process looks at, and the child whose results stand behind it."""
COLOURS = {"ok": "green", "warning": "yellow", "failure": "bold red"}


def doctor_command(as_json: bool, full: bool) -> int:
    """Prints every check. Returns the exit code: 1 if one has failed."""
    checks = list(
        {check.detail: check for check in look(full)}.values()
    )  # a broken package breaks those that import it
    ok = all(check.status != "failure" for check in checks)
    if as_json:
        print(json.dumps({"ok": ok, "checks": [check._asdict() for check in checks]}, indent=2))
    else:
        show(checks, full)
    return 0 if ok else 1


def look(full: bool) -> Iterator[Check]:
    """All checks. What imports libraries runs beside the rest, and not at all without torch."""
    names = ("imports", "card") if importlib.util.find_spec("torch") else ()
    children = {name: Child(f"lowmem_drf.doctor.{name}", full) for name in names}
    own = {part: [check for name, step in steps.items() for check in looked_at(name, step)] for part, steps in OWN}
    found = {"card": list(children["card"].checks())} if children else {}
    facts: dict[str, Any] = children["card"].facts if children else {}
    presets = list(looked_at("presets", lambda: fitting(facts.get("card", ""), facts.get("total", 0))))
    found |= {name: list(child.checks()) for name, child in children.items() if name not in found}  # the slow one last
    for part, checks in own.items():
        yield from (*checks, *found.get(part, ()))
    yield from presets


def show(checks: list[Check], full: bool) -> None:
    """A table, and in the last line the names of what is wrong."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except Exception:  # rich may be what is broken
        for name, status, detail, mend in checks:
            print(f"{status:8} {name}: {detail}" + (f"\n{'':8} -> {mend}" if mend else ""))
        return
    console, table = Console(highlight=False), Table.grid(padding=(0, 2))
    for _ in range(3):
        table.add_column(overflow="fold")  # the default's ellipsis is no ASCII
    for name, status, detail, mend in checks:
        table.add_row(Text(status, COLOURS[status]), Text(name, "bold"), Text(detail))
        if mend:
            table.add_row("", "", Text(f"-> {mend}", "cyan"))
    console.print(table)
    names = {status: [check.name for check in checks if check.status == status] for status in ("warning", "failure")}
    said = [f"{len(of)} {status}{'s' * (len(of) > 1)} ({', '.join(of)})" for status, of in names.items() if of]
    more = "" if full else "  --full measures copies and tries every kernel."
    console.print(f"\n{', '.join(said) or 'All is well'}.{more}", style="bold")
