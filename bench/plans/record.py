"""Writes what a card measured into the repository: the ``# Measured:`` lines of the presets, docs/fit.md, the README,
and the figures themselves under ``bench/results/``.

    python -m bench.plans.record FOLDER     # where python -m bench.card wrote its results, on this machine or another
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.card.presets import MEMORY, PEAK, memory_row, time_row
from bench.card.sections import BY_NAME
from bench.plans import fit
from lowmem_drf.errors import BadInputError
from lowmem_drf.files import write_text
from lowmem_drf.preset_files import presets

RESULTS = fit.ROOT / "bench" / "results"
STAGES = ("rollout", "decode", "critic", "vae_backward", "denoise_backward", "update")


def record(folder: Path, results: Path = RESULTS) -> dict[str, str]:
    """Writes the figures of ``folder``. Returns the ``# Measured:`` line of each preset that was measured.

    Raises BadInputError: the folder holds no results.
    """
    try:
        found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        about = found["card"], f"{found['date']}, {found['commit']}, torch {found['versions']['torch']}"
        lines = {}
        for section in found["sections"]:
            preset = BY_NAME[section["name"]].argument
            if preset and section["outcome"] == "done" and (text := _measured(preset, section["rows"], *about)):
                lines[preset] = text
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BadInputError(
            f"{folder} has no results.json of bench.card ({error}): python -m bench.card --output {folder}"
        ) from error
    card = re.sub(r"[^a-z0-9]+", "_", about[0].lower()).strip("_")
    write_text(results / f"card_{card}.json", json.dumps(found, indent=1) + "\n")
    for preset, text in lines.items():
        path = presets()[preset]
        before = path.read_text(encoding="utf-8")
        write_text(path, re.sub(r"^# Measured: .*$", f"# Measured: {text}", before, flags=re.MULTILINE))
    return lines


def _measured(preset: str, rows: list[Mapping[str, Any]], card: str, when: str) -> str | None:
    """``None``: the section did not run the preset, for want of memory."""
    measured = {row["what"]: row["measured"] for row in rows}
    if memory_row(PEAK) not in measured:
        return None
    seconds = sum(measured[time_row(stage)] for stage in STAGES if time_row(stage) in measured)
    largest = max(STAGES, key=lambda stage: measured.get(memory_row(stage), 0))
    peak = f"{measured[memory_row(PEAK)]:.1f} GiB at the peak ({largest})"
    return f"{peak}, about {seconds:,.0f} s an update, on {card} held to {MEMORY[preset]}; {when}"


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.plans.record", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("folder", type=Path, help="where bench.card wrote results.json")
    options = parser.parse_args(arguments)
    try:
        lines = record(options.folder)
    except BadInputError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    for preset, line in lines.items():
        print(f"{preset}: {line}")
    if lines:
        fit.main([])
    else:
        print("no preset was measured; the figures are in bench/results/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
