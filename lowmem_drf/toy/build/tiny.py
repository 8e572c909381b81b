"""ToyWorld's tiny decoder, in TAEHV's architecture: distilled from the decoder of ToyWorld's VAE."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from lowmem_drf.assembly.sizes import sizes_of
from lowmem_drf.method.schedule import flow_sigmas
from lowmem_drf.method.step import rollout
from lowmem_drf.models.generators import generator_config
from lowmem_drf.models.tiny.decoder import TinyDecoder
from lowmem_drf.models.tiny.files import network_for
from lowmem_drf.models.tiny.network import PREFIX, Sizes, TinyNetwork
from lowmem_drf.models.wan.denoiser import as_velocity, load_denoiser
from lowmem_drf.models.wan.text import load_text
from lowmem_drf.models.wan.vae.decoder import WanDecoder, load_vae
from lowmem_drf.toy.build.generator import SHIFT, TEXT_TOKENS, cache_latents
from lowmem_drf.toy.build.loop import Schedule, scaled, train
from lowmem_drf.toy.build.vae import shape_nearby
from lowmem_drf.toy.captions import train_prompts

SIZES = Sizes(latent=16, widths=(32, 24, 16, 16), patch=2)
NOISE = 0.4
"""Most noise that is added to latents: training takes a generator beyond the latents that it makes today."""


@torch.no_grad()
def pairs_of(folder: Path, vae: AutoencoderKLWan, seed: int, scale: float) -> tuple[Tensor, Tensor]:
    """Latents (n, 16, 3, 8, 8) of drawn clips, and of as many that the generator made, with noise; and what the VAE
    makes of them, in fp16."""
    drawn, _ = cache_latents(vae, seed, scaled(1024, min(1.0, scale)))
    text, velocity = load_text(str(folder)), as_velocity(load_denoiser(str(folder)))
    generator, prompts = torch.Generator().manual_seed(seed + 3), train_prompts()
    chosen = torch.randint(len(prompts), (len(drawn),), generator=generator).split(64)
    made = []
    for rows in chosen:
        condition = text.encode([prompts[i] for i in rows.tolist()], TEXT_TOKENS)
        noise = torch.randn(len(rows), *drawn.shape[1:], generator=generator)
        made.append(rollout(velocity, flow_sigmas(10, SHIFT), noise, condition, None)[0])
    z = torch.cat([drawn, *made])
    z += NOISE * torch.rand(len(z), 1, 1, 1, 1, generator=generator) * torch.randn(z.shape, generator=generator)
    exact = WanDecoder(vae)
    return z, torch.cat([exact.decode(part).half() for part in z.split(64)])


def train_tiny(
    generator_folder: Path, folder: Path, seed: int, scale: float = 1.0, log: Callable[[str], None] = print
) -> TinyNetwork:
    """Learns the VAE's frames from the latents alone. Needs nothing but a written generator."""
    torch.manual_seed(seed)
    vae = load_vae(str(generator_folder))
    network = network_for(SIZES, sizes_of(generator_config(str(generator_folder))))
    tiny = TinyDecoder(network.requires_grad_())
    data = cache(partial(pairs_of, generator_folder, vae, seed, scale))

    def loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        latents, frames = data()
        rows = torch.randint(len(latents), (8,), generator=generator)
        wanted = frames[rows].float()
        error = 2 * (tiny.decode(latents[rows]) - wanted)
        near = 1 + 3 * shape_nearby(2 * wanted.transpose(1, 2)).transpose(1, 2)
        edges = sum(error.diff(dim=d).abs().mean() for d in (-1, -2))
        psnr = (10 * torch.log10(4 / error.detach().pow(2).mean())).item()
        return (error.abs() * near).mean() + 2 * (error.pow(2) * near).mean() + 0.5 * edges, {"psnr": psnr}

    warmup = min(100, scaled(300, scale))
    schedule = Schedule(steps=scaled(2000, scale), lr=4e-3, warmup=warmup, floor=0.01, ema=0.99, log_every=100)
    train("tiny", network, loss, schedule, folder, seed, log=log)
    return network.requires_grad_(False)


def save_tiny(network: TinyNetwork, file: Path) -> None:
    """Writes a file as TAEHV's are. Weights in fp16."""
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    weights = network.layers.state_dict()
    save_file({f"{PREFIX}{name}": weight.half() for name, weight in weights.items()}, file)
