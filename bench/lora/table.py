"""The table of LoRA files: every layout through every door, and what diffusers makes of it.

    python -m bench.lora.table
    python -m bench.lora.table --only LoKr

Cells of doors hold the largest error of any parameter's effective change over its bound (``facts``): up to 1 is right,
and most are near 0, since a right reader computes more exactly than it has to. "refused" is followed by the words of
the message that name the kind. Exit code 1 if a row is wrong.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.lora import changes, damaged, layouts, libraries, methods, refused
from bench.lora.doors import DOORS, agrees, diffusers_says, judged, judged_inspection
from bench.lora.rows import Row
from bench.script import make_parser, reports_errors, save

READ = [*layouts.ROWS, *changes.ROWS, *libraries.ROWS]
REFUSED = [*refused.ROWS, *methods.ROWS, *damaged.ROWS]
assert len({row.name for row in (*READ, *REFUSED)}) == len(READ) + len(REFUSED)


def measured(row: Row, folder: Path) -> tuple[list[str], bool]:
    """The cells of a row, and whether all of our doors are right."""
    file = row.made()
    path = file.write(folder)
    dtypes = {str(value.dtype).removeprefix("torch.") for key, value in file.tensors.items() if "alpha" not in key}
    doors = [judged(door, row, path) for door in DOORS.values()]
    right, cell, programs = judged_inspection(row, path)
    diffusers = "never ends" if row.hangs else diffusers_says(file, path)
    if not row.kind and right and not agrees(programs["diffusers"], diffusers, file):
        right, diffusers = False, f"{diffusers} (WRONG: inspect-lora says {programs['diffusers']})"
    if not row.kind and right and (programs["train --init-lora"] == "no") == file.trainable:
        right, cell = False, f"WRONG: says that --init-lora takes it: {programs['train --init-lora']}"
    cells = [row.name, "/".join(sorted(dtypes)) or "-", *(cell for _, cell in doors), cell, diffusers]
    return cells, right and all(good for good, _ in doors)


COLUMNS = ("layout", "dtype", *DOORS, "inspect-lora", "diffusers")


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("bench.lora.table", __doc__)
    parser.add_argument("--only", default="", help="rows whose names contain this")
    options = parser.parse_args(arguments)
    table, results, wrong = Table(*COLUMNS), [], []
    with tempfile.TemporaryDirectory() as folder:
        for number, row in enumerate(row for row in (*READ, *REFUSED) if options.only.lower() in row.name.lower()):
            cells, right = measured(row, Path(folder) / str(number))
            table.add_row(*cells)
            results.append(dict(zip(COLUMNS, cells, strict=True)))
            wrong += [] if right else [row.name]
    Console(width=200).print(table)
    print(
        f"{len(results) - len(wrong)} of {len(results)} rows are right" + "".join(f"\nwrong: {name}" for name in wrong)
    )
    save(options.json, {"rows": results}, "diffusers", "peft", "torch", "safetensors")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
