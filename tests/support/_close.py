"""Derived tolerances: a kernel's error may be twice that of eager PyTorch in the same dtype, plus one rounding of the
result.

Both errors are against fp64. FlashAttention's and attention-gym's tests use the same rule; see docs/kernels.md.
"""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_budget(name: str, actual: Tensor, exact: Tensor, eager: Tensor) -> None:
    """Element by element, and in the norm.

    Args:
        actual: the kernel's result.
        exact: the naive form on the same inputs in fp64.
        eager: the naive form in the kernel's dtype.
    """
    assert actual.shape == exact.shape == eager.shape, (
        f"{name}: shapes {tuple(actual.shape)}, {tuple(exact.shape)}, {tuple(eager.shape)}"
    )
    assert actual.dtype == eager.dtype, f"{name}: {actual.dtype}, eager gives {eager.dtype}"
    assert exact.dtype == torch.float64, f"{name}: the reference must be fp64, not {exact.dtype}"
    assert bool(actual.isfinite().all()), f"{name}: not finite"
    eps = torch.finfo(actual.dtype).eps
    ours, theirs = (actual.double() - exact).abs(), (eager.double() - exact).abs()
    largest = exact.abs().max()
    worst, budget = ours.max(), 2 * (theirs.max() + eps * largest)
    place = tuple(int(i) for i in torch.unravel_index(ours.argmax(), ours.shape))
    figures = f"budget {budget:.3g}, eager {theirs.max():.3g}, largest value {largest:.3g}"
    assert worst <= budget, f"{name}: off by {worst:.3g} at {place}, {figures}"
    norm, norm_budget = ours.norm(), 2 * (theirs.norm() + eps * exact.norm())
    assert norm <= norm_budget, f"{name}: error norm {norm:.3g}, budget {norm_budget:.3g}, eager {theirs.norm():.3g}"
