"""What does int8 attention in the rollout do to the clips?

    python -m bench.accuracy.rollout_int8 --json bench/results/rollout_int8.json

ToyWorld's base generator, held-out prompts, the same noise: clips with exact attention among the tokens, with the
kernel's 8-bit scheme (``kernels/attention_int8.py``, its form in plain PyTorch), and with exact attention from other
noise, as the yardstick. The oracle judges all of them. 48 tokens a clip share one scale for q and one for k; a real
clip has a scale for every 128 queries and 64 keys.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench.versions import versions
from lowmem_drf.kernels.attention_int8 import attention_int8_naive
from lowmem_drf.method.schedule import draw_noise, flow_sigmas
from lowmem_drf.method.step import rollout
from lowmem_drf.models.wan.decoder import WanDecoder, load_vae
from lowmem_drf.models.wan.denoiser import as_velocity, load_denoiser, set_activations
from lowmem_drf.models.wan.text import load_text
from lowmem_drf.models.weights.sources import TOYWORLD, resolve
from lowmem_drf.toy.captions import heldout_prompts, parse
from lowmem_drf.toy.oracle import measure

STEPS, SHIFT, TEXT_TOKENS, BATCH = 10, 3.0, 16, 64

OTHER_NOISE = 100_000
"""Seeds of the yardstick begin here."""


@torch.no_grad()
def clips(
    prompts: list[str], attention: Callable[[Tensor, Tensor, Tensor], Tensor] | None, first_seed: int = 0
) -> Tensor:
    """(B, T, 3, H, W) in [0, 1]."""
    folder = resolve(TOYWORLD, "generator")
    text, decoder, transformer = load_text(folder), WanDecoder(load_vae(folder)), load_denoiser(folder)
    set_activations(transformer, rollout_attention=attention)
    made = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        noise = draw_noise((16, 3, 8, 8), [first_seed + start + i for i in range(len(part))])
        made.append(
            decoder.decode(
                rollout(
                    as_velocity(transformer), flow_sigmas(STEPS, SHIFT), noise, text.encode(part, TEXT_TOKENS), None
                )[0]
            )
        )
    return torch.cat(made)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--prompts", type=int, default=256)
    arguments.add_argument("--json", type=Path)
    options = arguments.parse_args()
    prompts = heldout_prompts(options.prompts)
    exact = clips(prompts, None)
    rows = {}
    for name, made in (
        ("exact", exact),
        ("int8", clips(prompts, attention_int8_naive)),
        ("other noise", clips(prompts, None, OTHER_NOISE)),
    ):
        seen = measure(made)
        hits = {
            **seen.matches([combo for prompt in prompts if (combo := parse(prompt))]),
            "physics": seen.physics,
            "quality": seen.quality,
        }
        rates = {key: value.float().mean().item() for key, value in hits.items()}
        rows[name] = {"levels_of_255": 255 * (made - exact).abs().mean().item(), **rates}
    for name, row in rows.items():
        print(f"{name:12}", "  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    if options.json:
        options.json.write_text(
            json.dumps({"rows": rows, "prompts": len(prompts), "versions": versions("torch", "diffusers")}, indent=2)
            + "\n"
        )


if __name__ == "__main__":
    main()
