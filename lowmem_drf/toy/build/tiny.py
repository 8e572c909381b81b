"""ToyWorld's tiny decoder, in TAEHV's architecture: distilled from the decoder of ToyWorld's VAE."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from lowmem_drf.method.schedule import flow_sigmas
from lowmem_drf.method.step import rollout
from lowmem_drf.models.tiny.decoder import TinyDecoder
from lowmem_drf.models.tiny.files import network_for
from lowmem_drf.models.tiny.network import PREFIX, Sizes, TinyNetwork
from lowmem_drf.models.wan.decoder import WanDecoder, load_vae
from lowmem_drf.models.wan.denoiser import as_velocity, load_denoiser
from lowmem_drf.models.wan.text import load_text
from lowmem_drf.toy.build.generator import SHIFT, TEXT_TOKENS, cache_latents
from lowmem_drf.toy.build.loop import Schedule, scaled, train
from lowmem_drf.toy.build.vae import shape_nearby
from lowmem_drf.toy.captions import train_prompts

SIZES = Sizes(latent=16, widths=(32, 24, 16, 16), patch=2)
NOISE = 0.4
"""Most noise that is added to latents: training takes a generator beyond the latents that it makes today."""
GRADIENT = 0.3
"""Weight of the gradient's error beside that of the frames."""


@dataclass(frozen=True)
class Lessons:
    """What the VAE does with latents: its frames, and its gradient at the latents, of norm 1, for one at the frames."""

    latents_BCFhw: Tensor
    frames_BTCHW: Tensor
    upstream_BTCHW: Tensor
    gradient_BCFhw: Tensor

    def take(self, rows: Tensor) -> Lessons:
        return Lessons(*(getattr(self, field.name)[rows].float() for field in fields(self)))


def draw_upstream(frames_BTCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Gradients at frames: noise as coarse as 1 to 8 pixels, in half of the clips only near the shape, where most of a
    critic's gradient is."""
    made = []
    for frames in frames_BTCHW:
        coarse = 2 ** int(torch.randint(4, (1,), generator=generator))
        noise = torch.randn(*frames.shape[:2], *(side // coarse for side in frames.shape[2:]), generator=generator)
        made.append(F.interpolate(noise, size=frames.shape[2:], mode="bilinear"))
    upstream = torch.stack(made)
    near = torch.rand(len(upstream), 1, 1, 1, 1, generator=generator) < 0.5
    return torch.where(near, upstream * shape_nearby(2 * frames_BTCHW.transpose(1, 2)).transpose(1, 2), upstream)


def lessons_of(folder: Path, vae: AutoencoderKLWan, seed: int, scale: float) -> Lessons:
    """Of drawn clips, and of as many that the generator made, all with noise; in fp16."""
    drawn, _ = cache_latents(vae, seed, scaled(640, min(1.0, scale)))
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
    exact, rest = WanDecoder(vae), list[tuple[Tensor, Tensor, Tensor]]()
    for part in z.split(16):
        frames = exact.decode(part.requires_grad_())
        upstream = draw_upstream(frames.detach(), generator)
        (gradient,) = torch.autograd.grad(frames, part, upstream)
        size = gradient.flatten(1).norm(dim=1).clamp_min(1e-3)[:, None, None, None, None]  # 0: no shape is near
        rest.append((frames.detach().half(), (upstream / size).half(), (gradient / size).half()))
    return Lessons(z.detach().half(), *(torch.cat(column) for column in zip(*rest, strict=True)))


def train_tiny(
    generator_folder: Path, folder: Path, seed: int, scale: float = 1.0, log: Callable[[str], None] = print
) -> TinyNetwork:
    """Learns the VAE's frames and gradients from the latents alone. Needs nothing but a written generator."""
    torch.manual_seed(seed)
    vae = load_vae(str(generator_folder))
    network = network_for(SIZES, vae.config)
    tiny = TinyDecoder(network.requires_grad_())
    data = cache(partial(lessons_of, generator_folder, vae, seed, scale))

    def loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        taken = data()
        some = taken.take(torch.randint(len(taken.latents_BCFhw), (8,), generator=generator))
        wanted, z = some.frames_BTCHW, some.latents_BCFhw.requires_grad_()
        made = tiny.decode(z)
        error = 2 * (made - wanted)
        near = 1 + 3 * shape_nearby(2 * wanted.transpose(1, 2)).transpose(1, 2)
        edges = sum(error.diff(dim=d).abs().mean() for d in (-1, -2))
        frames = (error.abs() * near).mean() + 2 * (error.pow(2) * near).mean() + 0.5 * edges
        (gradient,) = torch.autograd.grad(made, z, some.upstream_BTCHW, create_graph=True)
        off = (gradient - some.gradient_BCFhw).flatten(1).pow(2).sum(1)
        psnr = (10 * torch.log10(4 / error.detach().pow(2).mean())).item()
        return frames + GRADIENT * off.mean(), {"psnr": psnr, "gradient": off.mean().item()}

    warmup = min(100, scaled(300, scale))
    schedule = Schedule(steps=scaled(1400, scale), lr=4e-3, warmup=warmup, floor=0.01, ema=0.99, log_every=100)
    train("tiny", network, loss, schedule, folder, seed, log=log)
    return network.requires_grad_(False)


def save_tiny(network: TinyNetwork, file: Path) -> None:
    """Writes a file as TAEHV's are. Weights in fp16."""
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    weights = network.layers.state_dict()
    save_file({f"{PREFIX}{name}": weight.half() for name, weight in weights.items()}, file)
