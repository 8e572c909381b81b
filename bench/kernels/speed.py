"""Time and peak memory of every kernel against its naive form, and of attention against PyTorch's and xformers'. Needs
a CUDA card.

    python -m bench.kernels.speed --json bench/results/kernels.json
    python -m bench.kernels.speed --ops attention rope_qk --quick

The tests of an op run first, on this card; it is measured only if they pass. A time is the median of many runs, each
after the L2 cache was overwritten. Peak memory is the increase over what was allocated before the pass. Ops that move
memory are compared with ``copy_`` of as many bytes in the same run; inputs, kept tensors and results count once each.
FLOPs of attention count the pairs of query and key that are attended to: 4 d in the forward, 10 d in the backward; of
8-bit products they are those of 16-bit ones.
``bench.kernels.ops`` lists the inputs and sizes of each op.
"""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.util
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
from bench.script import make_parser, save
from lowmem_drf.assembly.trials import card_seconds

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests" / "kernels"
LOG_COLUMNS = 180
"""Width of the table when the output is not a terminal."""
SPIN = 2_000_000
"""Cycles (about a millisecond) that the card waits before a measured run, so that Python's launch does not count."""
ENOUGH_MS, LEAST, MOST = 300.0, 5, 100
"""Measuring time of one figure, and the least and largest number of runs."""
GIB, MIB = 1024**3, 1024**2
FLOPS = {"forward": 1.0, "backward": 2.5, "both": 3.5}
"""Multiples of an attention's forward: the backward has five products, the forward two."""
CUBLAS = "PyTorch, 16 bit"
"""Name of the product of the same weights by cuBLAS."""
DETERMINISTIC = "triton deterministic"
"""Name of our attention whose gradients have the same bits every time; its forward is that of ``triton``."""

Pass = Callable[..., Any]


def rivals(op: Op, arguments: Mapping[str, Any]) -> Iterator[tuple[str, Pass]]:
    """Name and function of every implementation. All take the arguments of the op."""
    yield "triton", op.fused
    yield "naive", op.naive
    if not op.products:
        return
    if op.name == "int8_linear":
        scale = arguments["scale_O"][:, None] / 127
        yield CUBLAS, functools.partial(_in_16_bit, (arguments["w8_OI"] * scale).to(arguments["x_NI"].dtype))
        return
    if op.name == "attention":
        yield DETERMINISTIC, functools.partial(op.fused, deterministic=True)
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
    """Ignores ``ranges``: the mask holds them."""
    from torch.nn.attention import sdpa_kernel

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def _in_16_bit(weight_OI: Tensor, x_NI: Tensor, bias_O: Tensor, **_: Tensor) -> Tensor:
    return F.linear(x_NI, weight_OI, bias_O)


def _xformers(q: Tensor, k: Tensor, v: Tensor, ranges: None = None) -> Tensor:
    return importlib.import_module("xformers.ops").memory_efficient_attention(q, k, v)


def seen(ranges_BL3: Tensor, keys: int) -> Tensor:
    """(B or 1, L, keys): True if the query sees the key."""
    prefix, start, stop = ranges_BL3[..., None].unbind(2)
    key = torch.arange(keys, device=ranges_BL3.device)
    return (key < prefix) | ((key >= start) & (key < stop))


def pass_flops(arguments: Mapping[str, Any], direction: str) -> float:
    """FLOPs of a pass. A linear layer that is frozen has one product each way."""
    if "w8_OI" in arguments:
        return 2 * len(arguments["x_NI"]) * arguments["w8_OI"].numel() * (2 if direction == "both" else 1)
    return FLOPS[direction] * forward_flops(arguments)


def forward_flops(arguments: Mapping[str, Any]) -> int:
    """FLOPs of all heads of an attention: two products of 2 d for each pair that is attended to."""
    batch, queries, heads, dim = arguments["q"].shape
    keys, ranges = arguments["k"].shape[1], arguments.get("ranges")
    pairs = batch * queries * keys if ranges is None else int(seen(ranges, keys).sum()) * (batch // len(ranges))
    return 4 * pairs * heads * dim


def passes(function: Pass, arguments: Mapping[str, Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The forward without a graph; if there are gradients, also the backward alone, and both."""

    def forward() -> Any:
        with torch.no_grad():
            return function(**arguments)

    yield "forward", forward
    leaves = _leaves(arguments)
    if not leaves:
        return
    with torch.no_grad():
        upstream = [torch.randn_like(out) for out in _tensors(function(**arguments))]
    grad = functools.partial(torch.autograd.grad, retain_graph=True)
    yield "backward", functools.partial(grad, _tensors(function(**arguments)), leaves, upstream)
    yield "both", lambda: torch.autograd.grad(_tensors(function(**arguments)), leaves, upstream)


def moved_bytes(function: Pass, arguments: Mapping[str, Any]) -> dict[str, int]:
    """Least number of bytes that each pass reads and writes: inputs and results in the forward; the upstream gradient,
    kept tensors and gradients in the backward."""
    kept: list[Tensor] = []
    with torch.no_grad():
        forward = _bytes([*_tensors(arguments.values()), *_tensors(function(**arguments))])
    leaves = _leaves(arguments)
    if not leaves:
        return {"forward": forward}
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        outs = _tensors(function(**arguments))
    upstream = [torch.ones_like(out) for out in outs]
    # _bytes counts a gradient that is the upstream tensor itself once: it moves nothing
    backward = _bytes([*upstream, *kept, *torch.autograd.grad(outs, leaves, upstream)])
    return {"forward": forward, "backward": backward, "both": forward + backward}


def _leaves(arguments: Mapping[str, Any]) -> list[Tensor]:
    return [tensor for tensor in _tensors(arguments.values()) if tensor.requires_grad]


def _tensors(values: Any) -> list[Tensor]:
    return [values] if isinstance(values, Tensor) else [value for value in values if isinstance(value, Tensor)]


def _bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of distinct memory: rotary tables, which are read twice, count once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def median_ms(run: Callable[[], Any]) -> float:
    """Median by CUDA events; the L2 cache is overwritten before each run."""
    from lowmem_drf.kernels import tiles

    with tiles.timing(card_seconds):
        run()  # compiles, and chooses tiles
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
    """Time of a copy whose reads and writes add up to ``moved`` bytes."""
    source = torch.empty(moved // 2, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return median_ms(lambda: target.copy_(source))


def measure(op: Op, label: str, dtype: torch.dtype, device: str = "cuda") -> list[dict[str, Any]]:
    """One row per implementation and pass. A rival that fails becomes a row with the reason; the kernel itself must
    run."""
    arguments = build(op, op.sizes[label], dtype, torch.device(device))
    moved = {} if op.products else moved_bytes(op.fused, arguments)
    copies = {name: copy_ms(count) for name, count in moved.items()}
    rows: list[dict[str, Any]] = []
    for name, function in rivals(op, arguments):
        same = {"op": op.name, "sizes": label, "dtype": str(dtype).removeprefix("torch."), "by": name}
        try:
            for direction, ms, peak in _figures(function, arguments):
                row = {**same, "pass": direction, "ms": ms, "peak_mib": peak / MIB}
                if op.products:
                    row["tflops"] = pass_flops(arguments, direction) / ms / 1e9
                else:
                    row |= {"gb_per_s": moved[direction] / ms / 1e6, "of_copy": copies[direction] / ms}
                rows.append(row)
        except (RuntimeError, NotImplementedError, ValueError) as error:  # no back end for these sizes; out of memory
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
        moved = [f"{row['gb_per_s']:,.0f}", f"{row['of_copy']:.0%}"] if "of_copy" in row else ["", ""]
        speed = [*moved, f"{row['tflops']:,.0f}" if "tflops" in row else ""]
        style = "bold" if row["by"] == "triton" else None
        made.add_row(*names, row["pass"], row["by"], f"{row['ms']:.3f}", f"{row['peak_mib']:,.0f}", *speed, style=style)
    return made


def tests_pass(ops: Sequence[Op]) -> bool:
    """Runs the tests of these ops on this machine; prints failures to stderr."""
    files = [str(TESTS / name) for name in dict.fromkeys(op.test_file for op in ops)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-2000:], sep="\n", file=sys.stderr)
    return done.returncode == 0


def _commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table as it grows; returns the exit code: 1 if the tests of an op fail, 2 without a card."""
    parser = make_parser(__spec__.name, __doc__)
    parser.add_argument("--ops", nargs="+", choices=[op.name for op in OPS], help="default: all")
    parser.add_argument("--quick", action="store_true", help="only the first sizes of each op")
    parser.add_argument("--no-tests", action="store_true", help="measure without running the tests; the result says so")
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
    found = {"device": device, "cuda": torch.version.cuda, "commit": _commit(), "gated": gated, "rows": rows}
    save(path, found, *libraries)


if __name__ == "__main__":
    sys.exit(main())
