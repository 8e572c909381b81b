"""What does the VAE lose in bf16: in the frames that the critic sees, and in their gradient at the latents?

    python -m bench.accuracy.vae_dtype --json bench/results/vae_dtype.json

Against fp64: the stream with values and gradients in fp32, with gradients alone in bf16 (``memory.vae_grad_dtype``),
and all in bf16 (``memory.vae_dtype`` too). The gradient's upstream is white noise, the same for all. Two VAEs:
ToyWorld's trained one on its own clips, and one of random weights with the channels of Wan 2.1's, on noise of 32 x 32
pixels.

A frame's error is in steps of 8 bits. Bands are where a smooth shade comes out in too few of them: of the values that
bf16 can have between 0.5 and 1 there are 128, half of what a screen shows (``levels``: distinct values of the frames
between 0.5 and 1).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.accuracy.vae_window import compare, encoded
from bench.versions import versions
from lowmem_drf.errors import LowmemError
from lowmem_drf.method.vae_stream import decode, vae_backward
from lowmem_drf.models.wan.decoder import WanDecoder, load_vae
from lowmem_drf.models.weights.sources import TOYWORLD, resolve
from lowmem_drf.toy.scenes import combos_of, draw_tracks, render

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

WAN21 = dict(base_dim=96, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True])
DTYPES = {
    "fp32": (torch.float32, None),
    "fp32, gradients bf16": (torch.float32, torch.bfloat16),
    "bf16": (torch.bfloat16, None),
}
"""Name -> ``memory.vae_dtype``, and ``memory.vae_grad_dtype`` where it is another."""


def random_vae(seed: int = 0) -> AutoencoderKLWan:
    """The channels of Wan 2.1's VAE, initialised as diffusers does it."""
    from diffusers import AutoencoderKLWan

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKLWan(**WAN21).eval().requires_grad_(False)


def run(
    vae: AutoencoderKLWan, dtype: torch.dtype, grad_dtype: torch.dtype | None, latents_BCFhw: Tensor, d_frames: Tensor
) -> tuple[Tensor, Tensor]:
    """(all frames, gradient at the latents)"""
    decoder = WanDecoder(vae.to(dtype), grad_dtype=grad_dtype)
    latents, kept = latents_BCFhw.to(torch.promote_types(dtype, torch.float32)), range(d_frames.shape[1])
    frames, entering = decode(decoder, latents, kept)
    return frames, vae_backward(decoder, latents, entering, d_frames.to(frames), kept)


def silence() -> None:
    """diffusers warns at every cast of a model."""
    from diffusers.utils import logging

    logging.set_verbosity_error()


def measure(vae: AutoencoderKLWan, latents_BCFhw: Tensor) -> list[dict[str, Any]]:
    """A row a choice of dtypes: of the frames ``mean`` and ``most`` (errors, in 1/255) and ``levels``; of the gradient
    ``error`` and ``cosine``."""
    size = [n * vae.config.scale_factor_spatial for n in latents_BCFhw.shape[3:]]
    n_frames = 1 + (latents_BCFhw.shape[2] - 1) * vae.config.scale_factor_temporal
    d_frames = torch.randn(len(latents_BCFhw), n_frames, 3, *size, generator=torch.Generator().manual_seed(1))
    state = {name: weight.clone() for name, weight in vae.state_dict().items()}
    wanted = run(vae, torch.float64, None, latents_BCFhw, d_frames)
    rows = []
    for name, (dtype, grad_dtype) in DTYPES.items():
        vae.to(torch.float32).load_state_dict(state)  # what a narrower dtype rounded away
        frames, d_latents = run(vae, dtype, grad_dtype, latents_BCFhw, d_frames)
        error = 255 * (frames.double() - wanted[0]).abs()
        levels = len(frames[(frames > 0.5) & (frames < 1)].unique())
        row: dict[str, Any] = {
            "dtypes": name,
            "mean": error.mean().item(),
            "most": error.max().item(),
            "levels": levels,
        }
        rows.append(row | compare(d_latents.double(), wanted[1]))
    return rows


def table(title: str, rows: list[dict[str, Any]]) -> Table:
    made = Table("dtypes", "frames: mean error", "largest", "levels", "gradient: error", "cosine", title=title)
    for row in rows:
        made.add_row(
            row["dtypes"],
            f"{row['mean']:.4f}/255",
            f"{row['most']:.3f}/255",
            str(row["levels"]),
            f"{row['error']:.2e}",
            f"{row['cosine']:.6f}",
        )
    return made


def main(arguments: list[str] | None = None) -> int:
    """Prints the tables; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy.vae_dtype", description=__doc__.partition("\n")[0] if __doc__ else None
    )
    parser.add_argument("--clips", type=int, default=4, help="ToyWorld clips in a batch")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    options = parser.parse_args(arguments)
    console = Console(soft_wrap=True)
    silence()
    try:
        toy = load_vae(resolve(TOYWORLD, "generator"))
    except LowmemError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    combos = combos_of("train")[:: len(combos_of("train")) // options.clips][: options.clips]
    clips = render(draw_tracks(combos, torch.Generator().manual_seed(0)))
    results = {"ToyWorld's VAE": measure(toy, encoded(WanDecoder(toy), clips))}
    results["Wan 2.1's channels, random weights"] = measure(
        random_vae(), torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    )
    for title, rows in results.items():
        console.print(table(title, rows))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        found = {"clips": len(combos), "device": "CPU", "versions": versions("torch", "diffusers"), "vaes": results}
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
