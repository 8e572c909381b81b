"""ZeRO-3 with CPU offload against our own weight streaming, on one card, at true size with random weights: ``python -m
bench.plans.zero3 --vram 24GB``.

Both have the same models, the same update and the same cap on the allocator, one after the other in processes of their
own; ``lowmem-drf bench`` measures each. On one card ZeRO-3 partitions nothing: what is compared is how weights come
from host memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.versions import versions

WAYS = {
    "ZeRO-3, CPU offload": ("engine=zero3", "processes=1", "zero.rollout=partitioned"),
    "weight streaming": ("engine=single", "processes=1", "zero.rollout=auto"),
}


def measured(preset: str, vram: str | None, way: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The JSON of ``bench``, or ``{"error": ...}``."""
    settings = [*overrides, *WAYS[way]]
    if way == "weight streaming":
        settings.append(f"memory.stream={json.dumps(_streamed(preset, overrides))}")
    words = [*(("--vram", vram) if vram else ()), *(word for text in settings for word in ("-s", text))]
    done = subprocess.run(
        [sys.executable, "-m", "lowmem_drf", "bench", "--preset", preset, "--json", *words],
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout) if done.returncode == 0 else {"error": done.stderr.strip()}


def _streamed(preset: str, overrides: Sequence[str]) -> list[str]:
    from lowmem_drf.config import load_config

    return sorted({*load_config(preset, overrides).memory.stream, "transformer"})


def print_table(rows: dict[str, dict[str, Any]]) -> None:
    """Measured peaks and seconds, a line a stage."""
    good = {way: row for way, row in rows.items() if "error" not in row}
    stages = (
        [name for name, stage in next(iter(good.values()))["stages"].items() if stage["measured_gib"] is not None]
        if good
        else []
    )
    print("| stage | " + " | ".join(f"{way}: GiB | s" for way in good) + " |")
    print("|---" * (1 + 2 * len(good)) + "|")
    for name in stages:
        print(
            f"| {name} | "
            + " | ".join(
                f"{row['stages'][name]['measured_gib']:.2f} | {row['stages'][name]['measured_s']:.2f}"
                for row in good.values()
            )
            + " |"
        )
    totals = {way: sum(row["stages"][name]["measured_s"] for name in stages) for way, row in good.items()}
    print(
        "| together | "
        + " | ".join(f"{row['measured_peak_gib']:.2f} | {totals[way]:.2f}" for way, row in good.items())
        + " |"
    )
    for way, row in rows.items():
        if "error" in row:
            print(f"{way}: {row['error']}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", default="zero3-2gpu")
    parser.add_argument("--vram", help="let the allocator have no more than this, for example 24GB")
    parser.add_argument("-s", "--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path, help="write the two measurements there")
    asked = parser.parse_args(arguments)
    rows = {way: measured(asked.preset, asked.vram, way, asked.set) for way in WAYS}
    print_table(rows)
    if asked.json:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(
            json.dumps({"versions": versions(), "preset": asked.preset, "vram": asked.vram, "rows": rows}, indent=1)
            + "\n",
            encoding="utf-8",
        )
    return int(any("error" in row for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
