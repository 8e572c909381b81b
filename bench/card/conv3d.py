"""The VAE's convolutions at true size in both layouts, forward and gradient of the input."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.card import expected
from bench.card.rows import Row, at_most, failed, near
from bench.kernels.speed import MIB, median_ms, peak_bytes

SHAPES = {
    "96 channels, 832x480": (96, 6, 482, 834),
    "192 channels, 416x240": (192, 6, 242, 418),
    "384 channels, 208x120": (384, 4, 122, 210),
}
"""Padded inputs (C, T, H, W) of the Wan VAE's 3x3x3 convolutions on a chunk of four frames."""
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last_3d}
ERROR = {torch.bfloat16: 0.02, torch.float32: 0.005}
"""Relative difference that is allowed between the layouts; fp32 runs in TF32."""


def conv3d() -> Iterator[Row]:
    """Time, memory besides the result, and whether the layouts agree."""
    for dtype in (torch.bfloat16, torch.float32):
        for label, shape in SHAPES.items():
            first: dict[str, Tensor] = {}
            for layout, memory_format in LAYOUTS.items():
                what = f"{str(dtype).removeprefix('torch.')}, {label}, {layout}"
                try:
                    yield from _one(what, shape, dtype, memory_format, first)
                except RuntimeError as error:  # out of memory, or no engine
                    yield failed(what, error)
                torch.cuda.empty_cache()


def _one(
    what: str, shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, first: dict[str, Tensor]
) -> Iterator[Row]:
    torch.manual_seed(0)
    channels = shape[0]
    x = torch.randn(1, *shape, device="cuda", dtype=dtype).to(memory_format=layout).requires_grad_()
    weight = torch.randn(channels, channels, 3, 3, 3, device="cuda", dtype=dtype).to(memory_format=layout)
    weight *= (27 * channels) ** -0.5
    with torch.no_grad():
        upstream = torch.randn_like(F.conv3d(x, weight))
    flops = 2 * 27 * channels * upstream.numel()
    out = F.conv3d(x, weight)
    runs: dict[str, Callable[[], Tensor]] = {
        "forward": lambda: F.conv3d(x.detach(), weight),
        "d input": lambda: torch.autograd.grad(out, x, upstream, retain_graph=True)[0],
    }
    for direction, run in runs.items():
        ms = median_ms(run)
        wanted, source = expected.conv3d(dtype)
        yield near(f"{what}, {direction}", flops / ms / 1e9, "TFLOP/s", wanted, f"{ms:.2f} ms; {source}")
        result = run()
        extra = (peak_bytes(run) - result.nbytes) / MIB
        least = x.nbytes / MIB  # columns of an im2col would be 27 times the input
        yield Row(
            f"{what}, {direction}, workspace",
            extra,
            "MiB",
            f"<= {4 * least:.0f}",
            "ok" if extra <= 4 * least else "off",
        )
        if direction in first:
            error = (result - first[direction]).norm() / first[direction].norm()
            yield at_most(f"{what}, {direction}, against the other layout", error.item(), "", ERROR[dtype])
        else:
            first[direction] = result.clone()
