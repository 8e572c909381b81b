"""Errors of attention's gradients: sums in fp16 (``kernels/attention_half_backward.py``) beside sums in fp32
(``kernels/attention_backward.py``), both against fp64.

    python -m bench.accuracy.attention_backward --json bench/results/attention_backward.json

The error is the norm of the difference over the norm of the exact gradient, for one head of 128 channels in bf16. All
inputs are standard normal but for what a row names; both ways take the exact log-sum-exp and the exact output, rounded
to bf16, and their results are not rounded, so that the arithmetic between is what differs. The last column is the
median over tokens of the error of a token's dq, where a weak token counts as much as a strong one.

In plain PyTorch, with each rounding where a kernel rounds. Sums in fp16 are rounded after every 8 products, at least
as often as tensor cores round them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.accuracy.attention_int8 import CHANNELS, EXACT_SUM, FAR
from bench.script import make_parser, save
from lowmem_drf.kernels.attention_half_backward import D_OUT_BITS, K_BITS, P_BITS, Q_BITS, ROWS, V_BITS

STRONG = 100.0
"""Of an outlier, times the others."""
RANGE_BITS = 12
TEXT = 512


@dataclass
class Inputs:
    """(tokens, CHANNELS), in fp64, with values that bf16 has."""

    q: Tensor
    k: Tensor
    v: Tensor
    d_out: Tensor


def _far(x: Inputs) -> None:
    x.q[:, 5] += FAR
    x.k[:, 7] += FAR
    x.v[:, 9] += FAR


def _peaked(x: Inputs) -> None:
    x.q *= 3
    x.k *= 3


def _strong(x: Inputs) -> None:
    for tensor in (x.q, x.k, x.v, x.d_out):
        tensor[100] *= STRONG


def _wide(x: Inputs) -> None:
    for tensor in (x.q, x.k, x.v, x.d_out):
        tensor[:, 40] *= STRONG**0.5


def _range(x: Inputs) -> None:
    x.d_out *= 2.0 ** (-RANGE_BITS * torch.rand(len(x.d_out), 1, generator=torch.Generator().manual_seed(1)))


def _one_strong(x: Inputs) -> None:
    x.d_out[:: len(x.d_out) // 3] *= 2.0**RANGE_BITS


def _shifted(x: Inputs) -> None:
    x.v += FAR


def _text(x: Inputs) -> None:
    x.k, x.v = x.k[:TEXT], x.v[:TEXT]


CASES: dict[str, Callable[[Inputs], None]] = {
    "normal": lambda x: None,
    "512 keys": _text,
    "scores nine times as wide": _peaked,
    "a channel each of q, k and v far from zero": _far,
    "v far from zero": _shifted,
    "a token a hundred times as large": _strong,
    "a channel ten times as large": _wide,
    "d_out over a range of 2^12": _range,
    "three tokens of d_out 2^12 as large": _one_strong,
}


def inputs(case: str, tokens: int, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    made = Inputs(*torch.randn(4, tokens, CHANNELS, generator=generator, dtype=torch.float64))
    CASES[case](made)
    return Inputs(*(_bf16(x) for x in (made.q, made.k, made.v, made.d_out)))


def _bf16(x: Tensor) -> Tensor:
    return x.bfloat16().double()


def _half(x: Tensor) -> Tensor:
    return x.half().double()


def exact(x: Inputs) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """(dq, dk, dv), P and delta, all exact."""
    scale = CHANNELS**-0.5
    p = (scale * x.q @ x.k.T).softmax(-1)
    dp = x.d_out @ x.v.T
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    # as kernels have it: of the rounded output
    delta = (x.d_out * _bf16(p @ x.v)).sum(-1, keepdim=True)
    return (scale * ds @ x.k, scale * ds.T @ x.q, p.T @ x.d_out), p, delta


def in_bf16(x: Inputs, p: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums in fp32, taken for exact; P and dS in bf16."""
    scale = CHANNELS**-0.5
    ds = _bf16(p * (x.d_out @ x.v.T - delta))
    return scale * ds @ x.k, scale * ds.T @ x.q, _bf16(p).T @ x.d_out


def half_product(x: Tensor, y: Tensor) -> Tensor:
    """x y of fp16 values with sums in fp16."""
    total = torch.zeros(len(x), y.shape[1], dtype=torch.float64)
    for first in range(0, len(y), EXACT_SUM):
        total = _half(total + x[:, first : first + EXACT_SUM] @ y[first : first + EXACT_SUM])
    return total


def _unit(largest: Tensor, bits: int) -> Tensor:
    return 2.0 ** (torch.frexp(largest).exponent - bits)


def _scaled(x: Tensor, bits: int, norms: bool = False, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """(x in fp16 with values, or with norms of rows, below 2^bits, by a power of two for so many rows; these powers,
    one for each row)."""
    units = []
    for block in x.split(rows):
        largest = block.norm(dim=1).amax() if norms else block.abs().amax()
        units.append(_unit(largest, bits).expand(len(block)))
    unit = torch.cat(units)[:, None]
    return _half(x / unit), unit


def _spans(length: int) -> Iterator[slice]:
    return (slice(first, first + ROWS) for first in range(0, length, ROWS))


def in_half(x: Inputs, p: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As the kernel computes: all products but S in fp16."""
    scale = CHANNELS**-0.5
    q, q_unit = _scaled(x.q, Q_BITS)
    k, k_unit = _scaled(x.k, K_BITS)
    v, v_unit = _scaled(x.v, V_BITS, True, len(x.v))
    d_out, d_unit = _scaled(x.d_out, D_OUT_BITS, True)
    p = p * 2.0**P_BITS
    dp = half_product(d_out, v.T)
    largest = 2.0 ** (D_OUT_BITS + V_BITS + 1) * (1 - p * 2.0**-P_BITS)
    ds = _half(p * (dp - delta / d_unit / v_unit.T).clamp(-largest, largest))
    p = _half(p)
    dq, dk, dv = (torch.zeros_like(y) for y in (q, k, v))
    for some in _spans(len(k)):
        dq += half_product(ds[:, some], k[some]) * (k_unit * v_unit)[some][:1]
    for some in _spans(len(q)):
        dk += half_product(ds[some].T, q[some]) * (q_unit * d_unit)[some][:1]
        dv += half_product(p[some].T, d_out[some]) * d_unit[some][:1]
    rest = scale * 2.0**-P_BITS
    return dq * d_unit * rest, dk * v_unit * rest, dv * 2.0**-P_BITS


WAYS = {"bf16": in_bf16, "fp16 sums": in_half}


def measured(case: str, tokens: int) -> dict[str, dict[str, float]]:
    """Way -> gradient -> error."""
    x = inputs(case, tokens)
    wanted, p, delta = exact(x)
    found = {}
    for way, gradients in WAYS.items():
        got = gradients(x, p, delta)
        errors = [((one - other).norm() / other.norm()).item() for one, other in zip(got, wanted, strict=True)]
        rows = (got[0] - wanted[0]).norm(dim=1) / wanted[0].norm(dim=1)
        names = "dq", "dk", "dv", "dq of a token"
        found[way] = dict(zip(names, [*errors, rows.nanmedian().item()], strict=True))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    parser = make_parser(__spec__.name, __doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args(arguments)
    rows = {case: measured(case, options.tokens) for case in CASES}
    names = list(rows["normal"]["bf16"])
    table = Table("error in %, bf16 / fp16 sums", *names)
    for case, found in rows.items():
        table.add_row(case, *(" / ".join(f"{100 * found[way][name]:.3f}" for way in WAYS) for name in names))
    Console(width=None if sys.stdout.isatty() else 130).print(table)
    save(options.json, {"rows": rows, "tokens": options.tokens}, "torch")
    return 0


if __name__ == "__main__":
    sys.exit(main())
