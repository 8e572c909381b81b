"""What PyTorch's CUDA allocator takes for every preset, beside its plan.

    python -m bench.plans.allocator                      # prints the table of docs/memory.md
    python -m bench.plans.allocator --run rtx4060 …      # measures these here first, each held to its card's memory

Measures with ``lowmem-drf bench``, in few denoising steps: memory does not grow with more. Figures are kept in
``bench/results/allocator.json``.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.script import reports_errors
from bench.versions import versions
from lowmem_drf.config import load_config
from lowmem_drf.errors import LowmemError
from lowmem_drf.files import write_text
from lowmem_drf.preset_files import preset_card, presets

RESULTS = Path(__file__).resolve().parents[1] / "results" / "allocator.json"
KEPT = ("peak_gib", "measured_gib")


def single_cards() -> dict[str, int]:
    """Presets for one card, and the card's GB; small cards first."""
    sizes = {name: re.match(r"(\d+) GB", preset_card(path)) for name, path in presets().items()}
    return dict(sorted(((name, int(size[1])) for name, size in sizes.items() if size), key=lambda item: item[::-1]))


def measure(name: str, gb: int) -> dict[str, Any]:
    """One preset's row. Raises LowmemError if ``bench`` fails."""
    sampler = load_config(name).sampler
    command = [sys.executable, "-m", "lowmem_drf", "bench", "--preset", name, "--vram", f"{gb}GB", "--updates", "2"]
    few = min(2, sampler.graded_steps)
    steps = few + (sampler.steps > sampler.graded_steps)
    command += ["--json", "-s", f"sampler.steps={steps}", "-s", f"sampler.graded_steps={few}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise LowmemError(f"{' '.join(command[1:])} ended with exit code {done.returncode}; its message is above")
    found = json.loads(done.stdout)
    measured = {stage: row for stage, row in found["stages"].items() if row["measured_gib"] is not None}
    stages = {stage: {key: round(row[key], 3) for key in KEPT} for stage, row in measured.items()}
    row = {"gb": gb, "usable_gib": found["usable_gib"], "reserved_gib": found["reserved_gib"]}
    return row | {"retries": found["retries"], "device": found["device"], "stages": stages}


def table(rows: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    """Markdown: the stage with the highest peak, and over all stages the largest share above the plan."""
    columns = (
        "preset",
        "card",
        "largest stage",
        "planned GiB",
        "allocated",
        "most above a plan",
        "reserved",
        "retries",
    )
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for name, row in rows.items():
        stages = row["stages"]
        largest = max(stages, key=lambda stage: stages[stage]["measured_gib"])
        over = {stage: one["measured_gib"] / one["peak_gib"] - 1 for stage, one in stages.items()}
        worst = max(over, key=lambda stage: over[stage])
        peaks = f"{stages[largest]['peak_gib']:.2f} | {stages[largest]['measured_gib']:.2f}"
        held = f"{row['reserved_gib']:.1f} | {row['retries']}"
        yield f"| `{name}` | {row['gb']} GB | {largest} | {peaks} | {over[worst]:+.1%} ({worst}) | {held} |"


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 1 if an allocator retried or a stage took more than 3% above its plan."""
    cards = single_cards()
    parser = argparse.ArgumentParser(
        prog="python -m bench.plans.allocator", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--run", nargs="*", choices=list(cards), metavar="PRESET", help="measure these (none: all)")
    parser.add_argument("--about", metavar="TEXT", help="what the card is, kept with the figures")
    options = parser.parse_args(arguments)
    kept: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"presets": {}}
    for name in cards if options.run == [] else options.run or ():
        kept["presets"][name] = measure(name, cards[name])
        kept["versions"] = versions("torch")
        write_text(RESULTS, json.dumps(kept, indent=1) + "\n")
        print(name, "measured", file=sys.stderr, flush=True)
    if options.about:
        kept["about"] = options.about
        write_text(RESULTS, json.dumps(kept, indent=1) + "\n")
    rows = {name: kept["presets"][name] for name in cards if name in kept["presets"]}
    if "about" in kept:
        print(f"{kept['about']}; torch {kept['versions']['torch']}\n")
    print("\n".join(table(rows)))
    stages = [stage for row in rows.values() for stage in row["stages"].values()]
    bad = any(row["retries"] for row in rows.values()) or any(s["measured_gib"] > 1.03 * s["peak_gib"] for s in stages)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
