"""Error of the velocity, and of a LoRA's gradients, when the frozen base multiplies in 8-bit integers
(``model.products``).

    python -m bench.accuracy.int8_products --json bench/results/int8_products.json

Models, reference and figures are those of ``bench.accuracy.quant_error``: ToyWorld's generator, and a block of
Wan2.1-1.3B at true size, whose weights are random. In the last model one channel of the block's activations is
``OUTLIER`` times as large as the others, at every layer that a modulation or the feed-forward's activation precedes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console

from bench.accuracy.quant_error import BLOCKS, Results, block, compare_variants, table, toy
from bench.script import make_parser, reports_errors, save
from lowmem_drf.models.generators import KNOWN_GENERATORS

OUTLIER = 100.0
VARIANTS = {
    "bf16": ("none", torch.bfloat16),
    "int8, bf16": ("int8", torch.bfloat16),
    "int8 products": ("int8 products", torch.float32),
    "int8 products, bf16": ("int8 products", torch.bfloat16),
}
"""Name -> storage format of the blocks' linear layers, or how they multiply, and the dtype of everything else."""


def true_block(outlier: float) -> tuple[Any, Callable[[Any], Results]]:
    """A block of Wan2.1-1.3B, and the function that runs a variant of it. ``outlier``: 0: no such channel."""
    reference, run = block(KNOWN_GENERATORS[BLOCKS["Wan2.1-1.3B"]].config.transformer)
    if outlier:
        first = reference.blocks[0]
        with torch.no_grad():
            first.scale_shift_table[0, [1, 4], 7] = outlier  # scales of the self-attention's and feed-forward's inputs
            first.ffn.net[0].proj.bias[11] = outlier  # a channel inside the feed-forward
    return reference, run


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Prints the tables; returns the exit code."""
    parser = make_parser(__spec__.name, __doc__)
    parser.add_argument("--clips", type=int, default=4, help="number of ToyWorld clips; 0: not this model")
    options = parser.parse_args(arguments)
    console, made = Console(soft_wrap=True), {}
    models: dict[str, Callable[[], tuple[Any, Callable[[Any], Results]]]] = {
        **({"ToyWorld": lambda: toy(options.clips)} if options.clips else {}),
        "a block of Wan2.1-1.3B": lambda: true_block(0),
        f"with a channel of {OUTLIER:g}": lambda: true_block(OUTLIER),
    }
    for title, model in models.items():
        made[title] = compare_variants(*model(), VARIANTS)
        console.print(table(title, made[title]))
    save(options.json, {"clips": options.clips, "device": "CPU", "models": made}, "torch", "diffusers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
