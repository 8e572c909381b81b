"""Attention in fp64 at sizes where all of it would take minutes and tens of GiB: one key head with the query heads that
read it, gradients at sampled rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bench.kernels.speed import seen

CHUNK = 1024
"""Queries at a time: their scores against 32,760 keys are 256 MiB in fp64."""
SAMPLES = 256


def errors(
    arguments: Mapping[str, Any], d_out: Tensor, found: tuple[Tensor, Tensor, Tensor, Tensor], head: int = 0
) -> dict[str, float]:
    """Relative errors, in the norm, of out (all queries of these heads), and of dq, dk, dv at sampled rows. The first
    clip alone."""
    q, k, v = (arguments[name].detach()[0] for name in "qkv")
    group = q.shape[1] // k.shape[1]
    rows, keys = _sampled(len(q), q.device), _sampled(len(k), q.device)
    key, value = k[:, head].double(), v[:, head].double()
    ranges, scale = arguments.get("ranges"), q.shape[-1] ** -0.5
    exact_k, exact_v = (torch.zeros(len(keys), q.shape[-1], dtype=torch.float64, device=q.device) for _ in "kv")
    sums = {name: [0.0, 0.0] for name in ("out", "dq", "dk", "dv")}

    def add(name: str, ours: Tensor, exact: Tensor) -> None:
        sums[name][0] += (ours.double() - exact).square().sum().item()
        sums[name][1] += exact.square().sum().item()

    for one in range(head * group, (head + 1) * group):
        for start in range(0, len(q), CHUNK):
            part = slice(start, min(start + CHUNK, len(q)))
            query, upstream = q[part, one].double(), d_out[0, part, one].double()
            p = query @ key.T * scale
            if ranges is not None:
                visible = seen(ranges[:1, part], len(k))[0]
                p = p.masked_fill(~visible, torch.finfo(torch.float64).min).softmax(-1) * visible
            else:
                p = p.softmax(-1)
            out = p @ value
            add("out", found[0][0, part, one], out)
            delta = (upstream * out).sum(-1, keepdim=True)
            d_score = p[:, keys] * (upstream @ value[keys].T - delta)
            exact_k += scale * d_score.T @ query
            exact_v += p[:, keys].T @ upstream
            mine = rows[(rows >= start) & (rows < part.stop)] - start
            d_rows = p[mine] * (upstream[mine] @ value.T - delta[mine])
            add("dq", found[1][0, mine + start, one], scale * d_rows @ key)
    add("dk", found[2][0, keys, head], exact_k)
    add("dv", found[3][0, keys, head], exact_v)
    return {name: (wrong / right) ** 0.5 if right else math.nan for name, (wrong, right) in sums.items()}


def out_error(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> float:
    """Relative error, in the norm, of the first head of the first clip."""
    wrong, right = 0.0, 0.0
    key, value = k[0, :, 0].double(), v[0, :, 0].double()
    for query, ours in zip(q[0, :, 0].split(CHUNK), out[0, :, 0].split(CHUNK), strict=True):
        exact = (query.double() @ key.T * q.shape[-1] ** -0.5).softmax(-1) @ value
        wrong += (ours.double() - exact).square().sum().item()
        right += exact.square().sum().item()
    return (wrong / right) ** 0.5


def _sampled(length: int, device: torch.device) -> Tensor:
    """Rows at even distances, the first and the last among them."""
    return torch.linspace(0, length - 1, min(SAMPLES, length), device=device).round().long()
