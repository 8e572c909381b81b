"""Attention, 8-bit products and the row operations at the models' sizes: speed, and but for the last also values in
fp64."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bench.card import expected
from bench.card.reference import SAMPLES, errors, out_error
from bench.card.rows import FAR, Row, State, at_most, failed, near
from bench.kernels.ops import OPS, Op, build
from bench.kernels.speed import (
    CUBLAS,
    DETERMINISTIC,
    FLOPS,
    GIB,
    MIB,
    copy_ms,
    forward_flops,
    median_ms,
    moved_bytes,
    pass_flops,
    passes,
    peak_bytes,
    rivals,
)

LABELS = (
    "Wan-1.3B, 832x480x81, self",
    "Wan-14B, 832x480x81, self",
    "Wan-1.3B, to 512 text tokens",
    "critic, 24 questions packed",
)
"""Of ``bench.kernels.ops``."""
SELF = LABELS[:2]
"""Public figures are for long self-attention."""
ERROR = 0.01
"""Relative error of a bf16 attention, in the norm: about three roundings of 2^-9."""
INT8_ERROR = 0.012
"""Of int8 attention: 0.9% (``bench.accuracy.attention_int8``), and one rounding of the result."""
FAR_CHANNEL = 15.0


def attention() -> Iterator[Row]:
    """Our kernel and PyTorch's back ends, forward and backward."""
    op = next(op for op in OPS if op.name == "attention")
    _warm_up()
    for label in LABELS:
        arguments = build(op, op.sizes[label], torch.bfloat16, torch.device("cuda"))
        flops, d_out = forward_flops(arguments), torch.randn_like(arguments["q"])
        reached: dict[str, dict[str, float]] = {"forward": {}, "backward": {}}
        for name, function in rivals(op, arguments):
            if name == "naive":  # its matrix of all scores has 48 GiB
                continue
            try:
                for direction, run in passes(function, arguments):
                    if direction in reached and (name, direction) != (DETERMINISTIC, "forward"):
                        ms, peak = median_ms(run), peak_bytes(run) / MIB
                        rate = reached[direction][name] = FLOPS[direction] * flops / ms / 1e9
                        wanted, source = expected.attention(name, direction) if label in SELF else (None, "")
                        note = f"{ms:.2f} ms, {peak:.0f} MiB; {source}".rstrip("; ")
                        yield near(f"{label}: {name}, {direction}", rate, "TFLOP/s", wanted, note)
                yield from _values(f"{label}: {name}", function, arguments, d_out)
            except (RuntimeError, NotImplementedError, ValueError) as error:  # no back end for it; out of memory
                row = failed(f"{label}: {name}", error)
                yield row if name == "triton" else Row(row.what, "cannot", note=row.note)
            gc.collect()
            torch.cuda.empty_cache()
        yield from _against_others(label, reached)
        yield from _both_ways(label, op, arguments, d_out)
    yield from _chosen_tiles()


def _both_ways(label: str, op: Op, arguments: Mapping[str, Any], d_out: Tensor) -> Iterator[Row]:
    """Our backward with sums in fp32 and in fp16, where this card may take either."""
    from lowmem_drf.kernels.attention_backward import tuned_ways

    every, mine = tuned_ways.configs, tuned_ways.of_this_card()
    if len(mine) == 1 or arguments.get("ranges") is not None:
        return
    try:
        for config in mine:
            tuned_ways.configs = [config]
            name = expected.FP16_SUMS if config.kwargs["HALF"] else expected.FP32_SUMS
            run = dict(passes(op.fused, arguments))["backward"]
            ms, peak = median_ms(run), peak_bytes(run) / MIB
            wanted, source = expected.attention(name, "backward") if label in SELF else (None, "")
            note = f"{ms:.2f} ms, {peak:.0f} MiB; {source}".rstrip("; ")
            rate = FLOPS["backward"] * forward_flops(arguments) / ms / 1e9
            yield near(f"{label}: {name}, backward", rate, "TFLOP/s", wanted, note)
            yield from _values(f"{label}: {name}", op.fused, arguments, d_out)
    except (RuntimeError, ValueError) as error:
        yield failed(f"{label}: both ways of the backward", error)
    finally:
        tuned_ways.configs = every


def _chosen_tiles() -> Iterator[Row]:
    """The fastest tile of each kernel and size, of those that the table has for this card."""
    from lowmem_drf.kernels.tiles import choices

    for one in choices():
        sizes = "x".join(map(str, one["sizes"]))
        yield Row(f"tile of {one['kernel']}, {' '.join([one['case'], sizes]).strip()}", one["tile"])


def _against_others(label: str, reached: Mapping[str, dict[str, float]]) -> Iterator[Row]:
    """Our kernel beside the fastest other one."""
    for direction, rates in reached.items():
        ours = rates.pop("triton", None)
        rates.pop(DETERMINISTIC, None)
        if ours and rates:
            best = max(rates, key=lambda name: rates[name])
            share = ours / rates[best]
            state: State = "ok" if share >= 1 - FAR else "off"
            yield Row(f"{label}: triton beside {best}, {direction}", share, "times its speed", 1.0, state)


def _values(what: str, function: Any, arguments: Mapping[str, Any], d_out: Tensor) -> Iterator[Row]:
    out = function(**arguments)
    leaves = [arguments[name] for name in "qkv"]
    found = (out.detach(), *torch.autograd.grad(out, leaves, d_out))
    for name, error in errors(arguments, d_out, found).items():
        yield at_most(f"{what}, error of {name}", error, "", ERROR, "one key head, sampled rows, against fp64")


def int8() -> Iterator[Row]:
    """Attention in 8 bits beside PyTorch's in 16, without gradient; its error on normal inputs, and with channels far
    from zero."""
    op = next(op for op in OPS if op.name == "attention_int8")
    _warm_up()
    for label, sizes in op.sizes.items():
        arguments = build(op, sizes, torch.bfloat16, torch.device("cuda"))
        flops, reached = forward_flops(arguments), {}
        for name, function in rivals(op, arguments):
            if name not in ("triton", "SDPA flash", "SDPA cuDNN"):
                continue
            try:
                run = next(run for direction, run in passes(function, arguments) if direction == "forward")
                ms, peak = median_ms(run), peak_bytes(run) / MIB
            except (RuntimeError, NotImplementedError, ValueError) as error:
                yield failed(f"{label}: {name}", error) if name == "triton" else Row(f"{label}: {name}", "cannot")
                continue
            rate = reached[name] = flops / ms / 1e9
            wanted, source = expected.attention(expected.INT8 if name == "triton" else name, "forward")
            note = f"{ms:.2f} ms, {peak:.0f} MiB; {source}".rstrip("; ")
            yield near(f"{label}: {name}", rate, "TFLOP/s", wanted, note)
        yield from _against_others(label, {"forward": reached})
        for kind in ("normal inputs", "channels far from zero"):
            error = out_error(**arguments, out=op.fused(**arguments))
            yield at_most(f"{label}: error, {kind}", error, "", INT8_ERROR, "one head, against fp64")
            for name, channel in (("q", 5), ("k", 7)):
                arguments[name][..., channel] += FAR_CHANNEL
        del arguments
        torch.cuda.empty_cache()
    yield from _chosen_tiles()


def products() -> Iterator[Row]:
    """8-bit products of the frozen layers, with the rounding of what they multiply, beside cuBLAS's in bf16."""
    op = next(op for op in OPS if op.name == "int8_linear")
    for label, sizes in op.sizes.items():
        arguments = build(op, sizes, torch.bfloat16, torch.device("cuda"))
        taken: dict[tuple[str, str], float] = {}
        for name, function in rivals(op, arguments):
            if name == "naive":
                continue
            try:
                for direction, run in passes(function, arguments):
                    if direction == "both":
                        continue
                    ms = taken[name, direction] = median_ms(run)
                    rate, wanted = pass_flops(arguments, direction) / ms / 1e9, expected.product(name == "triton")
                    yield near(f"{label}: {name}, {direction}", rate, "TOP/s", wanted, f"{ms:.2f} ms")
                if name == "triton":
                    yield from _layer_values(label, op, arguments)
            except (RuntimeError, ValueError) as error:
                yield failed(f"{label}: {name}", error)
        for direction in ("forward", "backward"):
            if ("triton", direction) in taken and (CUBLAS, direction) in taken:
                times = taken[CUBLAS, direction] / taken["triton", direction]
                state: State = "ok" if times > 1 else "off"
                yield Row(f"{label}: int8 beside 16 bit, {direction}", times, "times its speed", None, state)
        torch.cuda.empty_cache()


def _layer_values(label: str, op: Op, arguments: Mapping[str, Any]) -> Iterator[Row]:
    """Some rows against the same integers in fp64."""
    some = slice(-SAMPLES, None)  # the last ones: a block of rows that is not full
    inputs = {name: value.detach() for name, value in arguments.items()}
    found, exact = [], []
    for function, results, wide in ((op.fused, found, False), (op.naive, exact, True)):
        x = inputs["x_NI"][some].double() if wide else inputs["x_NI"]
        x.requires_grad_()
        out = function(x, inputs["w8_OI"], inputs["scale_O"], inputs["bias_O"])
        d_out = torch.ones_like(out) * inputs["scale_O"].to(out.dtype)
        results += [out.detach()[some], torch.autograd.grad(out, x, d_out)[0][some]]
    for name, one, other in zip(("out", "dx"), found, exact, strict=True):
        error = ((one.double() - other).norm() / other.norm()).item()
        yield at_most(f"{label}: error of {name}", error, "", ERROR, "sampled rows, against fp64")


def row_ops() -> Iterator[Row]:
    """Every fused row operation, and PyTorch's, against a copy of as many bytes."""
    _warm_up()
    copied = GIB
    wanted, source = expected.copy()
    yield near("copy of 0.5 GiB", copied / copy_ms(copied) / 1e6, "GB/s", wanted, source)
    for op in (op for op in OPS if not op.products):
        label, sizes = next(iter(op.sizes.items()))
        arguments = build(op, sizes, torch.bfloat16, torch.device("cuda"))
        copies = {name: copy_ms(count) for name, count in moved_bytes(op.fused, arguments).items()}
        for name, function in (("fused", op.fused), ("naive", op.naive)):
            what = f"{op.name}, {label}: {name}"
            try:
                for direction, run in passes(function, arguments):
                    ms = median_ms(run)
                    share = expected.SHARES["row op"] if name == "fused" else None
                    yield near(f"{what}, {direction}", copies[direction] / ms, "of a copy", share, f"{ms:.3f} ms")
            except (RuntimeError, ValueError) as error:
                yield failed(what, error)
        torch.cuda.empty_cache()
    yield from products()
    yield from _chosen_tiles()


def _warm_up() -> None:
    """The first memory that a process asks for is slow to come."""
    torch.empty(GIB, dtype=torch.int8, device="cuda")
