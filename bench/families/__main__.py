"""Measures every family of generators on a tiny one with random weights, and writes the README's table.

    python -m bench.families                 # about a minute of CPU each; --only wan: one of them
    python -m bench.families --only          # the table alone, from bench/results/families.json

The relay is compared with one graph, the decode in chunks with the library's, an export with what diffusers loads. 20
updates with ToyWorld's critic are to raise the reward at fixed prompts and noise by more than two standard errors, for
every seed. Exit code 1 if a figure is not within its limits.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from bench.families.measure import measure, passes
from bench.families.table import README, RESULTS, page, read, table
from bench.families.tiny import name_of, writer_of
from bench.script import reports_errors
from bench.versions import versions
from lowmem_drf.files import write_text
from lowmem_drf.models.generators import FAMILIES


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.families", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="*", choices=[name_of(family) for family in FAMILIES], metavar="FAMILY")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of the trainings")
    options = parser.parse_args(arguments)
    rows, bad = read(), False
    for family in FAMILIES:
        name = name_of(family)
        if options.only is not None and name not in options.only:
            continue
        write = writer_of(name)
        if write is None:
            print(f"{name}: no tiny generator (bench/families/tiny.py)", file=sys.stderr)
            bad = True
            continue
        torch.set_num_threads(1)  # sums depend on their number
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = measure(family, write(Path(folder) / "generator"), Path(folder), options.seeds)
        bad |= not passes(rows[name])
        libraries = versions("torch", "diffusers", "transformers", "peft")
        write_text(RESULTS, json.dumps({"families": rows, "versions": libraries}, indent=1) + "\n")
        print(f"{name}: {json.dumps(rows[name])}", file=sys.stderr, flush=True)
    write_text(README, page(rows))
    print(table(rows), end="")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
