"""Accuracy and time of a VAE backward that is truncated in time.

    python -m bench.accuracy.vae_window --json bench/results/vae_window.json

ToyWorld's trained VAE and critic, ``memory.vae_backward = "window:n"`` against ``exact``: relative error and cosine of
the gradient at the latents, and seconds of the backward. ToyWorld's clips of 9 frames are 3 chunks; longer clips play
them forwards and backwards. The gradient at the kept frames is the critic's, for its explanations of each aspect
(``critic``), or white noise (``noise``).

Also: the share of pixels that the VAE saturates, the share of the critic's gradient on them, and the part of it that
would push them further out, which ``wan_vae.InwardClamp`` drops; a plain clamp drops all of it.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.script import device_name, make_parser, reports_errors, save
from lowmem_drf.method.frames import backward_chunks, kept_frames
from lowmem_drf.method.reward import RewardSpec
from lowmem_drf.method.step import critic_backward
from lowmem_drf.method.vae_stream import decode, vae_backward
from lowmem_drf.models.qwen_vl.critic import VLMCritic, load_critic
from lowmem_drf.models.wan.vae.decoder import WanDecoder, load_vae
from lowmem_drf.models.weights.sources import TOYWORLD, resolve
from lowmem_drf.questions.make import make_questions
from lowmem_drf.toy.captions import caption
from lowmem_drf.toy.scenes import FRAMES, Combo, combos_of, draw_tracks, render

SETTINGS = ((9, 9), (81, 4), (81, 8))
"""Frames of the clip, and number of evenly spaced frames that the critic sees."""
WINDOWS = (0, 1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Clips:
    """Latents of clips, the decoded frames that are kept, and the gradients at those."""

    latents_BCFhw: Tensor
    kept: tuple[int, ...]
    frames_BTCHW: Tensor
    upstream: dict[str, Tensor]


def turning(frames: int) -> list[int]:
    """0, 1, .. 8, 7, .. 0, 1 ..: the frame of a ToyWorld clip for each frame of a longer one."""
    there_and_back = [*range(FRAMES), *range(FRAMES - 2, 0, -1)]
    return [there_and_back[i % len(there_and_back)] for i in range(frames)]


@torch.no_grad()
def encoded(decoder: WanDecoder, clips_BTCHW: Tensor) -> Tensor:
    """Frames in [0, 1] -> latents (B, C, F, h, w) as the transformer has them."""
    config = decoder.vae.config
    pair = (config.latents_mean, config.latents_std)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1).to(clips_BTCHW) for values in pair)
    return (decoder.vae.encode(clips_BTCHW.transpose(1, 2) * 2 - 1).latent_dist.mode() - mean) / std


def clips_of(decoder: WanDecoder, critic: VLMCritic, combos: Sequence[Combo], frames: int, n_kept: int) -> Clips:
    generator = torch.Generator().manual_seed(0)
    drawn = render(draw_tracks(list(combos), generator))[:, turning(frames)].to(decoder.vae.device)
    latents, kept = encoded(decoder, drawn), kept_frames(frames, n_kept)
    made = decode(decoder, latents, kept)[0]
    asked = [make_questions(caption(combo), "dense", TOYWORLD) for combo in combos]
    d_critic = critic_backward(critic, made, asked, RewardSpec())[1]
    noise = torch.randn(made.shape, generator=generator).to(made)
    return Clips(latents, kept, made, {"critic": d_critic, "noise": noise})


def gradient(decoder: WanDecoder, clips: Clips, d_frames: Tensor, window: int | None) -> tuple[Tensor, float]:
    """The gradient at the latents, and the seconds of the backward."""
    _, entering = decode(decoder, clips.latents_BCFhw, clips.kept, window)
    start = time.perf_counter()
    d_latents = vae_backward(decoder, clips.latents_BCFhw, entering, d_frames, clips.kept, window)
    if d_latents.device.type == "cuda":
        torch.cuda.synchronize(d_latents.device)
    return d_latents, time.perf_counter() - start


def compare(got: Tensor, wanted: Tensor) -> dict[str, float]:
    """Relative error and cosine of all clips' gradients as one vector."""
    cosine = torch.cosine_similarity(got.flatten().double(), wanted.flatten().double(), dim=0)
    return {"error": ((got - wanted).norm() / wanted.norm()).item(), "cosine": cosine.item()}


def measure(decoder: WanDecoder, clips: Clips, repeats: int) -> list[dict[str, Any]]:
    """One row per window, ``exact`` last: ``chunks`` visited, ``s`` (median), and ``error`` and ``cosine`` per upstream
    gradient."""
    windows = [*WINDOWS, None]
    made: dict[tuple[str, int | None], Tensor] = {}
    seconds: dict[int | None, list[float]] = {window: [] for window in windows}
    for _ in range(max(1, repeats)):
        for name, d_frames in clips.upstream.items():
            for window in windows:  # in turns, so that other load affects all of them
                made[name, window], s = gradient(decoder, clips, d_frames, window)
                seconds[window].append(s)
    rows = []
    for window in windows:
        chunks = len(backward_chunks(clips.kept, decoder.temporal_factor, window))
        name = "exact" if window is None else f"window:{window}"
        row: dict[str, Any] = {"vae_backward": name, "chunks": chunks, "s": statistics.median(seconds[window])}
        rows.append(row | {name: compare(made[name, window], made[name, None]) for name in clips.upstream})
    return rows


def saturation(clips: Clips) -> dict[str, float]:
    """Share of the pixels at an end of [0, 1], share of the critic's squared gradient on them, and share of it that
    points outwards there."""
    frames, d = clips.frames_BTCHW, clips.upstream["critic"]
    low, high = frames <= 0, frames >= 1
    power = d.pow(2).sum()
    outwards = (low & (d > 0)) | (high & (d < 0))  # descent moves a value against its gradient
    shares = {
        "pixels": (low | high).float().mean(),
        "clamp_drops": d[low | high].pow(2).sum() / power,
        "inward_drops": d[outwards].pow(2).sum() / power,
    }
    return {name: share.item() for name, share in shares.items()}


def table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    made = Table("vae_backward", "chunks", "s", "error (critic)", "cosine", "error (noise)", "cosine", title=title)
    for row in rows:
        accuracy = [f"{row[name][key]:.5f}" for name in ("critic", "noise") for key in ("error", "cosine")]
        made.add_row(row["vae_backward"], str(row["chunks"]), f"{row['s']:.2f}", *accuracy)
    return made


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Prints the tables; returns the exit code."""
    parser = make_parser(__spec__.name, __doc__)
    parser.add_argument("--clips", type=int, default=4, help="clips in a batch")
    parser.add_argument("--repeats", type=int, default=3, help="timed repeats; the median counts")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    console = Console(soft_wrap=True)
    critic = load_critic(resolve(TOYWORLD, "critic"), torch.float32, options.device)
    decoder = WanDecoder(load_vae(resolve(TOYWORLD, "generator"), torch.float32, options.device))
    known = combos_of("train")
    combos = known[:: max(1, len(known) // options.clips)][: options.clips]
    results = []
    for frames, n_kept in SETTINGS:
        clips = clips_of(decoder, critic, combos, frames, n_kept)
        rows = measure(decoder, clips, options.repeats)
        shares = saturation(clips)
        console.print(table(f"{n_kept} of {frames} frames", rows))
        drops = "a clamp drops {clamp_drops:.2%} of the gradient, ours {inward_drops:.2%}".format(**shares)
        console.print(f"{shares['pixels']:.2%} of the pixels are saturated; {drops}")
        results.append({"frames": frames, "kept": list(clips.kept), "saturation": shares, "rows": rows})
    found = {"clips": len(combos), "repeats": options.repeats, "device": device_name(options.device)}
    save(options.json, found | {"settings": results}, "torch", "diffusers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
