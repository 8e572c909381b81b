"""ToyWorld's scenes: one coloured shape moves over a plain background for 9 frames of 32 x 32 pixels.

A *combination* is (shape, colour, motion, background): 3 x 6 x 5 x 3 = 270. Everything else (place, size, speed, exact
shades) is drawn at random, so that many clips match a prompt. A fifth of the combinations (54) is held out from
Diffusion-DRF, and half of those (27) from the training of every model as well.

Scenes are stored as *tracks*: per frame the place, size, colour, form and presence of the shape. Rendering is exact
area coverage to first order (a signed distance clamped to one pixel), so edges are anti-aliased and a shape moves by
fractions of a pixel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lowmem_drf.questions.toyworld import ATTRIBUTES

FRAMES, SIZE, FPS = 9, 32, 8

SHAPES, COLORS, MOTIONS, BACKGROUNDS = (ATTRIBUTES[name] for name in ("shape", "color", "direction", "background"))

RGB = torch.tensor(
    [
        [0.90, 0.10, 0.10],
        [0.10, 0.70, 0.15],
        [0.12, 0.20, 0.92],
        [0.95, 0.85, 0.10],
        [0.65, 0.10, 0.80],
        [0.10, 0.80, 0.88],
    ]
)
SHADE = torch.tensor([0.06, 0.46, 0.90])
SHADE_JITTER, RGB_JITTER = 0.05, 0.04
RADIUS = (5.4, 6.8)  # radius of the circle of the same area, pixels
SPEED = (0.8, 1.2)  # pixels a frame
EXTENT = torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[0.886, 0.886], [0.886, 0.886]], [[1.347, 1.555], [1.347, 0.778]]])
"""Extent of each form from its centre, in radii: [form][towards 0 | away from 0][x | y]."""
DIRECTION = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0], [0.0, 0.0]])  # x to the right, y down


class Combo(NamedTuple):
    """The attributes in a caption, as indices into SHAPES, COLORS, MOTIONS and BACKGROUNDS."""

    shape: int
    color: int
    motion: int
    background: int


class Tracks(NamedTuple):
    """B scenes frame by frame. Lengths in pixels, origin at the top left; colours and shades in [0, 1]."""

    x: Tensor  # (B, T) centre
    y: Tensor  # (B, T)
    radius: Tensor  # (B, T)
    shape: Tensor  # (B, T) int64
    rgb: Tensor  # (B, T, 3)
    present: Tensor  # (B, T) 0 or 1
    shade: Tensor  # (B, T) of the background


def all_combos() -> list[Combo]:
    """The 270 combinations in a fixed order."""
    return [Combo(s, c, m, b) for s in range(3) for c in range(6) for m in range(5) for b in range(3)]


def _split() -> dict[Combo, str]:
    combos = all_combos()
    order = torch.randperm(len(combos), generator=torch.Generator().manual_seed(2601)).tolist()
    names = ["unseen"] * 27 + ["heldout"] * 27 + ["train"] * (len(combos) - 54)
    return {combos[i]: name for i, name in zip(order, names, strict=True)}


SPLIT = _split()
"""``train``: prompts of Diffusion-DRF. ``heldout``: used to train ToyWorld's models, never by Diffusion-DRF.
``unseen``: used by neither."""


def combos_of(*splits: str) -> list[Combo]:
    """The combinations of the named splits, in the fixed order."""
    return [c for c in all_combos() if SPLIT[c] in splits]


def _uniform(low: float | Tensor, high: float | Tensor, n: int, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(n, generator=generator)


def draw_tracks(combos: list[Combo] | Tensor, generator: torch.Generator) -> Tracks:
    """One scene per combination (a list, or int64 (B, 4)): free attributes are drawn uniformly, the motion is straight
    and even, the shape stays inside the frame."""
    c = combos if isinstance(combos, Tensor) else torch.tensor(combos)
    n = len(c)
    radius = _uniform(*RADIUS, n, generator)
    speed = _uniform(*SPEED, n, generator)
    step = DIRECTION[c[:, 2]] * speed[:, None]  # (B, 2) pixels a frame
    travel = step * (FRAMES - 1)
    reach = EXTENT[c[:, 0]] * radius[:, None, None] + 0.5
    low = reach[:, 0] - travel.clamp(max=0)
    high = SIZE - reach[:, 1] - travel.clamp(min=0)
    start = low + (high - low) * torch.rand(n, 2, generator=generator)
    t = torch.arange(FRAMES)
    place = start[:, None] + step[:, None] * t[None, :, None]  # (B, T, 2)
    rgb = (RGB[c[:, 1]] + RGB_JITTER * (2 * torch.rand(n, 3, generator=generator) - 1)).clamp(0, 1)
    shade = SHADE[c[:, 3]] + SHADE_JITTER * (2 * torch.rand(n, generator=generator) - 1)
    wide = (n, FRAMES)
    return Tracks(
        place[..., 0], place[..., 1], radius[:, None].expand(wide).clone(), c[:, :1].expand(wide).clone(),
        rgb[:, None].expand(n, FRAMES, 3).clone(), torch.ones(wide), shade[:, None].expand(wide).clone(),
    )  # fmt: skip


def coverage(x: Tensor, y: Tensor, radius: Tensor, shape: Tensor, size: int = SIZE) -> Tensor:
    """Share of each pixel that the shape covers, in [0, 1]: (..., size, size) for inputs of shape (...).

    All three forms have the area of a circle of the given radius: a square of half side 0.886 r, an upward triangle of
    side 2.694 r.
    """
    centre = torch.arange(size, device=x.device) + 0.5
    dx = centre[None, :] - x[..., None, None]
    dy = centre[:, None] - y[..., None, None]
    r = radius[..., None, None]
    circle = (dx**2 + dy**2).sqrt() - r
    square = torch.maximum(dx.abs(), dy.abs()) - 0.8862 * r
    inner = 0.7776 * r  # the triangle's inscribed radius
    triangle = torch.maximum(dy - inner, 0.8660 * dx.abs() - 0.5 * dy - inner)
    distance = torch.stack((circle, square, triangle), dim=-1)
    index = shape[..., None, None, None].expand(*distance.shape[:-1], 1)
    return (0.5 - distance.gather(-1, index)[..., 0]).clamp(0, 1)


def render(tracks: Tracks) -> Tensor:
    """Tracks -> frames_BTCHW, float32 in [0, 1]."""
    mask = coverage(tracks.x, tracks.y, tracks.radius, tracks.shape) * tracks.present[..., None, None]
    mask = mask[:, :, None]
    return mask * tracks.rgb[..., None, None] + (1 - mask) * tracks.shade[:, :, None, None, None]
