"""The study: ``python -m bench.evidence``.

    python -m bench.evidence --variants default vanilla --seeds 0 1 2   # goes on where it was stopped
    python -m bench.evidence --quick                                    # the main table, after few updates
    python -m bench.evidence --page                                     # docs/evidence.md from what is measured
    python -m bench.evidence --show                                     # a line for each measured checkpoint

Each run's checkpoints stay under ``--work``; figures go to ``bench/results/evidence/<variant>_<seed>.json``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from bench.evidence.page import plots, read, table, write_page
from bench.evidence.runs import line, run
from bench.evidence.variants import QUICK, VARIANTS, quick
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
    parser.add_argument("--quick", action="store_true", help=f"the main table after {QUICK} updates, kept nowhere")
    parser.add_argument("--page", action="store_true", help="train nothing: write the page and its plots")
    parser.add_argument("--show", action="store_true", help="train nothing: print what is measured")
    options = parser.parse_args(arguments)
    console = Console(soft_wrap=True)
    if options.quick:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            for name, variant in VARIANTS.items():
                if variant.group == "main":
                    run(name, quick(variant), 0, work, work / "results" / f"{name}.json", console, every=QUICK)
            print(table(read(work / "results"), "main"))
        return 0
    results = read(options.folder)
    if options.page:
        write_page(results)
        plots(results)
    elif options.show:
        for result in results:
            for row in (*result["rows"], *result.get("late", ())):
                print(line(result["variant"], result["seed"], row))
    else:
        for name, seed in ((name, seed) for seed in options.seeds for name in options.variants):
            run(name, VARIANTS[name], seed, options.work, options.folder / f"{name}_{seed}.json", console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
