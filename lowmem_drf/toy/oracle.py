"""The oracle: measures what a ToyWorld clip shows. Nothing is learned, and it is independent of the critic.

Colour: the nearest palette entry. Form: overlap with drawn templates. Motion: the centroid's path. Physics and quality:
thresholds on the same measurements. The thresholds lie between the VAE's error on clean clips and the weakest defect of
``toy/defects.py``; ``python -m lowmem_drf.toy.build.check`` prints how well they separate.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem_drf.toy.captions import parse
from lowmem_drf.toy.scenes import RGB, SHADE, SIZE, Combo, coverage

MIN_AREA = 25.0  # pixels: a smaller blob is no shape (the smallest drawn one covers 66)
MIN_OVERLAP = 0.72  # mean overlap with the best template: a blob below it has no form
MAX_COLOR_DISTANCE = 0.45  # to the nearest palette entry
STILL_PX, MOVING_PX = 2.5, 4.5  # distance from first to last frame; drawn shapes move 8-12 pixels or none
JUMP_PX, JITTER_PX = 3.0, 1.2  # largest and root-mean-square deviation of a frame's step from the median step
PULSE_RATIO = 1.30  # largest radius over smallest
MORPH_MARGIN = 0.05  # another form overlaps more by this much in two frames in a row
RECOLOR_ANGLE = 0.35  # radians between a frame's colour and the clip's
NOISE_STD = 0.05  # standard deviation of a background pixel from its neighbours
BLUR_PX = 2.4  # width of the edge; an anti-aliased edge has 0.7, a Gaussian of s pixels 2.26 s
FLICKER_STD = 0.022  # standard deviation of the background's brightness over the frames


class Looks(NamedTuple):
    """What no question asks about, each (B,): nothing of it is right or wrong. ``toy/drift.py`` compares it with drawn
    scenes."""

    size: Tensor
    """Radius of the circle of the shape's area, pixels, mean over the frames that show it."""
    edge: Tensor
    """Width of the edge, pixels (``BLUR_PX``)."""
    outline: Tensor
    """1 - overlap with the best template: 0 for a perfect outline."""
    saturation: Tensor
    """Largest less smallest channel of the shape's colour, in [0, 1]."""
    texture: Tensor
    """Standard deviation of the pixels well inside the shape, over the clip."""
    speed: Tensor
    """Pixels a frame between the first place and the last."""
    x: Tensor
    """Centre, pixels from the left, mean over the frames that show it."""
    y: Tensor
    """The same from the top."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Measurements of B clips, each (B,). Attributes: indices into the name lists of ``scenes``, -1 for none of them.
    Defects: bool, True where the clip has it."""

    shape: Tensor
    color: Tensor
    motion: Tensor
    background: Tensor
    jump: Tensor
    jitter: Tensor
    vanish: Tensor
    morph: Tensor
    pulse: Tensor
    recolor: Tensor
    noise: Tensor
    blur: Tensor
    flicker: Tensor
    looks: Looks

    @property
    def physics(self) -> Tensor:
        """(B,) True: visible in every frame, no jump, shake, or change of form, size or colour."""
        return ~(self.jump | self.jitter | self.vanish | self.morph | self.pulse | self.recolor)

    @property
    def quality(self) -> Tensor:
        """(B,) True: no noise, blur or flicker."""
        return ~(self.noise | self.blur | self.flicker)

    def matches(self, combos: list[Combo]) -> dict[str, Tensor]:
        """(B,) True where the clip shows the combination asked for; ``all`` is shape, colour and direction."""
        c = torch.tensor(combos, device=self.shape.device)
        shape, color, direction = self.shape == c[:, 0], self.color == c[:, 1], self.motion == c[:, 2]
        hits = {"shape": shape, "color": color, "direction": direction}
        return {**hits, "background": self.background == c[:, 3], "all": shape & color & direction}


@dataclass(frozen=True, slots=True)
class Verdict:
    """The oracle's verdict on one clip and its prompt."""

    color: bool
    shape: bool
    direction: bool
    physics: bool
    quality: bool

    @property
    def all(self) -> bool:
        return self.color and self.shape and self.direction


def _foreground(frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> soft coverage (B, T, H, W), colour per frame (B, T, 3), background per frame (B, T, 3)."""
    # the shape covers under a fifth of the frame, so the median is background
    shade = frames.flatten(3).median(-1).values
    offset = frames - shade[..., None, None]
    distance = offset.norm(dim=2)  # (B, T, H, W)
    smooth = F.avg_pool2d(F.pad(distance, (1, 1, 1, 1), mode="replicate"), 3, 1)
    peak = smooth.flatten(2).amax(-1)
    core = smooth >= 0.75 * peak[..., None, None]
    rgb = (frames * core[:, :, None]).flatten(3).sum(-1) / core.flatten(2).sum(-1)[..., None]
    axis = rgb - shade
    alpha = (offset * axis[..., None, None]).sum(2) / axis.pow(2).sum(-1).clamp(min=1e-3)[..., None, None]
    alpha = alpha.clamp(0, 1) * (smooth > 0.12)
    return alpha * (peak > 0.25)[..., None, None], rgb, shade


def measure(frames_BTCHW: Tensor) -> Measured:
    """Measures B clips of 32 x 32 pixels, float in [0, 1]."""
    frames = frames_BTCHW.float()
    alpha, rgb, shade = _foreground(frames)
    area = alpha.flatten(2).sum(-1)  # (B, T)
    present = area >= MIN_AREA
    weight = area.clamp(min=1.0)
    centre = torch.arange(SIZE, device=frames.device) + 0.5
    x = (alpha.sum(2) * centre).sum(-1) / weight
    y = (alpha.sum(3) * centre).sum(-1) / weight
    radius = (weight / torch.pi).sqrt()

    # form: overlap with each template at the measured place and size
    overlaps = []
    for form in range(3):
        best = torch.zeros_like(area)
        for stretch in (0.94, 1.0, 1.06):
            drawn = coverage(x, y, radius * stretch, torch.full(x.shape, form, device=x.device))
            common = torch.minimum(alpha, drawn).flatten(2).sum(-1)
            best = torch.maximum(best, common / torch.maximum(alpha, drawn).flatten(2).sum(-1).clamp(min=1))
        overlaps.append(best)
    overlap = torch.stack(overlaps, -1) * present[..., None]  # (B, T, 3)
    seen = present.sum(1, keepdim=True).clamp(min=1)
    mean_overlap = overlap.sum(1) / seen
    score, shape = mean_overlap.max(-1)
    own = overlap.gather(2, shape[:, None, None].expand(-1, overlap.shape[1], 1))[..., 0]
    gain = (overlap.amax(-1) - own) * present
    morph = torch.minimum(gain[:, 1:], gain[:, :-1]).amax(1) > MORPH_MARGIN

    # colour
    clip_rgb = (rgb * present[..., None]).sum(1) / seen
    far, color = torch.cdist(clip_rgb, RGB.to(rgb)).min(-1)
    middle = torch.where(present[..., None], rgb, clip_rgb[:, None])
    reference = middle.median(1, keepdim=True).values
    cosine = F.cosine_similarity(middle, reference, dim=-1).clamp(-1, 1)
    recolor = (cosine.arccos() * present).amax(1) > RECOLOR_ANGLE

    # motion
    place = torch.stack((x, y), -1)
    step = place.diff(dim=1)
    both = present[:, 1:] & present[:, :-1]
    usual = torch.where(both[..., None], step, torch.nan).nanmedian(1, keepdim=True).values.nan_to_num(0.0)
    departure = ((step - usual).norm(dim=-1)) * both
    jump = departure.amax(1) > JUMP_PX
    jitter = departure.pow(2).mean(1).sqrt() > JITTER_PX
    way = place[:, -1] - place[:, 0]
    length, along = way.abs().amax(-1), way.abs().argmax(-1)
    side = way.abs().amin(-1)
    main = way.gather(1, along[:, None])[:, 0]
    heading = torch.where(along == 0, (main > 0).long(), 2 + (main > 0).long())
    motion = torch.where(length < STILL_PX, 4, torch.where((length > MOVING_PX) & (side < 0.5 * length), heading, -1))
    motion = torch.where(present[:, 0] & present[:, -1], motion, -1)

    # size
    largest = torch.where(present, radius, 0.0).amax(1)
    smallest = torch.where(present, radius, torch.inf).amin(1)
    pulse = largest / smallest > PULSE_RATIO

    # quality
    empty = F.max_pool2d(alpha, 5, 1, 2) < 0.1  # (B, T, H, W), two pixels away from the shape
    rest = frames - F.avg_pool2d(F.pad(frames.flatten(0, 1), (1, 1, 1, 1), mode="replicate"), 3, 1).view_as(frames)
    count = empty.flatten(1).sum(1).clamp(min=1) * 3
    noise = ((rest**2 * empty[:, :, None]).flatten(1).sum(1) / count).sqrt() > NOISE_STD
    edge = (4 * alpha * (1 - alpha)).flatten(2).sum(-1)
    perimeter = torch.tensor([6.283, 7.090, 8.081], device=radius.device)[shape][:, None] * radius  # of each form
    width = ((edge / perimeter) * present).sum(1) / seen[:, 0]
    blur = width > BLUR_PX
    flicker = shade.mean(-1).std(1) > FLICKER_STD
    some = present.any(1)
    shape = torch.where(some & (score > MIN_OVERLAP), shape, -1)
    color = torch.where(some & (far < MAX_COLOR_DISTANCE), color, -1)
    motion = torch.where(some, motion, -1)
    background = (shade.mean((1, 2))[:, None] - SHADE.to(shade)).abs().argmin(-1)
    vanish = ~present.all(1)

    # what is neither right nor wrong
    inside = (-F.max_pool2d(-alpha, 3, 1, 1) > 0.9) & present[..., None, None]  # a pixel away from the edge
    pixels = inside.flatten(1).sum(1).clamp(min=1) * 3
    spread = (frames - clip_rgb[:, None, :, None, None]) ** 2 * inside[:, :, None]
    texture = (spread.flatten(1).sum(1) / pixels).sqrt()
    chroma = clip_rgb.amax(1) - clip_rgb.amin(1)
    size, centre_x, centre_y = (((of * present).sum(1) / seen[:, 0]) for of in (radius, x, y))
    speed = way.norm(dim=-1) / (frames.shape[1] - 1)
    looks = Looks(size, width, 1 - score, chroma, texture, speed, centre_x, centre_y)
    attributes = shape, color, motion, background
    return Measured(*attributes, jump, jitter, vanish, morph, pulse, recolor, noise, blur, flicker, looks)


def judge_clips(frames_BTCHW: Tensor, prompts: list[str]) -> list[Verdict]:
    """The oracle's verdicts on B clips of 32 x 32 pixels in [0, 1] and their prompts.

    Raises:
        ValueError: a prompt is not in ToyWorld's grammar, or the clips have another size.
    """
    if frames_BTCHW.shape[-2:] != (SIZE, SIZE):
        raise ValueError(f"The oracle measures clips of {SIZE} x {SIZE} pixels, not {tuple(frames_BTCHW.shape[-2:])}.")
    combos = [parse(p) for p in prompts]
    known = [c for c in combos if c is not None]
    if len(known) != len(combos):
        raise ValueError(f"Not of ToyWorld's grammar: {prompts[combos.index(None)]!r}")
    seen = measure(frames_BTCHW)
    hits = {**seen.matches(known), "physics": seen.physics, "quality": seen.quality}
    rows = zip(*(hits[f.name].tolist() for f in fields(Verdict)), strict=True)
    return [Verdict(*row) for row in rows]


def judge(frames_TCHW: Tensor, prompt: str) -> Verdict:
    """The oracle on one clip (``judge_clips``)."""
    return judge_clips(frames_TCHW[None], [prompt])[0]
