"""Defects of a clip: six of physics and three of image quality, each strong enough for a person to see.

Physics defects change the tracks before rendering; quality defects change the pixels. Their strengths are drawn from
ranges that start well above the error of a faithful VAE on a clean clip, so that "has the defect" is a fact and not a
matter of taste.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem_drf.toy.scenes import FRAMES, RGB, SHAPES, SIZE, Tracks

PHYSICS = ("jump", "jitter", "vanish", "morph", "pulse", "recolor")
QUALITY = ("noise", "blur", "flicker")
DEFECTS = PHYSICS + QUALITY


def _rand(n: int, low: float, high: float, g: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(n, generator=g)


def _moment(n: int, first: int, last: int, g: torch.Generator) -> Tensor:
    """(n, T): 0 before a frame drawn in [first, last], 1 from it on."""
    k = torch.randint(first, last + 1, (n,), generator=g)
    return (torch.arange(FRAMES)[None] >= k[:, None]).float()


def _reflect(place: Tensor, radius: Tensor) -> Tensor:
    """Reflects a coordinate back into the frame, so that a displaced shape stays visible."""
    low, high = radius, SIZE - radius
    span = high - low
    folded = (place - low) % (2 * span)
    return low + torch.where(folded > span, 2 * span - folded, folded)


def break_physics(tracks: Tracks, kind: str, generator: torch.Generator) -> Tracks:
    """The same scenes with one physics defect each.

    jump: the place shifts by 8-13 pixels at once. jitter: frames are off by 2-4 pixels to alternate sides. vanish: gone
    for 2-5 frames. morph: becomes another form. pulse: the radius swings by a factor of 1.5-1.9. recolor: becomes
    another colour.
    """
    n, g = len(tracks.x), generator
    angle = _rand(n, 0, 2 * torch.pi, g)
    if kind == "jump":
        shift = _moment(n, 2, FRAMES - 2, g) * _rand(n, 8, 13, g)[:, None]
        x = _reflect(tracks.x + shift * angle.cos()[:, None], tracks.radius)
        y = _reflect(tracks.y + shift * angle.sin()[:, None], tracks.radius)
        # where the reflection brings the shape back to within 8 pixels of its path, send it to the other side instead
        short = ((x - tracks.x) ** 2 + (y - tracks.y) ** 2).sqrt().amax(1, keepdim=True) < 8
        opposite = torch.where(shift > 0, SIZE - tracks.x, tracks.x), torch.where(shift > 0, SIZE - tracks.y, tracks.y)
        far = ((opposite[0] - tracks.x) ** 2 + (opposite[1] - tracks.y) ** 2).sqrt().amax(1, keepdim=True) >= 8
        other = torch.where(far, opposite[0], torch.where(shift > 0, (tracks.x + SIZE / 2) % SIZE, tracks.x))
        x = torch.where(short, other.clamp(6, SIZE - 6), x)
        y = torch.where(short & far, opposite[1], torch.where(short, tracks.y, y))
        return tracks._replace(x=x, y=y)
    if kind == "jitter":
        size = _rand(n, 2.0, 4.0, g)[:, None] * (1 - 2 * (torch.arange(FRAMES) % 2))[None]
        wobble = angle[:, None] + 0.8 * torch.randn(n, FRAMES, generator=g)
        return tracks._replace(
            x=_reflect(tracks.x + size * wobble.cos(), tracks.radius),
            y=_reflect(tracks.y + size * wobble.sin(), tracks.radius),
        )
    if kind == "vanish":
        length = torch.randint(2, 6, (n,), generator=g)
        first = (torch.rand(n, generator=g) * (FRAMES + 1 - length)).long()
        t = torch.arange(FRAMES)[None]
        return tracks._replace(present=1 - ((t >= first[:, None]) & (t < (first + length)[:, None])).float())
    if kind == "morph":
        other = (tracks.shape + torch.randint(1, len(SHAPES), (n, 1), generator=g)) % len(SHAPES)
        return tracks._replace(shape=torch.where(_moment(n, 2, FRAMES - 2, g) > 0, other, tracks.shape))
    if kind == "pulse":
        swing = _rand(n, 1.5, 1.9, g).log() / 2
        phase, rate = _rand(n, 0, 2 * torch.pi, g)[:, None], _rand(n, 0.8, 2.0, g)[:, None]
        return tracks._replace(
            radius=tracks.radius * (swing[:, None] * torch.sin(phase + rate * torch.arange(FRAMES)[None])).exp()
        )
    if kind == "recolor":
        away = (tracks.rgb[:, :1, None] - RGB[None, None]).norm(dim=-1)[:, 0]  # (n, 6) distance to each colour
        weights = (away > 0.5).float()
        other = RGB[torch.multinomial(weights, 1, generator=g)[:, 0]][:, None]
        when = _moment(n, 2, FRAMES - 2, g)[..., None]
        return tracks._replace(rgb=torch.where(when > 0, other, tracks.rgb))
    raise ValueError(f"{kind!r} is not a physics defect: {', '.join(PHYSICS)}")


def break_quality(frames_BTCHW: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """The same clips with one quality defect each; frames in [0, 1] in and out.

    noise: white noise with a standard deviation of 0.10-0.22. blur: a Gaussian of 1.6-2.6 pixels. flicker: the
    brightness of alternate frames goes up and down by a factor of 1.25-1.6.
    """
    n, g = len(frames_BTCHW), generator
    if kind == "noise":
        out = frames_BTCHW + _rand(n, 0.10, 0.22, g).view(-1, 1, 1, 1, 1) * torch.randn(frames_BTCHW.shape, generator=g)
    elif kind == "blur":
        taps = torch.arange(-6, 7)
        sigma = _rand(n, 1.6, 2.6, g)
        line = torch.exp(-0.5 * (taps[None] / sigma[:, None]) ** 2)
        line = line / line.sum(1, keepdim=True)
        images = frames_BTCHW.flatten(1, 2)  # (n, T*C, H, W): one group of channels per clip
        count = images.shape[1]
        flat = F.pad(images.reshape(1, n * count, *images.shape[2:]), (6, 6, 6, 6), mode="replicate")
        kernel = line.repeat_interleave(count, 0)
        flat = F.conv2d(flat, kernel[:, None, None, :], groups=n * count)
        flat = F.conv2d(flat, kernel[:, None, :, None], groups=n * count)
        out = flat.reshape(frames_BTCHW.shape)
    elif kind == "flicker":
        gain = _rand(n, 1.25, 1.6, g).log()[:, None] * torch.where(torch.rand(n, FRAMES, generator=g) < 0.5, -1.0, 1.0)
        alternate = (1 - 2.0 * (torch.arange(FRAMES) % 2))[None]
        gain = torch.where(torch.rand(n, 1, generator=g) < 0.7, gain.abs() * alternate, gain)
        out = frames_BTCHW * gain.exp().view(n, FRAMES, 1, 1, 1) + 0.12 * gain.view(n, FRAMES, 1, 1, 1)
    else:
        raise ValueError(f"{kind!r} is not a quality defect: {', '.join(QUALITY)}")
    return out.clamp(0, 1)
