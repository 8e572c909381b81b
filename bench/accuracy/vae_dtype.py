"""Error of the VAE in 16 bit: in the frames that the critic sees, and in their gradient at the latents.

    python -m bench.accuracy.vae_dtype --json bench/results/vae_dtype.json

The reference is fp64. Compared with it: values and gradients in fp32, gradients alone in bf16
(``memory.vae_grad_dtype``), values in fp16 besides (``memory.vae_dtype``), and all in bf16. The upstream gradient is
white noise, the same for all. Two VAEs: ToyWorld's trained one on its own clips, and one with random weights and the
channels of Wan 2.1's, on noise of 32 x 32 pixels.

A frame's error is in steps of 8 bits. bf16 has 128 values between 0.5 and 1, half of an 8-bit screen's, so smooth
gradients of colour may show bands (``levels``: distinct values of the frames between 0.5 and 1).
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.accuracy.vae_window import compare, encoded
from bench.script import make_parser, reports_errors, save
from lowmem_drf.method.vae_stream import decode, vae_backward
from lowmem_drf.models.wan.vae.decoder import WanDecoder, load_vae
from lowmem_drf.models.weights.sources import TOYWORLD, resolve
from lowmem_drf.toy.scenes import combos_of, draw_tracks, render

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

WAN21 = dict(base_dim=96, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True])
DTYPES = {
    "fp32": (torch.float32, None),
    "fp32, gradients bf16": (torch.float32, torch.bfloat16),
    "fp16, gradients bf16": (torch.float16, torch.bfloat16),
    "bf16": (torch.bfloat16, None),
}
"""Name -> ``memory.vae_dtype``, and ``memory.vae_grad_dtype`` if it differs."""


def random_vae(seed: int = 0) -> AutoencoderKLWan:
    """A VAE with the channels of Wan 2.1's and diffusers' initialisation."""
    from diffusers import AutoencoderKLWan

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKLWan(**WAN21).eval().requires_grad_(False)


def run(
    vae: AutoencoderKLWan, dtype: torch.dtype, grad_dtype: torch.dtype | None, latents_BCFhw: Tensor, d_frames: Tensor
) -> tuple[Tensor, Tensor]:
    """(all frames, gradient at the latents)."""
    decoder = WanDecoder(vae.to(dtype), grad_dtype=grad_dtype)
    latents, kept = latents_BCFhw.to(torch.promote_types(dtype, torch.float32)), range(d_frames.shape[1])
    frames, entering = decode(decoder, latents, kept)
    return frames, vae_backward(decoder, latents, entering, d_frames.to(frames), kept)


def silence() -> None:
    """Silences the warning that diffusers prints at every cast of a model."""
    from diffusers.utils import logging

    logging.set_verbosity_error()


def measure(vae: AutoencoderKLWan, latents_BCFhw: Tensor) -> list[dict[str, Any]]:
    """One row per choice of dtypes: ``mean`` and ``most`` (errors in 1/255) and ``levels`` of the frames, ``error`` and
    ``cosine`` of the gradient."""
    size = [n * vae.config.scale_factor_spatial for n in latents_BCFhw.shape[3:]]
    n_frames = 1 + (latents_BCFhw.shape[2] - 1) * vae.config.scale_factor_temporal
    d_frames = torch.randn(len(latents_BCFhw), n_frames, 3, *size, generator=torch.Generator().manual_seed(1))
    state = {name: weight.clone() for name, weight in vae.state_dict().items()}
    wanted = run(vae, torch.float64, None, latents_BCFhw, d_frames)
    rows = []
    for name, (dtype, grad_dtype) in DTYPES.items():
        vae.to(torch.float32).load_state_dict(state)  # undo the rounding of a narrower dtype
        frames, d_latents = run(vae, dtype, grad_dtype, latents_BCFhw, d_frames)
        error = 255 * (frames.double() - wanted[0]).abs()
        levels = len(frames[(frames > 0.5) & (frames < 1)].unique())
        row = {"dtypes": name, "mean": error.mean().item(), "most": error.max().item(), "levels": levels}
        rows.append(row | compare(d_latents.double(), wanted[1]))
    return rows


def table(title: str, rows: list[dict[str, Any]]) -> Table:
    made = Table("dtypes", "frames: mean error", "largest", "levels", "gradient: error", "cosine", title=title)
    for row in rows:
        frames = (f"{row['mean']:.4f}/255", f"{row['most']:.3f}/255", str(row["levels"]))
        made.add_row(row["dtypes"], *frames, f"{row['error']:.2e}", f"{row['cosine']:.6f}")
    return made


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Prints the tables; returns the exit code."""
    parser = make_parser(__spec__.name, __doc__)
    parser.add_argument("--clips", type=int, default=4, help="ToyWorld clips in a batch")
    options = parser.parse_args(arguments)
    console = Console(soft_wrap=True)
    silence()
    toy = load_vae(resolve(TOYWORLD, "generator"))
    combos = combos_of("train")[:: len(combos_of("train")) // options.clips][: options.clips]
    clips = render(draw_tracks(combos, torch.Generator().manual_seed(0)))
    noise = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    results = {
        "ToyWorld's VAE": measure(toy, encoded(WanDecoder(toy), clips)),
        "Wan 2.1's channels, random weights": measure(random_vae(), noise),
    }
    for title, rows in results.items():
        console.print(table(title, rows))
    save(options.json, {"clips": len(combos), "device": "CPU", "vaes": results}, "torch", "diffusers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
