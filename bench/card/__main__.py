"""What the first ten minutes on a card should settle: is everything right there, and as fast and small as expected?

    python -m bench.card --minutes 9 --output card

Sections run in order of value, each in a process of its own; one that fails or takes too long is named, and the next
begins. ``results.json`` and ``results.md`` in the output folder have all that is known so far, ``NAME.log`` what a
section printed. Exit code 0: all sections are done and nothing is wrong; 1: else; 2: there is no card. Nothing is
downloaded.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from bench.card.parent import run_all
from bench.card.sections import BY_NAME, Section
from bench.card.table import markdown, rich_table
from bench.script import make_parser, reports_errors, save
from bench.versions import versions
from lowmem_drf.files import write_text
from lowmem_drf.terminal import make_console

LIBRARIES = ("torch", "triton", "diffusers", "transformers", "peft")
INTERRUPTED = 130
ROOT = Path(__file__).resolve().parents[2]
LOG_COLUMNS = 180
"""Width of the tables when the output is not a terminal."""


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = make_parser("bench.card", __doc__)
    parser.add_argument("--minutes", type=float, default=15.0, help="all sections together; cuts the tail (15)")
    parser.add_argument("--patience", type=float, default=1.0, help="multiplies every section's own limit (1)")
    parser.add_argument("--output", type=Path, default=Path("card"), help="folder of the results (card)")
    parser.add_argument(
        "--record", action="store_true", help="write what was measured to the presets, docs/fit.md and the README"
    )
    parser.add_argument("--only", nargs="+", choices=list(BY_NAME), metavar="NAME", help=f"of {', '.join(BY_NAME)}")
    parser.add_argument(
        "--section", choices=list(BY_NAME), metavar="NAME", help="run this one here; --json has its rows"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.card: no CUDA card here; lowmem-drf plan --preset NAME needs none", file=sys.stderr)
        return 2
    if options.section:
        return _section(BY_NAME[options.section], options.json)
    chosen = [BY_NAME[name] for name in options.only or BY_NAME]
    patient = [replace(section, limit_s=options.patience * section.limit_s) for section in chosen]
    code = _all(patient, options.minutes, options.output)
    if options.record and code != INTERRUPTED:
        from bench.plans import record

        record.main([str(options.output)])
    return code


def _section(section: Section, path: Path | None) -> int:
    rows = []
    for row in section.rows():
        rows.append(asdict(row))
        print(*(value for value in rows[-1].values() if value not in ("", None)), flush=True)
        save(path, {"section": section.name, "rows": rows}, "torch")
    return 0


def _all(sections: list[Section], minutes: float, folder: Path) -> int:
    def command(section: Section, path: Path) -> list[str]:
        return [sys.executable, "-m", "bench.card", "--section", section.name, "--json", str(path.resolve())]

    card = torch.cuda.get_device_properties(torch.cuda.current_device())
    gib, found = round(card.total_memory / 1024**3, 1), versions(*LIBRARIES)
    about = {"card": card.name, "gib": gib, "cuda": torch.version.cuda, "versions": found}
    about |= {"date": time.strftime("%Y-%m-%d"), "commit": _commit()}
    heading = f"{card.name}, {gib} GiB; {', '.join(f'{name} {version}' for name, version in found.items())}"
    console = make_console(soft_wrap=True, width=None if sys.stdout.isatty() else LOG_COLUMNS)
    console.print(heading, highlight=False)
    end, results = time.monotonic() + 60 * minutes, []
    for name in ("SIGTERM", "SIGHUP"):  # the section that runs must end too
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)
    try:
        for result in run_all(sections, minutes, folder, command, about):
            results.append(result)
            write_text(folder / "results.md", markdown(heading, results))
            console.print(rich_table(result) if result.rows else f"{result.name}: {result.outcome}, {result.reason}")
            console.print(f"{max(0.0, end - time.monotonic()):.0f} s left", highlight=False)
    except KeyboardInterrupt:
        console.print(f"Interrupted. {folder} has what was measured.")
        return INTERRUPTED
    bad = [result.name for result in results if not result.good]
    console.print(f"{len(results) - len(bad)} of {len(results)} sections are good. {folder / 'results.md'} has all.")
    return 1 if bad else 0


def _commit() -> str:
    """Of this checkout, abbreviated."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    return "no git checkout"


if __name__ == "__main__":
    sys.exit(main())
