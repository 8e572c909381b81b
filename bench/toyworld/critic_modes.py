"""The critic's modes side by side: ToyWorld trained with one global question, with structured yes/no questions, with
explanations, and with both.

    python -m bench.toyworld.critic_modes --seeds 0 1 2 --json bench/results/critic_modes.json

All modes train with the same preset and seeds. Base and tuned are measured as by ``eval``, on held-out prompts. The
oracle's rates are the truth; the held-out reward is the critic's, on questions that no mode was trained on.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.script import add_overrides, make_parser, reports_errors, save
from bench.toyworld.seeds import LIBRARIES, train_and_measure

MODES = ("vanilla", "yesno", "dense", "both")
LOG_COLUMNS = 160
"""Width of the table when the output is not a terminal."""
RATES = ("all", "color", "shape", "direction", "physics", "quality")


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The base's line, then a line per mode and seed and the mean of each mode."""
    made = Table("critic.mode", "seed", *RATES, "held-out reward", "diversity kept", "s/update")
    if rows:
        base = rows[0]["base"]
        rates = (f"{base['oracle'][name]:.1%}" for name in RATES)
        made.add_row("(base)", "", *rates, f"{base['heldout_reward']:.3f}", "100%", "", end_section=True)
    for mode in dict.fromkeys(row["mode"] for row in rows):
        own = [row for row in rows if row["mode"] == mode]
        for row in own:
            made.add_row(mode, str(row["seed"]), *_cells([row]))
        if len(own) > 1:
            made.add_row(mode, "mean", *_cells(own), style="bold")
        made.add_section()
    return made


def _cells(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    mean = statistics.fmean
    rates = [f"{mean(row['tuned']['oracle'][name] for row in rows):.1%}" for name in RATES]
    heldout = f"{mean(row['tuned']['heldout_reward'] for row in rows):.3f}"
    diversity = f"{mean(row['tuned']['diversity'] / row['base']['diversity'] for row in rows):.0%}"
    return [*rates, heldout, diversity, f"{mean(row['updates_s'] / row['updates'] for row in rows):.2f}"]


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Prints the table as it grows; returns the exit code."""
    parser = make_parser(__spec__.name, __doc__)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds")
    parser.add_argument("--preset", default="toy")
    add_overrides(parser)
    text = "JSON files of earlier runs of this command; their rows come first"
    parser.add_argument("--merge", type=Path, nargs="+", default=[], help=text)
    options = parser.parse_args(arguments)
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else LOG_COLUMNS)
    earlier = [json.loads(file.read_text(encoding="utf-8"))["rows"] for file in options.merge]
    rows: list[dict[str, Any]] = [row for some in earlier for row in some]
    setting = {"preset": options.preset, "set": options.overrides, "threads": torch.get_num_threads()}
    done = {(row["mode"], row["seed"]) for row in rows}
    wanted = [(mode, seed) for mode in options.modes for seed in options.seeds if (mode, seed) not in done]
    for mode, seed in wanted:
        overrides = [*options.overrides, f"critic.mode={mode}"]
        with tempfile.TemporaryDirectory() as folder:
            measured = train_and_measure(seed, options.preset, overrides, Path(folder), console)
        rows.append({"mode": mode, **measured})
        save(options.json, setting | {"rows": rows}, *LIBRARIES)
        console.print(table(rows))
    if not wanted:
        save(options.json, setting | {"rows": rows}, *LIBRARIES)
        console.print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
