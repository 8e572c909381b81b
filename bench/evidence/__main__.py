"""The study: ``python -m bench.evidence``.

    python -m bench.evidence --variants toy fast --seeds 0    # goes on where it was stopped
    python -m bench.evidence --show                           # what is measured so far, a line a checkpoint

Each run's checkpoints stay under ``--work``; figures go to ``bench/results/evidence/<variant>_<seed>.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

from bench.evidence.runs import line, run
from bench.evidence.variants import VARIANTS
from bench.script import reports_errors

FOLDER = Path(__file__).parents[1] / "results" / "evidence"


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Trains and measures, or shows; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.evidence", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="training seeds")
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"), help="folder of the runs")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the JSON files")
    parser.add_argument("--show", action="store_true", help="train nothing: print what is there")
    options = parser.parse_args(arguments)
    console = Console(soft_wrap=True)
    for name, seed in ((name, seed) for seed in options.seeds for name in options.variants):
        file = options.folder / f"{name}_{seed}.json"
        if not options.show:
            run(name, seed, options.work, file, console)
        elif file.exists():
            for row in json.loads(file.read_text(encoding="utf-8"))["rows"]:
                print(line(name, seed, row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
