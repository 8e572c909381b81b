"""The looks that ToyWorld's own scenes have, after its VAE: what ``toy/drift.py`` compares generated clips with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from lowmem_drf.models.wan.vae.decoder import load_vae
from lowmem_drf.toy.build.critic import reconstruct
from lowmem_drf.toy.drift import DRAWN
from lowmem_drf.toy.oracle import measure
from lowmem_drf.toy.scenes import all_combos, draw_tracks, render


@torch.no_grad()
def save_looks(generator: Path, file: Path, log: Callable[[str], None]) -> None:
    """Draws ``DRAWN`` scenes of each of the 270 combinations, passes them through the generator's VAE, and writes their
    looks: fp32 (270, DRAWN, looks). The same scenes for every seed of a build: they are a yardstick."""
    vae, random = load_vae(str(generator)), torch.Generator().manual_seed(21)
    rows = []
    for combo in all_combos():
        looks = measure(reconstruct(vae, render(draw_tracks([combo] * DRAWN, random)))).looks
        rows.append(torch.stack(looks, -1))
    save_file({"looks": torch.stack(rows)}, file)
    log(f"looks: {len(rows)} x {DRAWN} scenes")
