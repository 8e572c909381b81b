"""ZeRO-3 with CPU offload against our weight streaming, on one card, at true size with random weights.

    python -m bench.plans.zero3 --vram 24GB

Both run the same update of the same models under the same cap on the allocator, one after the other in separate
processes; ``lowmem-drf bench`` measures each. On one card ZeRO-3 partitions nothing, so the comparison is how weights
come from host memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from bench.script import add_overrides, make_parser, save

WAYS = {
    "ZeRO-3, CPU offload": ("engine=zero3", "processes=1", "zero.rollout=partitioned"),
    "weight streaming": ("engine=single", "processes=1", "zero.rollout=auto"),
}


def measured(preset: str, vram: str | None, way: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The JSON of ``lowmem-drf bench``, or ``{"error": ...}``."""
    settings = [*overrides, *WAYS[way]]
    if way == "weight streaming":
        settings.append(f"memory.stream={json.dumps(_streamed(preset, overrides))}")
    words = [*(("--vram", vram) if vram else ()), *(word for text in settings for word in ("-s", text))]
    command = [sys.executable, "-m", "lowmem_drf", "bench", "--preset", preset, "--json", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else {"error": done.stderr.strip()}


def _streamed(preset: str, overrides: Sequence[str]) -> list[str]:
    from lowmem_drf.config import load_config

    return sorted({*load_config(preset, overrides).memory.stream, "transformer"})


def print_table(rows: dict[str, dict[str, Any]]) -> None:
    """Measured peaks and seconds, one line per stage."""
    good = {way: row for way, row in rows.items() if "error" not in row}
    first = next(iter(good.values()))["stages"] if good else {}
    stages = [name for name, stage in first.items() if stage["measured_gib"] is not None]
    print(f"| stage | {' | '.join(f'{way}: GiB | s' for way in good)} |")
    print("|---" * (1 + 2 * len(good)) + "|")
    for name in stages:
        made = [row["stages"][name] for row in good.values()]
        cells = [f"{stage['measured_gib']:.2f} | {stage['measured_s']:.2f}" for stage in made]
        print(f"| {name} | {' | '.join(cells)} |")
    totals = []
    for row in good.values():
        seconds = sum(row["stages"][name]["measured_s"] for name in stages)
        totals.append(f"{row['measured_peak_gib']:.2f} | {seconds:.2f}")
    print(f"| together | {' | '.join(totals)} |")
    for way, row in rows.items():
        if "error" in row:
            print(f"{way}: {row['error']}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns 1 if a measurement failed."""
    parser = make_parser(__spec__.name, __doc__)
    parser.add_argument("--preset", default="zero3-2gpu")
    parser.add_argument("--vram", help="cap of the allocator, for example 24GB")
    add_overrides(parser)
    options = parser.parse_args(arguments)
    rows = {way: measured(options.preset, options.vram, way, options.overrides) for way in WAYS}
    print_table(rows)
    save(options.json, {"preset": options.preset, "vram": options.vram, "rows": rows})
    return int(any("error" in row for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
