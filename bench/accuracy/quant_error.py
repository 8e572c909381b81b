"""Error of the velocity, and of a LoRA's gradients, when the frozen base is stored in 4 or 8 bits (``model.quant``).

    python -m bench.accuracy.quant_error --json bench/results/quant_error.json

The reference is the same model in fp32, with the same inputs and the same gradient at its output. bf16 throughout shows
the share of rounding. The LoRA has rank 8; the norm of its product is a twentieth of each weight's.

Two kinds of models. ToyWorld's trained generator, at the latents that its own sampler visits for 16 held-out prompts.
And one block of Wan2.1-1.3B and of 14B at true size, 128 tokens, without its residual input. The block's weights are
random and Gaussian, the distribution that NF4's values were chosen for, so its figures only show the format's error at
that width.

``error`` is the norm of the difference over the norm of the reference, ``cosine`` the cosine between the two, both as
means over noise levels and clips (``worst``: the smallest cosine). The gradients of all modules form one vector.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench.script import make_parser, reports_errors, save
from lowmem_drf.method.schedule import draw_noise, flow_sigmas
from lowmem_drf.models.generators import KNOWN_GENERATORS
from lowmem_drf.models.lora.adapter import ADAPTER, add_lora, lora_layers, lora_parameters, remove_lora
from lowmem_drf.models.wan.denoiser import as_velocity, load_denoiser
from lowmem_drf.models.wan.names import in_transformer
from lowmem_drf.models.wan.random_generator import random_transformer
from lowmem_drf.models.wan.text import load_text
from lowmem_drf.models.weights.packed_linear import PackedLinear
from lowmem_drf.models.weights.quant import lay_out, require_library, set_products
from lowmem_drf.models.weights.sources import TOYWORLD, resolve
from lowmem_drf.toy.build.generator import SHIFT, TEXT_TOKENS
from lowmem_drf.toy.captions import heldout_prompts

STEPS, RANK, SHARE = 10, 8, 0.05
TOKENS, TEXT = 128, 64
"""Tokens of the block: of the video and of the text."""
BLOCKS = {"Wan2.1-1.3B": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan2.1-14B": "Wan-AI/Wan2.1-T2V-14B-Diffusers"}
VARIANTS = {
    "bf16": ("none", torch.bfloat16),
    "int8": ("int8", torch.float32),
    "int8, bf16": ("int8", torch.bfloat16),
    "nf4": ("nf4", torch.float32),
    "nf4, bf16": ("nf4", torch.bfloat16),
}
"""Name -> storage format of the blocks' linear layers, and the dtype of everything else."""
PARTS = ("output", "lora", "input")
"""The output, and the gradients of the LoRA and at the input."""

Results = list[dict[str, Tensor]]
"""The flattened parts of each noise level and clip."""


def variant(transformer: Any, quant: str, dtype: torch.dtype) -> Any:
    """A copy of an fp32 transformer in another format, except for the modules that diffusers keeps in fp32. ``quant``:
    a format, or ``int8 products``."""
    made = copy.deepcopy(transformer)
    lay_out(made, quant.split()[0], in_transformer)  # type: ignore[arg-type]
    set_products(made, quant == "int8 products")
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
    """Adds a LoRA; the norm of its product is ``SHARE`` of the reference's weight, module by module."""
    add_lora(transformer, RANK, float(RANK))
    for place, (name, layer) in enumerate(lora_layers(transformer).items()):
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        with torch.no_grad():
            b.normal_(generator=torch.Generator().manual_seed(place))
            b.mul_(SHARE * reference.get_submodule(name).weight.norm() / (b @ a).norm())


def compare_variants(
    reference: Any, run: Callable[[Any], Results], variants: Mapping[str, tuple[str, torch.dtype]] = VARIANTS
) -> dict[str, dict[str, dict[str, float]]]:
    """Error and cosine of each variant and part."""

    def results(transformer: Any) -> Results:
        put_lora(transformer, reference)
        made = run(transformer)
        remove_lora(transformer)
        return made

    wanted = results(copy.deepcopy(reference))
    return {name: compare(results(variant(reference, *bits)), wanted) for name, bits in variants.items()}


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
    """ToyWorld's transformer, and the function that runs a variant of it."""
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
    """A transformer of this configuration with one block, and the function that runs a variant of it. The output is the
    block's without its input, which the residual passes unchanged."""
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
            cells = (f"{figures[column]:.5f}" for column in columns)
            made.add_row(name if part == PARTS[0] else "", part, *cells, end_section=part == PARTS[-1])
    return made


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Prints the tables; returns the exit code."""
    parser = make_parser(__spec__.name, __doc__)
    parser.add_argument("--clips", type=int, default=16, help="number of ToyWorld clips")
    text = "blocks at true size; an empty list: none"
    parser.add_argument("--blocks", nargs="*", default=list(BLOCKS), choices=list(BLOCKS), help=text)
    options = parser.parse_args(arguments)
    console = Console(soft_wrap=True)
    require_library("nf4", "model.quant")
    made = {"ToyWorld": compare_variants(*toy(options.clips))}
    for name in options.blocks:
        config = KNOWN_GENERATORS[BLOCKS[name]].config.transformer
        made[f"a block of {name}"] = compare_variants(*block(config))
    for title, rows in made.items():
        console.print(table(title, rows))
    result = {"clips": options.clips, "device": "CPU", "models": made}
    save(options.json, result, "torch", "diffusers", "bitsandbytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
