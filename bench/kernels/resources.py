"""What each kernel asks of each card: registers, shared memory, spills. Compiled ahead of time, no card is needed.

    python -m bench.kernels.resources --card 89
    python -m bench.kernels.resources --json bench/results/kernel_resources.json

Compiles every ``Variant`` of every file in ``kernels/``, as Triton's just-in-time compiler does for aligned tensors:
pointers and arguments named ``stride…`` are multiples of 16, and so is what a variant calls ``"i32:16"`` (the notation
of Triton's own ahead-of-time compiler). Registers and spilled bytes are ptxas' own figures, shared memory is Triton's.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

FOLDER = Path(__file__).resolve().parents[2] / "kernels"
WORKERS = 2
LOG_COLUMNS = 200
"""Of the table where there is no terminal."""
ALIGNMENT = 16


@dataclass(frozen=True)
class Resource:
    """One kernel with one tile on one card."""

    file: str
    kernel: str
    name: str
    """Of the variant: kernel, dtype, constants, tile."""
    card: int
    dtype: str
    constants: dict[str, Any]
    tile: dict[str, int]
    warps: int
    stages: int
    registers: int
    """Of a thread."""
    shared_kib: float
    """Of a block."""
    spill_bytes: int
    """Stored and loaded, as ptxas counts them: instructions' bytes of a thread, each place in the program once."""
    compile_s: float


def kernel_files() -> list[str]:
    """Names of the modules in ``kernels/`` that hold kernels."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "tiles")


def resources(*cards: int) -> list[Resource]:
    """Compiles all variants for these cards, in two processes.

    Raises:
        RuntimeError: Triton is interpreted here.
    """
    if os.environ.get("TRITON_INTERPRET"):
        raise RuntimeError(
            "TRITON_INTERPRET is set: there is nothing to compile in this process; run python -m bench.kernels.resources"
        )
    jobs = [
        (name, card, index) for name in kernel_files() for card in cards for index in range(len(_variants(name, card)))
    ]
    with tempfile.TemporaryDirectory() as cache:
        workers = ProcessPoolExecutor(
            WORKERS, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(cache,)
        )
        with workers as pool:
            return list(pool.map(_compile, *zip(*jobs, strict=True)))


def _start_worker(cache: str) -> None:
    from triton import knobs

    knobs.cache.dir = cache
    knobs.compilation.always_compile = True  # what comes from a cache takes no time, and ptxas says nothing of it
    knobs.nvidia.dump_ptxas_log = True


@functools.cache
def _variants(name: str, card: int) -> list[Any]:
    module = importlib.import_module(f"lowmem_drf.kernels.{name}")
    if not hasattr(module, "variants"):
        raise AttributeError(
            f"kernels/{name}.py has no variants(card): what it may launch cannot be compiled ahead of time"
        )
    return list(module.variants(card))


def _compile(name: str, card: int, index: int) -> Resource:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    variant = _variants(name, card)[index]
    kernel, tile = variant.kernel, variant.tile
    constants = {**variant.constants, **tile.sizes}
    start, log = time.perf_counter(), io.StringIO()
    try:
        kinds = {
            argument: "constexpr" if argument in constants else variant.types[argument] for argument in kernel.arg_names
        }
        aligned = [
            i
            for i, (argument, kind) in enumerate(kinds.items())
            if kind.startswith("*") or kind.endswith(":16") or argument.startswith("stride")
        ]
        signature = {argument: kind.removesuffix(":16") for argument, kind in kinds.items()}
        source = ASTSource(
            kernel, signature, constexprs=constants, attrs={(i,): [["tt.divisibility", ALIGNMENT]] for i in aligned}
        )
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(source, target=GPUTarget("cuda", card, 32), options=options)
    except Exception as error:
        raise RuntimeError(f"kernels/{name}.py: {variant.name} does not compile for sm_{card}: {error!r}") from None
    taken = time.perf_counter() - start
    registers, spilled = _from_ptxas(log.getvalue())
    dtype = next((kind.lstrip("*") for kind in variant.types.values() if kind.startswith("*")), "")
    of_tile = {"tile": dict(tile.sizes), "warps": tile.warps, "stages": tile.stages}
    measured = {
        "registers": registers,
        "shared_kib": compiled.metadata.shared / 1024,
        "spill_bytes": spilled,
        "compile_s": taken,
    }
    return Resource(name, kernel.__name__, variant.name, card, dtype, dict(variant.constants), **of_tile, **measured)


def _from_ptxas(log: str) -> tuple[int, int]:
    """(registers, bytes of spill stores and loads). Raises ValueError where there are none to read: zero must mean
    zero."""
    registers, spills = re.findall(r"Used (\d+) registers", log), re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    if not registers or not spills:
        raise ValueError(f"ptxas said nothing of registers or spills: {log[:500]!r}")
    return max(map(int, registers)), sum(map(int, spills))


def table(rows: Iterable[Resource]) -> Table:
    made = Table(
        "kernel",
        "card",
        "dtype",
        "constants",
        "tile",
        "warps",
        "stages",
        "registers",
        "shared KiB",
        "spill bytes",
        "compile s",
    )
    for row in rows:
        shape = [" ".join(f"{key}={value}" for key, value in values.items()) for values in (row.constants, row.tile)]
        figures = [str(row.registers), f"{row.shared_kib:.1f}", str(row.spill_bytes), f"{row.compile_s:.1f}"]
        made.add_row(
            row.kernel,
            f"sm_{row.card}",
            row.dtype,
            *shape,
            str(row.warps),
            str(row.stages),
            *figures,
            style="red" if row.spill_bytes else None,
        )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels.resources", description=__doc__.partition("\n")[0] if __doc__ else None
    )
    parser.add_argument(
        "--card", type=int, nargs="+", help="compute capabilities, 89 for 8.9; without it, all in kernels/tiles.py"
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET"):  # read when a kernel is defined: too late for this process
        clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        return subprocess.run(
            [sys.executable, "-m", "bench.kernels.resources", *(sys.argv[1:] if arguments is None else arguments)],
            env=clean,
        ).returncode
    from bench.versions import versions
    from lowmem_drf.kernels.tiles import CARDS

    rows = resources(*(options.card or CARDS))
    Console(soft_wrap=True, width=None if sys.stdout.isatty() else LOG_COLUMNS).print(table(rows))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        found = {"versions": versions("torch", "triton"), "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
