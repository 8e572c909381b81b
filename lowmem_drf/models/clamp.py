"""The clamp at the end of a decoder, with a gradient that brings saturated pixels back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class InwardClamp(torch.autograd.Function):
    """``x.clamp(low, high)`` with another gradient out of range: it passes if a descent step leads back, and is zero if
    it leads further out.

    With the clamp's own gradient, zero on either side, training could never bring back a pixel that left the range.
    With the identity's gradient, pixels would be pushed ever further out, unseen by the critic. The rule is that of
    ``ClampWithGrad`` in K. Crowson's VQGAN+CLIP (2021). In range it is the clamp's gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.low, ctx.high = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        outwards = ((x > ctx.high) & (d < 0)) | ((x < ctx.low) & (d > 0))
        return d.masked_fill(outwards, 0), None, None
