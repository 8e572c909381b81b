"""Effect of int8 attention in the rollout on the clips.

    python -m bench.accuracy.rollout_int8 --json bench/results/rollout_int8.json

ToyWorld's base generator on held-out prompts, from the same noise: clips with exact attention among the tokens, with
the kernel's 8-bit scheme (the plain PyTorch form in ``kernels/attention_int8.py``), and, as a yardstick, with exact
attention from other noise. The oracle judges all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from bench.script import make_parser, save
from lowmem_drf.kernels.attention_int8 import attention_int8_naive
from lowmem_drf.method.schedule import draw_noise, flow_sigmas
from lowmem_drf.method.step import rollout
from lowmem_drf.models.blocks import Activations
from lowmem_drf.models.wan.denoiser import as_velocity, load_denoiser, set_activations
from lowmem_drf.models.wan.text import load_text
from lowmem_drf.models.wan.vae.decoder import WanDecoder, load_vae
from lowmem_drf.models.weights.sources import TOYWORLD, resolve
from lowmem_drf.toy.captions import heldout_prompts, parse
from lowmem_drf.toy.oracle import measure

STEPS, SHIFT, TEXT_TOKENS, BATCH = 10, 3.0, 16, 64

OTHER_NOISE = 100_000
"""First seed of the yardstick."""


@torch.no_grad()
def clips(
    prompts: list[str], attention: Callable[[Tensor, Tensor, Tensor], Tensor] | None, first_seed: int = 0
) -> Tensor:
    """(B, T, 3, H, W) in [0, 1]."""
    folder = resolve(TOYWORLD, "generator")
    text, decoder, transformer = load_text(folder), WanDecoder(load_vae(folder)), load_denoiser(folder)
    set_activations(transformer, Activations(rollout_attention=attention))
    made = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        noise = draw_noise((16, 3, 8, 8), [first_seed + start + i for i in range(len(part))])
        encoded, sigmas = text.encode(part, TEXT_TOKENS), flow_sigmas(STEPS, SHIFT)
        made.append(decoder.decode(rollout(as_velocity(transformer), sigmas, noise, encoded, None)[0]))
    return torch.cat(made)


def main(arguments: list[str] | None = None) -> int:
    """Prints a line per kind of clips; returns the exit code."""
    parser = make_parser(__spec__.name, __doc__)
    parser.add_argument("--prompts", type=int, default=256)
    options = parser.parse_args(arguments)
    prompts = heldout_prompts(options.prompts)
    combos = [combo for prompt in prompts if (combo := parse(prompt))]
    exact = clips(prompts, None)
    int8, other = clips(prompts, attention_int8_naive), clips(prompts, None, OTHER_NOISE)
    rows = {}
    for name, made in (("exact", exact), ("int8", int8), ("other noise", other)):
        seen = measure(made)
        hits = {**seen.matches(combos), "physics": seen.physics, "quality": seen.quality}
        rates = {key: value.float().mean().item() for key, value in hits.items()}
        rows[name] = {"levels_of_255": 255 * (made - exact).abs().mean().item(), **rates}
        print(f"{name:12}", "  ".join(f"{key} {value:.3f}" for key, value in rows[name].items()))
    save(options.json, {"rows": rows, "prompts": len(prompts)}, "torch", "diffusers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
