"""What do 4 and 8 bits in the frozen base (``model.quant``) do to the velocity, and to the gradients of a LoRA on it?

    python -m bench.accuracy.quant_error --json bench/results/quant_error.json

Against the same model in fp32, for the same inputs and the same gradient at its output. bf16 throughout stands beside
it, to tell what rounding alone does. The LoRA is of rank 8, its product a twentieth of each weight.

ToyWorld's generator, trained: at the latents that its own sampler visits, for 16 held-out prompts. One block of
Wan2.1-1.3B and of 14B at its true size, 128 tokens: what it adds to its input. Its weights are random and Gaussian,
which is what NF4's values were made for: its figures say how much of the error comes from the format at that width, and
no more.

``error`` is the norm of the difference over the norm of what is wanted, ``cosine`` the one between the two, means over
noise levels and clips (``worst``: the smallest cosine). Of the gradients all modules make one vector.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench.versions import versions
from lowmem_drf.errors import LowmemError
from lowmem_drf.method.schedule import draw_noise, flow_sigmas
from lowmem_drf.models.generators import KNOWN_GENERATORS
from lowmem_drf.models.lora.adapter import ADAPTER, add_lora, lora_layers, lora_parameters, remove_lora
from lowmem_drf.models.wan.denoiser import as_velocity, load_denoiser
from lowmem_drf.models.wan.random_generator import random_transformer
from lowmem_drf.models.wan.text import load_text
from lowmem_drf.models.weights.packed_linear import PackedLinear
from lowmem_drf.models.weights.quant import in_transformer, lay_out, require_library
from lowmem_drf.models.weights.sources import TOYWORLD, resolve
from lowmem_drf.toy.build.generator import SHIFT, TEXT_TOKENS
from lowmem_drf.toy.captions import heldout_prompts

STEPS, RANK, SHARE = 10, 8, 0.05
TOKENS, TEXT = 128, 64
"""Of the block: those of the video, and those of the text."""
BLOCKS = {"Wan2.1-1.3B": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan2.1-14B": "Wan-AI/Wan2.1-T2V-14B-Diffusers"}
VARIANTS = {
    "bf16": ("none", torch.bfloat16),
    "int8": ("int8", torch.float32),
    "int8, bf16": ("int8", torch.bfloat16),
    "nf4": ("nf4", torch.float32),
    "nf4, bf16": ("nf4", torch.bfloat16),
}
"""Name -> what the linears of the blocks are kept in, and the dtype of everything else."""
PARTS = ("output", "lora", "input")
"""What is compared: what comes out, and the gradients of the LoRA and at the input."""

Results = list[dict[str, Tensor]]
"""By noise level and clip: the parts, each flat."""


def variant(transformer: Any, quant: str, dtype: torch.dtype) -> Any:
    """A copy of an fp32 transformer in other bits; what diffusers keeps in fp32 stays in it."""
    made = copy.deepcopy(transformer)
    lay_out(made, quant, in_transformer)  # type: ignore[arg-type]
    for name, module in made.named_modules():
        if isinstance(module, PackedLinear):
            source = transformer.get_submodule(name)
            module.pack(source.weight)
            module.bias = nn.Parameter(source.bias.clone(), requires_grad=False)
    kept = set(made._keep_in_fp32_modules)
    for name, parameter in made.named_parameters():
        if parameter.is_floating_point() and not kept & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return made


def put_lora(transformer: Any, reference: Any) -> None:
    """A LoRA whose product has ``SHARE`` of the norm of the reference's weight, module by module."""
    add_lora(transformer, RANK, float(RANK))
    for place, (name, layer) in enumerate(lora_layers(transformer).items()):
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        with torch.no_grad():
            b.normal_(generator=torch.Generator().manual_seed(place))
            b.mul_(SHARE * reference.get_submodule(name).weight.norm() / (b @ a).norm())


def held_against(reference: Any, run: Callable[[Any], Results]) -> dict[str, dict[str, dict[str, float]]]:
    """By variant and part: error and cosine."""

    def results(transformer: Any) -> Results:
        put_lora(transformer, reference)
        made = run(transformer)
        remove_lora(transformer)
        return made

    wanted = results(copy.deepcopy(reference))
    return {name: compare(results(variant(reference, *bits)), wanted) for name, bits in VARIANTS.items()}


def compare(got: Results, wanted: Results) -> dict[str, dict[str, float]]:
    rows = {}
    for part in PARTS:
        mine, theirs = (torch.stack([one[part] for one in results]).double() for results in (got, wanted))
        cosine = torch.nn.functional.cosine_similarity(mine, theirs, dim=1)
        error = (mine - theirs).norm(dim=1) / theirs.norm(dim=1)
        rows[part] = {"error": error.mean().item(), "cosine": cosine.mean().item(), "worst": cosine.min().item()}
    return rows


def parts(output: Tensor, x: Tensor, cotangent: Tensor, lora: Sequence[Tensor]) -> dict[str, Tensor]:
    d_x, *gradients = torch.autograd.grad(output, [x, *lora], cotangent)
    return {
        "output": output.detach().float().flatten(),
        "input": d_x.float().flatten(),
        "lora": torch.cat([g.flatten() for g in gradients]),
    }


def toy(clips: int) -> tuple[Any, Callable[[Any], Results]]:
    """ToyWorld's transformer, and what is done with each of its variants."""
    folder = resolve(TOYWORLD, "generator")
    reference = load_denoiser(folder)
    text = load_text(folder).encode(heldout_prompts(clips), TEXT_TOKENS)
    sigmas, x = flow_sigmas(STEPS, SHIFT), draw_noise((16, 3, 8, 8), range(clips))
    visited = []
    with torch.no_grad():
        for sigma, after in zip(sigmas.tolist(), sigmas.tolist()[1:], strict=False):
            visited.append((sigma, x))
            x = x + (after - sigma) * as_velocity(reference)(x, sigma, text)
    cotangent = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(1))

    def run(transformer: Any) -> Results:
        velocity, lora, made = as_velocity(transformer), lora_parameters(transformer), []
        for sigma, latents in visited:
            for clip in range(clips):
                start = latents[clip : clip + 1].requires_grad_()
                made.append(parts(velocity(start, sigma, text[clip : clip + 1]), start, cotangent, lora))
        return made

    return reference, run


def block(config: dict[str, Any]) -> tuple[Any, Callable[[Any], Results]]:
    """A transformer of this configuration with one block, and what is done with that block: its output less its input,
    as that passes by unchanged."""
    reference = random_transformer(config, layers=1)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    noise = torch.Generator().manual_seed(0)
    hidden, cotangent = (torch.randn(1, TOKENS, width, generator=noise) for _ in range(2))
    text, time = torch.randn(1, TEXT, width, generator=noise), torch.randn(1, 6, width, generator=noise)
    rotary = reference.rope(torch.empty(1, config["in_channels"], 2, 16, TOKENS // 8))

    def run(transformer: Any) -> Results:
        dtype = transformer.patch_embedding.weight.dtype
        start = hidden.to(dtype).requires_grad_()
        added = transformer.blocks[0](start, text.to(dtype), time, rotary) - start
        return [parts(added, start, cotangent.to(dtype), lora_parameters(transformer))]

    return reference, run


def table(title: str, rows: dict[str, dict[str, dict[str, float]]]) -> Table:
    made = Table("kept in", "of", title=title, title_justify="left")
    columns = ("error", "cosine", "worst")
    for column in columns:
        made.add_column(column, justify="right")
    for name, row in rows.items():
        for part, figures in row.items():
            made.add_row(
                name if part == PARTS[0] else "",
                part,
                *(f"{figures[column]:.5f}" for column in columns),
                end_section=part == PARTS[-1],
            )
    return made


def main(arguments: list[str] | None = None) -> int:
    """Prints the tables; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy.quant_error", description=__doc__.partition("\n")[0] if __doc__ else None
    )
    parser.add_argument("--clips", type=int, default=16, help="of ToyWorld")
    parser.add_argument(
        "--blocks", nargs="*", default=list(BLOCKS), choices=list(BLOCKS), help="at true size; none: --blocks"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args(arguments)
    console = Console(soft_wrap=True)
    try:
        require_library("nf4", "model.quant")
        made = {"ToyWorld": held_against(*toy(options.clips))}
        made |= {
            f"a block of {name}": held_against(*block(KNOWN_GENERATORS[BLOCKS[name]].config.transformer))
            for name in options.blocks
        }
    except LowmemError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    for title, rows in made.items():
        console.print(table(title, rows))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "clips": options.clips,
            "device": "CPU",
            "versions": versions("torch", "diffusers", "bitsandbytes"),
            "models": made,
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
