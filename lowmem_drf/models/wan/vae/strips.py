"""Segments of the Wan decoder (``vae``) in strips of rows: their values without gradient, and their recomputed
backward.

Rows of a segment's output depend on the same rows of its input and caches, and on ``halo`` rows on either side. A strip
is computed with its halo, and only its own rows count: values are those of the whole segment, and gradients add up over
the strips.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from lowmem_drf.models.wan.vae.fused import Wants

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem_drf.models.wan.vae.segments import Caches, Segment

Cotangents = tuple["Tensor | None", ...]


def sizes_of(segments: Sequence[Segment], shape_BCTHW: Sequence[int], first: bool) -> list[int]:
    """The elements of each segment's input or output, whichever is larger, if the first input has this shape. The
    decoded frames do not count."""
    batch, channels, frames, height, width = shape_BCTHW
    elements = [batch * channels * frames * height * width]
    for segment in segments[:-1]:
        channels, frames = segment.channels or channels, frames * (1 if first else segment.frame_scale)
        height, width = height * segment.row_scale, width * segment.row_scale
        elements.append(batch * channels * frames * height * width)
    return [*(max(pair) for pair in pairwise(elements)), elements[-1]]


def strips_of(segment: Segment, elements: int, largest: int, strips: int) -> int:
    """The number of strips of a segment with ``elements`` in its input or output (whichever is larger): none of them
    larger than those of the segment with the ``largest`` number, which is cut into ``strips``."""
    return 1 if segment.halo is None else -(-strips * elements // largest)


def in_strips(
    segment: Segment,
    x_BCTHW: Tensor,
    caches: Caches,
    first: bool,
    shortcut_BCTHW: Tensor | None,
    strips: int,
    wants: Wants = Wants.ALL,
) -> tuple[Tensor, Caches]:
    """A segment, strip after strip. With ``Wants.OUTPUT`` no caches are handed on. Differentiable in one strip only."""
    inputs, height = (x_BCTHW, shortcut_BCTHW, *caches), x_BCTHW.shape[3]
    strips = min(strips, height)
    if strips == 1:
        out, handed = segment(x_BCTHW, caches, first, shortcut_BCTHW, wants)
        return out, handed if wants is Wants.ALL else ()
    whole: list[Any] = []
    for core, halo in _strips(height, strips, segment.halo or 0):
        x, shortcut, *entering = (_rows(value, halo) if isinstance(value, torch.Tensor) else value for value in inputs)
        out, handed = segment(x, tuple(entering), first, shortcut, wants)
        inner = slice(core.start - halo.start, core.stop - halo.start)
        made = (out, *handed) if wants is Wants.ALL else (out,)
        scales = [segment.row_scale] + [1] * (len(made) - 1)
        if not whole:
            whole = [_of_height(part, height * scale) for part, scale in zip(made, scales, strict=True)]
        for rows, part, scale in zip(whole, made, scales, strict=True):
            if isinstance(part, torch.Tensor):
                _rows(rows, core, scale).copy_(_rows(part, inner, scale))
        del out, handed, made, part
    return whole[0], tuple(whole[1:])


def segment_backward(
    segment: Segment,
    x_BCTHW: Tensor,
    caches: Caches,
    first: bool,
    shortcut_BCTHW: Tensor | None,
    d_out_BCTHW: Tensor | None,
    d_handed: Cotangents,
    hands_back: bool,
    strips: int = 1,
) -> tuple[Tensor | None, Tensor | None, Cotangents]:
    """Backward of a segment: recomputes it with gradient, in ``strips`` strips of rows, as even as possible.

    Args:
        x_BCTHW: may be overwritten by its gradient.
        d_out_BCTHW: gradient at the output; ``None``: zero. May be overwritten.
        d_handed: gradients at the caches handed on (``None``: zero). May be overwritten.
        hands_back: whether gradients at the entering caches are wanted.

    Returns:
        Gradients at ``x_BCTHW``, ``shortcut_BCTHW`` and ``caches`` (``None``: zero, or not wanted).
    """
    inputs: list[Any] = [x_BCTHW, shortcut_BCTHW, *caches]
    if d_out_BCTHW is None and all(d is None for d in d_handed):
        return None, None, (None,) * len(caches)
    wanted = [i for i, value in enumerate(inputs) if isinstance(value, torch.Tensor) and (i < 2 or hands_back)]
    height, margin = x_BCTHW.shape[3], segment.halo or 0
    strips = min(strips, height)
    # Memory that a gradient may take. In one strip the input's gradient has its own memory, a cache's is part of a
    # larger tensor.
    in_place_of_x = strips > 1 and (d_out_BCTHW is None or d_out_BCTHW.shape != x_BCTHW.shape)
    used_up: list[Tensor | None] = [None if strips == 1 else x_BCTHW if in_place_of_x else d_out_BCTHW, None, *d_handed]
    above: Tensor | None = None
    d_inputs: dict[int, _RowSum] = {}
    for core, halo in _strips(height, strips, margin):
        leaves = [_rows(value, halo).detach() if isinstance(value, torch.Tensor) else value for value in inputs]
        if above is not None:
            leaves[0] = torch.cat([above, _rows(x_BCTHW, slice(core.start, halo.stop))], dim=3)
        inner = slice(core.start - halo.start, core.stop - halo.start)
        if in_place_of_x:  # the next strip needs rows of x that this one's gradient overwrites
            above = _rows(leaves[0], slice(max(0, core.stop - margin) - halo.start, inner.stop)).clone()
        for i in wanted:
            leaves[i].requires_grad_()
        with torch.enable_grad():
            out, handed = segment(leaves[0], tuple(leaves[2:]), first, leaves[1], Wants.GRAPH)
            graded = [(one, d) for one, d in zip(handed, d_handed, strict=True) if d is not None]
            outputs, cotangents = [_rows(one, inner) for one, _ in graded], [_rows(d, core) for _, d in graded]
            if d_out_BCTHW is not None:
                outputs.append(_rows(out, inner, segment.row_scale))
                cotangents.append(_rows(d_out_BCTHW, core, segment.row_scale))
        del out, handed, graded
        gradients = torch.autograd.grad(outputs, [leaves[i] for i in wanted], cotangents, allow_unused=True)
        del outputs, cotangents, leaves
        for i, d in zip(wanted, gradients, strict=True):
            if d is not None:
                d_inputs.setdefault(i, _RowSum(inputs[i].shape, used_up[i])).add(d, core, halo)
        del gradients, d
    x, shortcut, *rest = (d_inputs[i].total if i in d_inputs else None for i in range(len(inputs)))
    return x, shortcut, tuple(rest)


class _RowSum:
    """Sums the gradients of strips, which come from top to bottom and overlap in their halos.

    It writes rows only once their own strip has come, so the sum can take the memory of a gradient that the strips use
    up.
    """

    total: Tensor

    def __init__(self, shape: Sequence[int], used_up: Tensor | None) -> None:
        self._shape = shape
        self._used_up = used_up if used_up is not None and used_up.shape == shape else None
        self._ahead: Tensor | None = None  # of rows whose own strip has not come yet

    def add(self, d_BCTHW: Tensor, core: slice, halo: slice) -> None:
        if core.stop - core.start == self._shape[3]:
            self.total = d_BCTHW.contiguous() if self._used_up is None else self._used_up.copy_(d_BCTHW)
            return
        if core.start == 0:
            self.total = d_BCTHW.new_empty(self._shape) if self._used_up is None else self._used_up
        above, rows = core.start - halo.start, core.stop - core.start
        if self._ahead is not None:
            _rows(d_BCTHW, slice(above, above + self._ahead.shape[3])).add_(self._ahead)
        if above:
            _rows(self.total, slice(halo.start, core.start)).add_(_rows(d_BCTHW, slice(0, above)))
        _rows(self.total, core).copy_(_rows(d_BCTHW, slice(above, above + rows)))
        self._ahead = _rows(d_BCTHW, slice(above + rows, halo.stop - halo.start)).clone()


def _strips(height: int, count: int, halo: int) -> Iterator[tuple[slice, slice]]:
    """``count`` slices that cover ``height`` rows, each alone and with ``halo`` more rows on either side, where there
    are any."""
    edges = [height * i // count for i in range(count + 1)]
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        yield slice(start, stop), slice(max(0, start - halo), min(height, stop + halo))


def _rows(x_BCTHW: Tensor, rows: slice, scale: int = 1) -> Tensor:
    return x_BCTHW[:, :, :, rows.start * scale : rows.stop * scale]


def _of_height(part: Any, height: int) -> Any:
    """Memory for the whole tensor of which ``part`` is a strip. Other values have no rows."""
    return part.new_empty(*part.shape[:3], height, part.shape[4]) if isinstance(part, torch.Tensor) else part
