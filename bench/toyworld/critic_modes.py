"""What the critic is asked, side by side: ToyWorld trained with one global question, with structured yes/no questions,
with explanations, with both.

    python -m bench.toyworld.critic_modes --seeds 0 1 2 --json bench/results/critic_modes.json

Every mode trains with the same preset and seeds; base and tuned are measured as ``eval`` measures them, on held-out
prompts. The oracle's rates are the truth; the held-out reward is what the critic says to questions that no mode was
trained on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.toyworld.seeds import LIBRARIES, train_and_measure
from bench.versions import versions
from lowmem_drf.errors import LowmemError

MODES = ("vanilla", "yesno", "dense", "both")
LOG_COLUMNS = 160
"""Of the table where there is no terminal."""
RATES = ("all", "color", "shape", "direction", "physics", "quality")


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A line per mode and seed, and each mode's mean; the base's line above."""
    made = Table("critic.mode", "seed", *RATES, "held-out reward", "diversity kept", "s/update")
    if rows:
        base = rows[0]["base"]
        made.add_row(
            "(base)",
            "",
            *(f"{base['oracle'][name]:.1%}" for name in RATES),
            f"{base['heldout_reward']:.3f}",
            "100%",
            "",
            end_section=True,
        )
    for mode in dict.fromkeys(row["mode"] for row in rows):
        own = [row for row in rows if row["mode"] == mode]
        for row in own:
            made.add_row(mode, str(row["seed"]), *_cells([row]))
        if len(own) > 1:
            made.add_row(mode, "mean", *_cells(own), style="bold")
        made.add_section()
    return made


def _cells(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    rates = [f"{mean([row['tuned']['oracle'][name] for row in rows]):.1%}" for name in RATES]
    heldout = f"{mean([row['tuned']['heldout_reward'] for row in rows]):.3f}"
    diversity = f"{mean([row['tuned']['diversity'] / row['base']['diversity'] for row in rows]):.0%}"
    return [*rates, heldout, diversity, f"{mean([row['updates_s'] / row['updates'] for row in rows]):.2f}"]


def main(arguments: list[str] | None = None) -> int:
    """Prints the table as it grows; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.toyworld.critic_modes", description=__doc__.partition("\n")[0] if __doc__ else None
    )
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds")
    parser.add_argument("--preset", default="toy")
    parser.add_argument(
        "-s",
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key; repeatable",
    )
    parser.add_argument(
        "--merge",
        type=Path,
        nargs="+",
        default=[],
        help="JSON files of earlier runs of this command: their rows come first",
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    options = parser.parse_args(arguments)
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else LOG_COLUMNS)
    rows: list[dict[str, Any]] = [
        row for file in options.merge for row in json.loads(file.read_text(encoding="utf-8"))["rows"]
    ]
    done = {(row["mode"], row["seed"]) for row in rows}
    wanted = [(mode, seed) for mode in options.modes for seed in options.seeds if (mode, seed) not in done]
    try:
        for mode, seed in wanted:
            with tempfile.TemporaryDirectory() as folder:
                measured = train_and_measure(
                    seed, options.preset, [*options.overrides, f"critic.mode={mode}"], Path(folder), console
                )
            rows.append({"mode": mode, **measured})
            _save(options.json, options.preset, options.overrides, rows)
            console.print(table(rows))
    except LowmemError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    if not wanted:
        _save(options.json, options.preset, options.overrides, rows)
        console.print(table(rows))
    return 0


def _save(file: Path | None, preset: str, overrides: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "preset": preset,
            "set": overrides,
            "threads": torch.get_num_threads(),
            "versions": versions(*LIBRARIES),
            "rows": rows,
        }
        file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
