"""ToyWorld's VAE: ``AutoencoderKLWan``, 0.47M parameters, 9 x 32 x 32 pixels <-> 16 x 3 x 8 x 8 latents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from lowmem_drf.toy.build.loop import Schedule, scaled, train
from lowmem_drf.toy.defects import PHYSICS, break_physics
from lowmem_drf.toy.scenes import combos_of, draw_tracks, render

CONFIG = dict(
    base_dim=8,
    z_dim=16,
    dim_mult=[1, 2, 4],
    num_res_blocks=1,
    temperal_downsample=[True, True],
    scale_factor_temporal=4,
    scale_factor_spatial=4,
)
KL_WEIGHT = 2e-4


def draw_clips(n: int, generator: torch.Generator, defect_share: float = 0.25) -> Tensor:
    """n clips (B, C, T, H, W) in [-1, 1] of the combinations models may train on, a share of them with a physics
    defect."""
    combos = torch.tensor(combos_of("train", "heldout"))
    tracks = draw_tracks(combos[torch.randint(len(combos), (n,), generator=generator)], generator)
    frames = render(tracks)
    broken = int(n * defect_share)
    if broken:
        kind = PHYSICS[int(torch.randint(len(PHYSICS), (1,), generator=generator))]
        part = type(tracks)(*(t[:broken] for t in tracks))
        frames[:broken] = render(break_physics(part, kind, generator))
    return frames.transpose(1, 2) * 2 - 1


def shape_nearby(x_BCTHW: Tensor) -> Tensor:
    """(B, 1, T, H, W): 1 within two pixels of the shape, else 0. Most of a frame is background, which every VAE learns
    at once."""
    background = x_BCTHW.flatten(3).median(-1).values[..., None, None]
    return F.max_pool3d(((x_BCTHW - background).abs().amax(1, keepdim=True) > 0.1).float(), (1, 5, 5), 1, (0, 2, 2))


def decode_unclamped(vae: AutoencoderKLWan, z: Tensor) -> Tensor:
    """``AutoencoderKLWan._decode`` (diffusers 0.42.1) without its final clamp, which has no gradient for pixels outside
    the range."""
    vae.clear_cache()
    z = vae.post_quant_conv(z)
    chunks = []
    for i in range(z.shape[2]):
        vae._conv_idx = [0]
        chunks.append(
            vae.decoder(z[:, :, i : i + 1], feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=i == 0)
        )
    vae.clear_cache()
    return torch.cat(chunks, 2)


def train_vae(folder: Path, seed: int, scale: float = 1.0, log: Callable[[str], None] = print) -> AutoencoderKLWan:
    """A third of the steps on single frames, the rest on clips; then the latents' mean and standard deviation are
    measured."""
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(**CONFIG, latents_mean=[0.0] * 16, latents_std=[1.0] * 16)
    image_steps = scaled(1000, scale)
    schedule = Schedule(
        steps=scaled(3400, scale), lr=4e-3, warmup=min(100, scaled(300, scale)), floor=0.01, ema=0.99, log_every=100
    )

    def loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        images = step < image_steps
        x = draw_clips(12 if images else 4, generator)
        if images:
            frame = int(torch.randint(x.shape[2], (1,), generator=generator))
            x = x[:, :, frame : frame + 1].contiguous()
        posterior = vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        y = decode_unclamped(vae, z)
        error = y - x
        edges = sum((error.diff(dim=d)).abs().mean() for d in (-1, -2))
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        mse = error.pow(2).mean()
        psnr = (10 * torch.log10(4 / mse.detach())).item()
        near = 1 + 3 * shape_nearby(x)
        return (error.abs() * near).mean() + 2 * (error.pow(2) * near).mean() + 0.5 * edges + KL_WEIGHT * kl, {
            "psnr": psnr,
            "kl": kl.item(),
        }

    train("vae", vae, loss, schedule, folder, seed, log=log)
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        clips = max(8, int(90 * min(1.0, scale)))
        draws = [draw_clips(clips, torch.Generator().manual_seed(seed + i), 0) for i in range(4)]
        z = torch.cat([vae.encode(x).latent_dist.mode() for x in draws])
    vae.register_to_config(latents_mean=z.mean((0, 2, 3, 4)).tolist(), latents_std=z.std((0, 2, 3, 4)).tolist())
    return vae
