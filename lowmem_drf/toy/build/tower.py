"""The critic's vision tower, first part: every merged token learns to describe its slice of two frames.

A language model over an untrained tower stays at chance (docs/toyworld.md). Linear heads predict from each token:
presence, place, size, shade, form and colour in both frames, the motion between them, noise and blur. The heads are
discarded afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowmem_drf.models.qwen_vl.critic import VLMCritic
from lowmem_drf.toy.build.loop import Schedule, half_products, scaled, train
from lowmem_drf.toy.defects import DEFECTS, PHYSICS, break_physics, break_quality
from lowmem_drf.toy.scenes import DIRECTION, FRAMES, RGB, SIZE, Tracks, combos_of, draw_tracks, render


def draw_labelled(
    n: int, generator: torch.Generator, clean_share: float, splits: tuple[str, ...] = ("train", "heldout")
) -> tuple[Tensor, Tracks, Tensor, Tensor]:
    """-> frames_BTCHW in [0, 1], tracks after any defect, combos (n, 4), defect (n,) index into DEFECTS or -1.

    The defects are dealt evenly over the clips that are not clean.
    """
    combos = torch.tensor(combos_of(*splits))
    combos = combos[torch.randint(len(combos), (n,), generator=generator)]
    tracks = draw_tracks(combos, generator)
    defect = torch.full((n,), -1)
    broken = torch.rand(n, generator=generator) >= clean_share
    defect[broken] = torch.randperm(int(broken.sum()), generator=generator) % len(DEFECTS)
    fields = [t.clone() for t in tracks]
    for i, kind in enumerate(PHYSICS):
        rows = (defect == i).nonzero()[:, 0]
        if len(rows):
            for whole, part in zip(
                fields, break_physics(Tracks(*(t[rows] for t in tracks)), kind, generator), strict=True
            ):
                whole[rows] = part
    tracks = Tracks(*fields)
    frames = render(tracks)
    for i, kind in enumerate(DEFECTS):
        rows = (defect == i).nonzero()[:, 0]
        if kind not in PHYSICS and len(rows):
            frames[rows] = break_quality(frames[rows], kind, generator)
    return frames, tracks, combos, defect


def roughen(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Adds slight noise (up to 0.03) and blur (up to 0.7 pixels), about the VAE's error on a clean clip, to three clips
    of four."""
    n = len(frames)
    on = (torch.rand(n, generator=generator) < 0.75).float().view(-1, 1, 1, 1, 1)
    mix = 0.5 * on * torch.rand(n, 1, 1, 1, 1, generator=generator)
    soft = F.avg_pool2d(F.pad(frames.flatten(0, 1), (1, 1, 1, 1), mode="replicate"), 3, 1).view_as(frames)
    frames = frames + mix * (soft - frames)
    return (
        frames
        + 0.03 * on * torch.rand(n, 1, 1, 1, 1, generator=generator) * torch.randn(frames.shape, generator=generator)
    ).clamp(0, 1)


class SliceHeads(nn.Module):
    """Linear read-outs of one merged token: two frames x (presence, x, y, radius, shade, 3 forms, 6 colours), 5
    motions, noise, blur."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, 2 * 14 + 5 + 2)

    def loss(self, tokens: Tensor, tracks: Tracks, defect: Tensor) -> tuple[Tensor, dict[str, float]]:
        """tokens: (B, slices, tokens per slice, width)."""
        y = self.out(tokens)
        slices, per = tokens.shape[1:3]
        # two frames a slice; the odd last frame is repeated, as the preprocess does
        index = torch.arange(2 * slices).clamp(max=FRAMES - 1).view(slices, 2)

        def pick(t: Tensor) -> Tensor:
            return t[:, index].unsqueeze(2).expand(-1, -1, per, *[-1] * (t.ndim - 1))  # (B, slices, tokens, 2[, 3])

        frame = y[..., :28].unflatten(-1, (2, 14))
        present = pick(tracks.present)
        truth = torch.stack(
            [
                pick(t)
                for t in (tracks.x / SIZE - 0.5, tracks.y / SIZE - 0.5, tracks.radius / 6 - 1, tracks.shade - 0.5)
            ],
            -1,
        )
        weight = torch.stack([present, present, present, torch.ones_like(present)], -1)
        color = torch.cdist(tracks.rgb.flatten(0, 1), RGB).argmin(-1).view(tracks.rgb.shape[:2])
        parts = {
            "present": F.binary_cross_entropy_with_logits(frame[..., 0], present),
            "place": ((frame[..., 1:5] - truth) ** 2 * weight).mean() * 8,
            "form": (
                F.cross_entropy(frame[..., 5:8].flatten(0, 3), pick(tracks.shape).flatten(), reduction="none")
                * present.flatten()
            ).mean(),
            "color": (
                F.cross_entropy(frame[..., 8:14].flatten(0, 3), pick(color).flatten(), reduction="none")
                * present.flatten()
            ).mean(),
        }
        step = torch.stack((tracks.x, tracks.y), -1)[:, index].diff(dim=2)[:, :, 0]  # (B, slices, 2)
        # the last slice holds one frame twice
        heading = (step[..., None, :] - 1.2 * DIRECTION).norm(dim=-1).argmin(-1)[:, :-1]
        motion = y[:, :-1, :, 28:33]
        parts["motion"] = 0.5 * F.cross_entropy(
            motion.flatten(0, 2), heading[..., None].expand(motion.shape[:-1]).flatten()
        )
        for i, name in ((33, "noise"), (34, "blur")):
            label = (defect == DEFECTS.index(name)).float()[:, None, None].expand(y.shape[:-1])
            parts[name] = F.binary_cross_entropy_with_logits(y[..., i], label)
        return sum(parts.values()), {k: v.item() for k, v in parts.items()}


class Tower(nn.Module):
    """The modules that are trained here: the critic's vision tower and the heads on it."""

    def __init__(self, critic: VLMCritic) -> None:
        super().__init__()
        self.visual = critic.model.model.visual
        self.heads = SliceHeads(critic.model.config.vision_config.out_hidden_size)


def train_tower(
    critic: VLMCritic, folder: Path, seed: int, scale: float = 1.0, log: Callable[[str], None] = print
) -> None:
    """Trains the vision tower of ``critic`` in place."""
    torch.manual_seed(seed)
    tower = Tower(critic).train()
    tower.visual.requires_grad_(True)
    schedule = Schedule(
        steps=scaled(2500, scale), lr=2e-3, warmup=min(100, scaled(300, scale)), ema=0.99, log_every=100
    )

    def loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        frames, tracks, _, defect = draw_labelled(24, generator, clean_share=0.4)
        frames = roughen(frames, generator)
        with half_products():
            tokens, grid = critic.embed_video(frames)
        return tower.heads.loss(tokens.float().unflatten(1, (int(grid[0, 0]), -1)), tracks, defect)

    train("tower", tower, loss, schedule, folder, seed, log=log)
