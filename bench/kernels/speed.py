"""Every kernel against its naive form, and attention against PyTorch's and xformers': time and peak memory, on a CUDA
card.

    python -m bench.kernels.speed --json bench/results/kernels.json
    python -m bench.kernels.speed --ops attention rope_qk --quick

An op is measured only if its tests pass on this card: they run first. A figure is the median of many runs, each after
the L2 cache was overwritten; peak memory is what a pass adds to what was allocated before it. Ops that move memory are
held against ``copy_`` of as many bytes in the same run, counting each byte of their inputs, of what they keep and of
their results once. FLOPs of attention are those of the pairs that are attended to, 4 d in the forward and 10 d in the
backward. ``bench.kernels.ops`` is the list: what each op takes, and at which sizes.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import importlib.util
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from bench.kernels.ops import OPS, Op, build
from bench.versions import versions

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests" / "kernels"
LOG_COLUMNS = 180
"""Of the table where there is no terminal."""
SPIN = 2_000_000
"""Cycles that the card waits before a measured run, so that launching it from Python is not part of it: about a
millisecond."""
ENOUGH_MS, LEAST, MOST = 300.0, 5, 100
"""So long is one figure measured, in so many runs at least and at most."""
GIB, MIB = 1024**3, 1024**2
FLOPS = {"forward": 1.0, "backward": 2.5, "both": 3.5}
"""Of the forward's: the backward has five products for its two."""

Pass = Callable[..., Any]


def rivals(op: Op, arguments: Mapping[str, Any]) -> Iterator[tuple[str, Pass]]:
    """Name and function of everything that computes the same. All take the op's arguments."""
    yield "triton", op.fused
    yield "naive", op.naive
    if not op.products:
        return
    from torch.nn.attention import SDPBackend

    mask = None if arguments.get("ranges") is None else seen(arguments["ranges"], arguments["k"].shape[1])[:, None]
    for name, backend in (
        ("flash", SDPBackend.FLASH_ATTENTION),
        ("cuDNN", SDPBackend.CUDNN_ATTENTION),
        ("efficient", SDPBackend.EFFICIENT_ATTENTION),
    ):
        yield f"SDPA {name}", functools.partial(_sdpa, backend, mask)
    if mask is None and importlib.util.find_spec("xformers"):
        yield "xformers", _xformers


def _sdpa(backend: Any, mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor, ranges: Tensor | None = None) -> Tensor:
    """``ranges`` are in the mask."""
    from torch.nn.attention import sdpa_kernel

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(
            1, 2
        )


def _xformers(q: Tensor, k: Tensor, v: Tensor, ranges: None = None) -> Tensor:
    return importlib.import_module("xformers.ops").memory_efficient_attention(q, k, v)


def seen(ranges_BL3: Tensor, keys: int) -> Tensor:
    """(B or 1, L, keys): which keys a query sees."""
    prefix, start, stop = ranges_BL3[..., None].unbind(2)
    key = torch.arange(keys, device=ranges_BL3.device)
    return (key < prefix) | ((key >= start) & (key < stop))


def forward_flops(arguments: Mapping[str, Any]) -> int:
    """Of the pairs that are attended to, by all heads: two products of 2 d each."""
    batch, queries, heads, dim = arguments["q"].shape
    keys, ranges = arguments["k"].shape[1], arguments.get("ranges")
    pairs = batch * queries * keys if ranges is None else int(seen(ranges, keys).sum()) * (batch // len(ranges))
    return 4 * pairs * heads * dim


def passes(function: Pass, arguments: Mapping[str, Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Forward without a graph, and where there are gradients backward alone and both."""

    def forward() -> Any:
        with torch.no_grad():
            return function(**arguments)

    yield "forward", forward
    leaves = _leaves(arguments)
    if not leaves:
        return
    with torch.no_grad():
        upstream = [torch.randn_like(out) for out in _tensors(function(**arguments))]
    yield (
        "backward",
        functools.partial(torch.autograd.grad, _tensors(function(**arguments)), leaves, upstream, retain_graph=True),
    )
    yield "both", lambda: torch.autograd.grad(_tensors(function(**arguments)), leaves, upstream)


def moved_bytes(function: Pass, arguments: Mapping[str, Any]) -> dict[str, int]:
    """What each pass must at least read and write: inputs and results; the upstream gradient, what was kept, and
    gradients. By pass."""
    kept: list[Tensor] = []
    with torch.no_grad():
        forward = _bytes([*_tensors(arguments.values()), *_tensors(function(**arguments))])
    leaves = _leaves(arguments)
    if not leaves:
        return {"forward": forward}
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        outs = _tensors(function(**arguments))
    upstream = [torch.ones_like(out) for out in outs]
    # a gradient that is the upstream one moves nothing
    backward = _bytes([*upstream, *kept, *torch.autograd.grad(outs, leaves, upstream)])
    return {"forward": forward, "backward": backward, "both": forward + backward}


def _leaves(arguments: Mapping[str, Any]) -> list[Tensor]:
    return [tensor for tensor in _tensors(arguments.values()) if tensor.requires_grad]


def _tensors(values: Any) -> list[Tensor]:
    return [values] if isinstance(values, Tensor) else [value for value in values if isinstance(value, Tensor)]


def _bytes(tensors: Sequence[Tensor]) -> int:
    """Of different memory: what is read twice, as the rotary tables are, counts once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def median_ms(run: Callable[[], Any]) -> float:
    """By CUDA events; each run finds an L2 cache full of something else."""
    run()  # compiles, and times tiles
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    other = torch.empty(2 * max(properties.L2_cache_size, 64 * MIB), dtype=torch.int8, device="cuda")

    def timed(count: int) -> list[float]:
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for start, end in events:
            other.zero_()
            torch.cuda._sleep(SPIN)
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    return statistics.median(timed(min(MOST, max(LEAST, int(ENOUGH_MS / max(timed(2)[1], 1e-3))))))


def peak_bytes(run: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def copy_ms(moved: int) -> float:
    """Of a copy that reads and writes so many bytes together."""
    source = torch.empty(moved // 2, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return median_ms(lambda: target.copy_(source))


def measure(op: Op, label: str, dtype: torch.dtype, device: str = "cuda") -> list[dict[str, Any]]:
    """Rows of all who compute it. A rival that cannot is a row that says why; the kernel itself must."""
    arguments = build(op, op.sizes[label], dtype, torch.device(device))
    flops = forward_flops(arguments) if op.products else 0
    moved = {} if op.products else moved_bytes(op.fused, arguments)
    copies = {name: copy_ms(count) for name, count in moved.items()}
    rows: list[dict[str, Any]] = []
    for name, function in rivals(op, arguments):
        same = {"op": op.name, "sizes": label, "dtype": str(dtype).removeprefix("torch."), "by": name}
        try:
            for direction, ms, peak in _figures(function, arguments):
                row = {**same, "pass": direction, "ms": ms, "peak_mib": peak / MIB}
                if op.products:
                    row["tflops"] = FLOPS[direction] * flops / ms / 1e9
                else:
                    row |= {"gb_per_s": moved[direction] / ms / 1e6, "of_copy": copies[direction] / ms}
                rows.append(row)
        # no such back end for these sizes, or out of memory
        except (RuntimeError, NotImplementedError, ValueError) as error:
            if name == "triton":
                raise
            rows.append({**same, "cannot": str(error).strip().splitlines()[0][:120]})
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def _figures(function: Pass, arguments: Mapping[str, Any]) -> Iterator[tuple[str, float, int]]:
    for direction, run in passes(function, arguments):
        yield direction, median_ms(run), peak_bytes(run)


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    made = Table("op", "sizes", "dtype", "pass", "by", "ms", "peak MiB", "GB/s", "of a copy", "TFLOP/s")
    for row in rows:
        names = [row["op"], row["sizes"], row["dtype"]]
        if "cannot" in row:
            made.add_row(*names, "", row["by"], f"cannot: {row['cannot']}", style="dim")
            continue
        speed = (
            [f"{row['gb_per_s']:,.0f}", f"{row['of_copy']:.0%}", ""]
            if "of_copy" in row
            else ["", "", f"{row['tflops']:,.0f}"]
        )
        style = "bold" if row["by"] == "triton" else None
        made.add_row(*names, row["pass"], row["by"], f"{row['ms']:.3f}", f"{row['peak_mib']:,.0f}", *speed, style=style)
    return made


def tests_pass(ops: Sequence[Op]) -> bool:
    """Runs the tests of these ops on this machine; what failed is on stderr."""
    files = [TESTS / f"test_{name}.py" for name in dict.fromkeys(op.file for op in ops)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-2000:], sep="\n", file=sys.stderr)
    return done.returncode == 0


def _commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table as it grows; returns the exit code: 1 where an op's tests fail, 2 without a card."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels.speed", description=__doc__.partition("\n")[0] if __doc__ else None
    )
    parser.add_argument("--ops", nargs="+", choices=[op.name for op in OPS], help="without it, all")
    parser.add_argument("--quick", action="store_true", help="of each op the first sizes only")
    parser.add_argument(
        "--no-tests",
        action="store_true",
        help="measure whatever the tests would say; the result says that it was not gated",
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.kernels.speed: no CUDA card here; python -m bench.kernels.resources needs none", file=sys.stderr)
        return 2
    chosen = [op for op in OPS if not options.ops or op.name in options.ops]
    if options.no_tests:
        print("not gated: the tests of these ops were not run")
    elif not tests_pass(chosen):
        print("bench.kernels.speed: tests fail; a kernel that is wrong has no speed", file=sys.stderr)
        return 1
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else LOG_COLUMNS)
    rows: list[dict[str, Any]] = []
    for op in chosen:
        for label in list(op.sizes)[: 1 if options.quick else None]:
            for dtype in op.dtypes:
                found = measure(op, label, dtype)
                console.print(table(found))
                rows += found
                if options.json:
                    _save(options.json, rows, gated=not options.no_tests)
    return 0


def _save(path: Path, rows: Sequence[Mapping[str, Any]], gated: bool) -> None:
    card = torch.cuda.get_device_properties(torch.cuda.current_device())
    device = {"name": card.name, "capability": f"{card.major}.{card.minor}", "memory_gib": card.total_memory / GIB}
    libraries = ["torch", "triton", *(["xformers"] if importlib.util.find_spec("xformers") else [])]
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {
        "device": device,
        "cuda": torch.version.cuda,
        "versions": versions(*libraries),
        "commit": _commit(),
        "gated": gated,
        "rows": rows,
    }
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
