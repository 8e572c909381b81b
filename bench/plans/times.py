"""CPU seconds of plans, each in a process of its own, as a user's first and second command.

    python -m bench.plans.times [PRESET ...]

For each preset the first plan and the same again, which is read from the disk; then the advice of ``--vram 8GB`` for
rtx4090. The plans of the user are left alone. Needs no card and no weights; takes a few minutes on one core.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

PRESETS = ("rtx4090", "rtx4090-wan14b", "rtx4090-wan22-5b")
LADDER = ("rtx4090", "--vram", "8GB")


def cpu_seconds(cache: str, preset: str, *options: str) -> float:
    """Of one ``lowmem-drf plan``, its imports too."""
    before = os.times()
    command = [sys.executable, "-m", "lowmem_drf", "plan", "--preset", preset, *options]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "LOWMEM_DRF_CACHE": cache})
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    with tempfile.TemporaryDirectory() as cache:
        print(f"{'plan':32} {'first s':>8} {'again s':>8}")
        for preset, *options in [*((name,) for name in sys.argv[1:] or PRESETS), *([] if sys.argv[1:] else [LADDER])]:
            first, again = (cpu_seconds(cache, preset, *options) for _ in range(2))
            print(f"{' '.join((preset, *options)):32} {first:8.1f} {again:8.1f}", flush=True)


if __name__ == "__main__":
    main()
