"""Registers, shared memory and spills of every kernel on every card, from ahead-of-time compilation without a card.

    python -m bench.kernels.resources --card 89
    python -m bench.kernels.resources --json bench/results/kernel_resources.json

Compiles every ``Variant`` of every file in ``kernels/`` as Triton's just-in-time compiler does for aligned tensors:
pointers, arguments named ``stride…`` and arguments of type ``"i32:16"`` (the notation of Triton's ahead-of-time
compiler) are multiples of 16. ptxas reports registers and spilled bytes, Triton the shared memory. Products, barriers
and the types of sums are those of one pass of the loop with the most products, as Triton's IR and PTX have them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import itertools
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

from bench.script import make_parser, save

FOLDER = Path(__file__).resolve().parents[2] / "kernels"
WORKERS, FEW = 2, 16
LOG_COLUMNS = 200
"""Width of the table when the output is not a terminal."""
ALIGNMENT = 16
REGISTERS, SHARED, WARPS = 65536, {80: 164, 90: 228}, {80: 64, 90: 64}
"""Of a multiprocessor: registers; KiB of shared memory, 100 on the other cards, of which each block takes one more; and
warps, 48 on the other cards (CUDA C++ Programming Guide, technical specifications per compute capability)."""
TENSOR_CORES = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async)[\w.]*?\.(f16|f32|s32)\b")
"""The first type is that of the sums."""
Job = tuple[str, int, int]
"""File, card, index of the variant."""


@dataclass(frozen=True)
class Resource:
    """One kernel with one tile on one card."""

    file: str
    kernel: str
    name: str
    """The variant's name: kernel, dtype, constants, tile."""
    card: int
    dtype: str
    constants: dict[str, Any]
    tile: dict[str, int]
    warps: int
    stages: int
    registers: int
    """Per thread."""
    shared_kib: float
    """Per block."""
    spill_bytes: int
    """Bytes per thread that spill instructions store and load, as ptxas counts them: each instruction once."""
    blocks: int
    """On one multiprocessor at a time, by registers, shared memory and warps."""
    products: int
    """Matrix products in one pass of the loop that has the most."""
    barriers: int
    """Of all threads of a block, in that pass; 0 without products."""
    sums: str
    """Types in which tensor cores sum in that pass: ``"f16 s32"``."""
    compile_s: float


def kernel_files() -> list[str]:
    """Names of the modules in ``kernels/`` that define a kernel."""
    defines = re.compile(r"^def \w+_kernel\(", re.MULTILINE)
    return sorted(path.stem for path in FOLDER.glob("*.py") if defines.search(path.read_text(encoding="utf-8")))


def all_jobs(cards: Iterable[int]) -> list[Job]:
    """All variants for these cards."""
    pairs = itertools.product(kernel_files(), cards)
    return [(file, card, index) for file, card in pairs for index in range(len(_variants(file, card)))]


def quick_jobs(cards: Iterable[int]) -> list[Job]:
    """Each kernel with each tile that a card tries, once: with the largest constants, which usually take the most
    registers."""
    chosen: dict[tuple[int, str, str], tuple[int, Job]] = {}
    for file, card in itertools.product(kernel_files(), cards):
        for index, variant in enumerate(_variants(file, card)):
            key = card, variant.kernel.__name__, repr(variant.tile)
            size = sum(int(value or 0) for value in variant.constants.values())
            if size > chosen.get(key, (-1,))[0]:
                chosen[key] = size, (file, card, index)
    return [job for _, job in chosen.values()]


def covering_jobs(cards: Iterable[int]) -> list[Job]:
    """``quick_jobs``, and each kernel with each of its constants and types once, whatever the tile."""
    quick = quick_jobs(cards)

    def key(job: Job) -> tuple[Any, ...]:
        variant = _variants(job[0], job[1])[job[2]]
        return job[1], variant.kernel.__name__, repr(variant.constants), repr(variant.types)

    left = {key(job): job for job in reversed(all_jobs(cards))}
    for job in quick:
        left.pop(key(job), None)
    return [*quick, *left.values()]


def one_job_each(cards: Iterable[int]) -> list[Job]:
    """Each kernel once, with the first of ``quick_jobs``."""
    jobs = {}
    for job in reversed(quick_jobs(cards)):
        jobs[job[1], _variants(job[0], job[1])[job[2]].kernel.__name__] = job
    return list(jobs.values())


def resources(jobs: Sequence[Job]) -> list[Resource]:
    """Compiles these jobs in two processes, or few of them in one.

    Raises:
        RuntimeError: Triton is interpreted here.
    """
    if os.environ.get("TRITON_INTERPRET"):
        cure = "run python -m bench.kernels.resources"
        raise RuntimeError(f"TRITON_INTERPRET is set: there is nothing to compile in this process; {cure}")
    with tempfile.TemporaryDirectory() as cache:
        spawn = multiprocessing.get_context("spawn")
        count = min(WORKERS, -(-len(jobs) // FEW))
        with ProcessPoolExecutor(count, spawn, initializer=_start_worker, initargs=(cache,)) as pool:
            return list(pool.map(_compile, *zip(*jobs, strict=True)))


def _start_worker(cache: str) -> None:
    from triton import knobs

    knobs.cache.dir = cache
    knobs.compilation.always_compile = True  # a cached kernel would take no time and have no output of ptxas
    knobs.nvidia.dump_ptxas_log = True


@functools.cache
def _variants(name: str, card: int) -> list[Any]:
    module = importlib.import_module(f"lowmem_drf.kernels.{name}")
    if not hasattr(module, "variants"):
        raise AttributeError(f"kernels/{name}.py has no variants(card), which ahead-of-time compilation needs")
    return list(module.variants(card))


def _compile(file: str, card: int, index: int) -> Resource:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    variant = _variants(file, card)[index]
    kernel, tile = variant.kernel, variant.tile
    constants = {**variant.constants, **tile.sizes}
    start, log = time.perf_counter(), io.StringIO()
    try:
        kinds = {name: "constexpr" if name in constants else variant.types[name] for name in kernel.arg_names}
        aligned = [
            kind.startswith("*") or kind.endswith(":16") or argument.startswith("stride")
            for argument, kind in kinds.items()
        ]
        attributes = {(i,): [["tt.divisibility", ALIGNMENT]] for i, yes in enumerate(aligned) if yes}
        signature = {argument: kind.removesuffix(":16") for argument, kind in kinds.items()}
        source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(source, target=GPUTarget("cuda", card, 32), options=options)
    except Exception as error:
        raise RuntimeError(f"kernels/{file}.py: {variant.name} does not compile for sm_{card}: {error!r}") from None
    taken = time.perf_counter() - start
    registers, spilled = _from_ptxas(log.getvalue())
    return Resource(
        file=file, kernel=kernel.__name__, name=variant.name, card=card,
        dtype=next((kind.lstrip("*") for kind in variant.types.values() if kind.startswith("*")), ""),
        constants=dict(variant.constants), tile=dict(tile.sizes), warps=tile.warps, stages=tile.stages,
        registers=registers, shared_kib=compiled.metadata.shared / 1024, spill_bytes=spilled, compile_s=taken,
        blocks=_blocks(card, registers, compiled.metadata.shared / 1024, tile.warps),
        products=_products(compiled.asm["ttir"]), barriers=_barriers(compiled.asm["ptx"]),
        sums=" ".join(sorted(set(TENSOR_CORES.findall(_hot(compiled.asm["ptx"]))))),
    )  # fmt: skip


def _from_ptxas(log: str) -> tuple[int, int]:
    """(registers, bytes of spill stores and loads). Raises ValueError if the log has none: zero must mean zero."""
    registers, spills = re.findall(r"Used (\d+) registers", log), re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    if not registers or not spills:
        raise ValueError(f"ptxas said nothing of registers or spills: {log[:500]!r}")
    return max(map(int, registers)), sum(map(int, spills))


def _blocks(card: int, registers: int, shared_kib: float, warps: int) -> int:
    """Registers are given to a warp in units of 256."""
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256 * warps)
    return int(min(by_registers, SHARED.get(card, 100) // (shared_kib + 1), WARPS.get(card, 48) // warps))


def _products(ir: str) -> int:
    """``tt.dot`` between a loop's first line and the closing brace below it."""
    loops, most = [], 0
    for line in ir.splitlines():
        indent = len(line) - len(line.lstrip())
        if "scf.for" in line:
            loops.append([indent, 0])
        elif loops and line.lstrip().startswith("}") and indent == loops[-1][0]:
            most = max(most, loops.pop()[1])
        elif loops and re.search(r"= tt\.dot ", line):
            loops[-1][1] += 1
    return most


def _hot(ptx: str) -> str:
    """The stretch between two labels or branches with the most tensor core instructions."""
    stretches = re.split(r"^\$L__BB|^\s*(?:@%p\d+ )?bra\b", ptx, flags=re.MULTILINE)
    return max(stretches, key=lambda stretch: len(TENSOR_CORES.findall(stretch)))


def _barriers(ptx: str) -> int:
    hot = _hot(ptx)
    return len(re.findall(r"\bbar\.sync\b", hot)) if TENSOR_CORES.search(hot) else 0


def table(rows: Iterable[Resource]) -> Table:
    figures = ("warps", "stages", "registers", "shared KiB", "spill bytes")
    figures += ("blocks", "products", "barriers", "sums", "compile s")
    made = Table("kernel", "card", "dtype", "constants", "tile", *figures)
    for row in rows:
        shape = [" ".join(f"{key}={value}" for key, value in values.items()) for values in (row.constants, row.tile)]
        numbers = [str(row.warps), str(row.stages), str(row.registers), f"{row.shared_kib:.1f}", str(row.spill_bytes)]
        numbers += [str(row.blocks), str(row.products), str(row.barriers), row.sums]
        style = "red" if row.spill_bytes else None
        made.add_row(
            row.kernel, f"sm_{row.card}", row.dtype, *shape, *numbers, f"{row.compile_s:.1f}", style=style
        )  # fmt: skip
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    parser = make_parser(__spec__.name, __doc__)
    parser.add_argument("--card", type=int, nargs="+", help="compute capabilities, 89 for 8.9; default: all")
    says = {
        "once": "of these cards each kernel once; beside --card",
        "quick": "each kernel with each tile once",
        "covering": "as --quick, and each kernel with each of its constants and types once",
    }
    for name, said in says.items():
        parser.add_argument(f"--{name}", type=int, nargs="+", metavar="CARD", help=said)
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET"):  # read when a kernel is defined: too late for this process
        clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        words = sys.argv[1:] if arguments is None else arguments
        return subprocess.run([sys.executable, "-m", __spec__.name, *words], env=clean).returncode
    from lowmem_drf.kernels.tiles import CARDS

    some = [*one_job_each(options.once or []), *quick_jobs(options.quick or [])]
    some += covering_jobs(options.covering or [])
    rows = resources([*some, *all_jobs(options.card or ([] if some else CARDS))])
    Console(soft_wrap=True, width=None if sys.stdout.isatty() else LOG_COLUMNS).print(table(rows))
    save(options.json, {"rows": [asdict(row) for row in rows]}, "torch", "triton")
    return 0


if __name__ == "__main__":
    sys.exit(main())
