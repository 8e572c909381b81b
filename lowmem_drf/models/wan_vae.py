"""The decoder of the Wan video VAE (2.1 and 2.2) as a list of segments: pure functions of one latent frame's activations and of caches.

diffusers 0.42.1, ``WanDecoder3d.forward``, cut where a chunk's activations are one tensor (two inside a residual up-block of Wan 2.2, whose
shortcut leads around its residual blocks). The segments call diffusers' own modules, so that values stay what diffusers makes of them, bit by bit.

Above the attention of the middle block a segment is a convolution or two: rows of its output depend on the same rows of its input and of its
caches, and on ``halo`` rows besides. ``pull_back`` uses that: it recomputes such a segment in strips of rows, and the gradient is the whole one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

Caches = tuple[Any, ...]
"""An entry per causal convolution with a cache: a tensor (B, C, 1 or 2, H, W), ``None`` (nothing yet) or the marker ``"Rep"`` (upsampling in
time skips the first latent frame)."""

Cotangents = tuple["Tensor | None", ...]


@dataclass(frozen=True)
class Segment:
    """A piece of the decoder. All its caches have the rows of its input."""

    module: nn.Module
    """Called with (x, its caches as a list that it writes into, first chunk?, shortcut or None)."""
    slots: int
    """Caches it reads and hands on."""
    halo: int | None = None
    """Rows of the input on either side that rows of the output depend on. ``None``: on all of them."""
    row_scale: int = 1
    """Rows of the output per row of the input."""
    opens_shortcut: bool = False
    """Its input is the shortcut too, that ends at the next segment with ``ends_shortcut``."""
    ends_shortcut: bool = False

    def __call__(self, x_BCTHW: Tensor, caches: Caches, first: bool, shortcut_BCTHW: Tensor | None = None) -> tuple[Tensor, Caches]:
        """The output and the caches handed on, in the dtype of ``x_BCTHW``, in which the weights are cast for the call if they have another:
        they are small (the largest segment of Wan 2.1 has 8 million), and no second copy has to be kept or parked."""
        handed = list(caches)
        arguments = (x_BCTHW, handed, first, shortcut_BCTHW)
        if all(weight.dtype == x_BCTHW.dtype for weight in self.module.parameters()):
            return self.module(*arguments), tuple(handed)
        weights = {name: weight.to(x_BCTHW.dtype) for name, weight in self.module.named_parameters()}
        return torch.func.functional_call(self.module, weights, arguments), tuple(handed)


def segments_of(decoder: Any, patch_size: int | None) -> tuple[Segment, ...]:
    """The segments of a ``WanDecoder3d``, in order. ``patch_size``: of the VAE's configuration."""
    middle = decoder.mid_block
    found = [Segment(_ConvIn(decoder.conv_in), slots=1, halo=1), Segment(_Residual(middle.resnets[0]), slots=2, halo=2)]
    for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
        found += [Segment(_Attention(attention), slots=0), Segment(_Residual(resnet), slots=2, halo=2)]
    for block in decoder.up_blocks:
        shortcut = getattr(block, "avg_shortcut", None)
        found += [Segment(_Residual(resnet), 2, halo=2, opens_shortcut=shortcut is not None and i == 0) for i, resnet in enumerate(block.resnets)]
        # Wan 2.1's block has a list of one, Wan 2.2's the module; the last block of either has None
        upsampler = block.upsampler if hasattr(block, "upsampler") else (block.upsamplers or [None])[0]
        if upsampler is not None:
            slots = 1 if upsampler.mode == "upsample3d" else 0
            found.append(Segment(_Upsample(upsampler, shortcut), slots, halo=1, row_scale=2, ends_shortcut=shortcut is not None))
    found.append(Segment(_Head(decoder, patch_size), slots=1, halo=1, row_scale=patch_size or 1))
    return tuple(found)


def _cached(conv: nn.Module, x: Tensor, caches: list[Any]) -> Tensor:
    """A causal convolution outside of a block, as ``WanDecoder3d.forward`` has it: the last two input frames are handed on."""
    entering = caches[0]
    last_two = x[:, :, -2:].clone()
    if last_two.shape[2] < 2 and entering is not None:
        last_two = torch.cat([entering[:, :, -1:], last_two], dim=2)
    caches[0] = last_two
    return conv(x, entering)


class _ConvIn(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, caches: list[Any], first: bool, shortcut: Tensor | None) -> Tensor:
        return _cached(self.conv, x, caches)


class _Residual(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, caches: list[Any], first: bool, shortcut: Tensor | None) -> Tensor:
        return self.block(x, feat_cache=caches, feat_idx=[0])


class _Attention(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, caches: list[Any], first: bool, shortcut: Tensor | None) -> Tensor:
        return self.block(x)


class _Upsample(nn.Module):
    def __init__(self, resample: nn.Module, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.resample, self.shortcut = resample, shortcut

    def forward(self, x: Tensor, caches: list[Any], first: bool, shortcut: Tensor | None) -> Tensor:
        x = self.resample(x, feat_cache=caches, feat_idx=[0])
        return x if self.shortcut is None else x + self.shortcut(shortcut, first_chunk=first)


class _Head(nn.Module):
    def __init__(self, decoder: Any, patch_size: int | None) -> None:
        super().__init__()
        self.norm, self.nonlinearity, self.conv, self.patch_size = decoder.norm_out, decoder.nonlinearity, decoder.conv_out, patch_size

    def forward(self, x: Tensor, caches: list[Any], first: bool, shortcut: Tensor | None) -> Tensor:
        """Pixels in [-1, 1]."""
        x = _cached(self.conv, self.nonlinearity(self.norm(x)), caches)
        if self.patch_size is not None:
            from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

            x = unpatchify(x, patch_size=self.patch_size)
        return InwardClamp.apply(x, -1.0, 1.0)


def strips_of(segment: Segment, elements: int, largest: int, strips: int) -> int:
    """Into how many strips a segment is cut that has ``elements`` in its input or output (whichever is larger), where the segment with the
    ``largest`` such number is cut into ``strips``: as many as keep its strips no larger than that one's."""
    return 1 if segment.halo is None else -(-strips * elements // largest)


def pull_back(
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
    """Recomputes a segment with gradient and pulls its cotangents back, in ``strips`` strips of rows, as even as can be.

    Args:
        d_out_BCTHW: gradient at the output; ``None``: zero. It may be overwritten.
        d_handed: gradients at the caches handed on, one each (``None``: zero). They may be overwritten.
        hands_back: whether gradients at the entering caches are wanted.

    Returns:
        Gradients at ``x_BCTHW``, at ``shortcut_BCTHW`` and at ``caches`` (``None``: zero, or not wanted).
    """
    inputs: list[Any] = [x_BCTHW, shortcut_BCTHW, *caches]
    if d_out_BCTHW is None and all(d is None for d in d_handed):
        return None, None, (None,) * len(caches)
    wanted = [i for i, value in enumerate(inputs) if isinstance(value, torch.Tensor) and (i < 2 or hands_back)]
    used_up: list[Tensor | None] = [d_out_BCTHW, None, *d_handed]
    d_inputs: dict[int, _RowSum] = {}
    height = x_BCTHW.shape[3]
    for core, halo in _strips(height, min(strips, height), segment.halo or 0):
        leaves = [_rows(value, halo).detach() if isinstance(value, torch.Tensor) else value for value in inputs]
        for i in wanted:
            leaves[i].requires_grad_()
        inner = slice(core.start - halo.start, core.stop - halo.start)
        with torch.enable_grad():
            out, handed = segment(leaves[0], tuple(leaves[2:]), first, leaves[1])
            pairs = [(_rows(made, inner), _rows(d, core)) for made, d in zip(handed, d_handed, strict=True) if d is not None]
            if d_out_BCTHW is not None:
                pairs.append((_rows(out, inner, segment.row_scale), _rows(d_out_BCTHW, core, segment.row_scale)))
        del out, handed
        gradients = torch.autograd.grad([made for made, _ in pairs], [leaves[i] for i in wanted], [d for _, d in pairs], allow_unused=True)
        del pairs, leaves
        for i, d in zip(wanted, gradients, strict=True):
            if d is not None:
                d_inputs.setdefault(i, _RowSum(inputs[i].shape, used_up[i])).add(d, core, halo)
        del gradients
    x, shortcut, *rest = (d_inputs[i].total if i in d_inputs else None for i in range(len(inputs)))
    return x, shortcut, tuple(rest)


class _RowSum:
    """Adds up the gradients of strips that come from top to bottom and overlap in their halos.

    Rows are written once their own strip has come, not before: so the sum can take the place of a gradient that the strips use up as they come.
    """

    total: Tensor

    def __init__(self, shape: Sequence[int], used_up: Tensor | None) -> None:
        self._shape = shape
        self._used_up = used_up if used_up is not None and used_up.shape == shape else None
        self._ahead: Tensor | None = None
        """Of rows whose own strip has not come yet."""

    def add(self, d_BCTHW: Tensor, core: slice, halo: slice) -> None:
        if core.stop - core.start == self._shape[3]:
            self.total = d_BCTHW.contiguous()  # of a cache it is a view of the gradient at cache and input together
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
    """``count`` slices that cover ``height`` rows, each with its own rows plus ``halo`` on either side as far as there are any."""
    edges = [height * i // count for i in range(count + 1)]
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        yield slice(start, stop), slice(max(0, start - halo), min(height, stop + halo))


def _rows(x_BCTHW: Tensor, rows: slice, scale: int = 1) -> Tensor:
    return x_BCTHW[:, :, :, rows.start * scale : rows.stop * scale]


class InwardClamp(torch.autograd.Function):
    """``x.clamp(low, high)``, whose gradient beyond a limit passes where a step of descent leads back, and is zero where it leads further out.

    With the clamp's own gradient, zero on either side, a pixel that is once too bright or too dark is lost to training: nothing ever asks it to come
    back. With the gradient of the identity, what the critic cannot see would be pushed ever further out. This is the rule of ``ClampWithGrad``
    in K. Crowson's VQGAN+CLIP (2021). Where no value is beyond a limit it is the clamp's gradient.
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
