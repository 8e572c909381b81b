"""The decoder of TAEHV, a tiny autoencoder for video latents (github.com/madebyollin/taehv, MIT), by its published
layers and key names.

A list of 23 layers: a stem, then three levels, each of three memory blocks, a growth in time, an upsampling in space
and a convolution; then a convolution to pixels. A memory block sees its own input and that of the frame before; all
other layers see one frame. So the network is causal, and the last inputs of the nine memory blocks are all that one
latent frame needs of those before it.

Here the growth in time, a 1x1 convolution, comes before the upsampling and not behind it. That is the same function for
a quarter of the work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from lowmem_drf.errors import BadInputError
from lowmem_drf.models.clamp import InwardClamp

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "decoder."
"""Of the decoder's keys in a published file; the others are the encoder's."""
STEM, HEAD = 1, 22
BLOCKS = ((3, 4, 5), (9, 10, 11), (15, 16, 17))
GROWTHS, WIDENINGS = (7, 13, 19), (8, 14, 20)
"""Places of the layers with weights in the list: memory blocks by level, and behind each level its growth and its
convolution."""
LEVELS = 3


@dataclass(frozen=True)
class Sizes:
    """All that tells one such decoder from another. The defaults are those of every published one."""

    latent: int = 16
    """Channels of the latents: 16 for Wan 2.1's VAE, 48 for Wan 2.2's."""
    widths: tuple[int, int, int, int] = (256, 128, 64, 64)
    """Channels of the three levels, and before the pixels."""
    growths: tuple[int, int, int] = (1, 2, 2)
    """Frames that a level makes of one."""
    patch: int = 1
    """The last convolution makes squares of this many pixels on a side: 1 for Wan 2.1, 2 for Wan 2.2."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every weight, by its name without ``PREFIX``."""
        found: dict[str, tuple[int, ...]] = {f"{STEM}.weight": (self.widths[0], self.latent, 3, 3)}
        for level, width in enumerate(self.widths[:LEVELS]):
            for place in BLOCKS[level]:
                found |= {f"{place}.conv.{i}.weight": (width, (2 if i == 0 else 1) * width, 3, 3) for i in (0, 2, 4)}
            found[f"{GROWTHS[level]}.conv.weight"] = (self.growths[level] * width, width, 1, 1)
            found[f"{WIDENINGS[level]}.weight"] = (self.widths[level + 1], width, 3, 3)
        found[f"{HEAD}.weight"] = (3 * self.patch**2, self.widths[LEVELS], 3, 3)
        without_bias = (*(f"{place}.conv." for place in GROWTHS), *(f"{place}." for place in WIDENINGS))
        biases = [name for name in found if not name.startswith(without_bias)]
        return found | {f"{name.removesuffix('weight')}bias": found[name][:1] for name in biases}

    @property
    def temporal_factor(self) -> int:
        return math.prod(self.growths)


def sizes_of(shapes: Mapping[str, Sequence[int]]) -> Sizes:
    """The sizes of a decoder whose weights, named without ``PREFIX``, have these shapes. Raises ValueError that says
    which weight is not as in TAEHV."""
    try:
        convs = [shapes[f"{STEM}.weight"], *(shapes[f"{place}.weight"] for place in WIDENINGS)]
        widths = tuple(shape[0] for shape in convs)
        growths = tuple(
            shapes[f"{place}.conv.weight"][0] // width for place, width in zip(GROWTHS, widths, strict=False)
        )
        patch = math.isqrt(shapes[f"{HEAD}.weight"][0] // 3)
        found = Sizes(convs[0][1], widths, growths, patch)  # type: ignore[arg-type]
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"it has no weight {PREFIX}{error.args[0]}") from error
    wanted = found.shapes()
    for name in (*wanted, *shapes):
        here, there = tuple(shapes.get(name, ())), wanted.get(name, ())
        if here != there:
            raise ValueError(f"{PREFIX}{name} has the shape {list(here)}, and not {list(there)}")
    return found


class TinyNetwork(nn.Module):
    """The decoder, frozen. Tensors between its pieces are (B, t, C, H, W).

    ``spatial_factor``: pixels per latent on a side, the VAE's. The last levels double the size, as many as it takes.

    Raises BadInputError: the sizes do not go with the VAE.
    """

    def __init__(self, sizes: Sizes, temporal_factor: int, spatial_factor: int) -> None:
        super().__init__()
        self.sizes = sizes
        doublings = math.log2(spatial_factor / sizes.patch) if sizes.patch else -1
        if sizes.temporal_factor != temporal_factor or doublings not in range(LEVELS + 1):
            raise BadInputError(
                f"model.decoder_file makes {sizes.temporal_factor} frames of a latent, in squares of {sizes.patch} "
                f"pixels, and the model's VAE {temporal_factor} frames of {spatial_factor} x {spatial_factor} pixels. "
                "Take the file that was made for this model's VAE."
            )
        layers: dict[int, nn.Module] = {STEM: _conv(sizes.latent, sizes.widths[0])}
        for level, width in enumerate(sizes.widths[:LEVELS]):
            layers |= {place: _MemoryBlock(width) for place in BLOCKS[level]}
            layers[GROWTHS[level]] = _Growth(width, sizes.growths[level])
            layers[WIDENINGS[level]] = _conv(width, sizes.widths[level + 1], bias=False)
        layers[HEAD] = _conv(sizes.widths[LEVELS], 3 * sizes.patch**2)
        self.layers = nn.ModuleDict({str(place): layer for place, layer in layers.items()})
        doubles = [level >= LEVELS - doublings for level in range(LEVELS)]
        self.pieces: list[nn.Module] = [_Stem(layers[STEM])]
        for level in range(LEVELS):
            self.pieces += [layers[place] for place in BLOCKS[level]]
            if level < LEVELS - 1:
                self.pieces.append(_Widening(layers[GROWTHS[level]], layers[WIDENINGS[level]], doubles[level]))
        self.tail: tuple[nn.Module, nn.Module] = (
            layers[GROWTHS[-1]],
            _Head(layers[WIDENINGS[-1]], layers[HEAD], doubles[-1], sizes.patch),
        )
        """What follows ``pieces``: the last growth, and what is left to do for each frame by itself, at full size."""
        self.eval().requires_grad_(False)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """``weights``: by name without ``PREFIX``."""
        self.layers.load_state_dict(dict(weights))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def remembers(self, piece: nn.Module) -> bool:
        """Whether a piece takes the last frame of its input of the chunk before."""
        return isinstance(piece, _MemoryBlock)


def call(module: nn.Module, *inputs: Tensor | None) -> Tensor:
    """A piece, in the number format of its input: weights of another one are cast for the call."""
    x = inputs[0]
    assert x is not None
    if all(weight.dtype == x.dtype for weight in module.parameters()):
        result: Tensor = module(*inputs)
        return result
    weights = {name: weight.to(x.dtype) for name, weight in module.named_parameters()}
    cast: Tensor = torch.func.functional_call(module, weights, inputs)
    return cast


def _conv(channels: int, made: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(channels, made, 3, padding=1, bias=bias)


def _framewise(function: Callable[[Tensor], Tensor], x_BtCHW: Tensor) -> Tensor:
    """Layers that see one frame. What they do in place is done to no view: autograd would copy what is viewed."""
    return function(x_BtCHW.flatten(0, 1)).unflatten(0, x_BtCHW.shape[:2])


def _doubled(x_NCHW: Tensor) -> Tensor:
    return F.interpolate(x_NCHW, scale_factor=2, mode="nearest")


class _Stem(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, latents_BtCHW: Tensor) -> Tensor:
        return _framewise(lambda x: self.conv(torch.tanh(x / 3) * 3).relu_(), latents_BtCHW)


class _MemoryBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        relu = nn.ReLU(inplace=True)
        self.conv = nn.Sequential(_conv(2 * width, width), relu, _conv(width, width), relu, _conv(width, width))

    def forward(self, x_BtCHW: Tensor, past_BCHW: Tensor | None) -> Tensor:
        """``past_BCHW``: the frame before the first one. ``None``: there is none, which counts as zeros."""
        first = torch.zeros_like(x_BtCHW[:, 0]) if past_BCHW is None else past_BCHW
        before = torch.cat([first[:, None], x_BtCHW[:, :-1]], dim=1)
        return (_framewise(self.conv, torch.cat([x_BtCHW, before], dim=2)) + x_BtCHW).relu_()


class _Growth(nn.Module):
    def __init__(self, width: int, frames: int) -> None:
        super().__init__()
        self.frames = frames
        self.conv = nn.Conv2d(width, frames * width, 1, bias=False)

    def forward(self, x_BtCHW: Tensor) -> Tensor:
        made = _framewise(self.conv, x_BtCHW)
        return made.unflatten(2, (self.frames, -1)).flatten(1, 2)


class _Widening(nn.Module):
    def __init__(self, growth: nn.Module, conv: nn.Module, doubles: bool) -> None:
        super().__init__()
        self.growth, self.conv, self.doubles = growth, conv, doubles

    def forward(self, x_BtCHW: Tensor) -> Tensor:
        return _framewise(lambda x: self.conv(_doubled(x) if self.doubles else x), self.growth(x_BtCHW))


class _Head(nn.Module):
    def __init__(self, conv: nn.Module, pixels: nn.Module, doubles: bool, patch: int) -> None:
        super().__init__()
        self.conv, self.pixels, self.doubles, self.patch = conv, pixels, doubles, patch

    def forward(self, x_BtCHW: Tensor) -> Tensor:
        """Pixels in [0, 1]."""
        return _framewise(self._pixels, x_BtCHW)

    def _pixels(self, x: Tensor) -> Tensor:
        x = self.conv(_doubled(x) if self.doubles else x).relu_()
        return InwardClamp.apply(F.pixel_shuffle(self.pixels(x), self.patch), 0.0, 1.0)
