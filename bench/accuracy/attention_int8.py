"""Error of int8 attention against exact attention, what each part of its quantisation is for, and what its forward does
to gradients (``kernels.graded_attention = "int8"``).

    python -m bench.accuracy.attention_int8 --json bench/results/attention_int8.json

The error is the norm of the difference over the norm of the exact result, in fp64, for one head of 128 channels. All
inputs are standard normal but for what a row names. Rotary rows turn q and k as Wan does, at tokens in the middle of
832x480x81.

Each column adds to the one before: scales of 128 queries and 64 keys, with the mean of k subtracted (SageAttention);
a scale for each token; the mean of q; the rotation; the weights of channels, which make it ``attention_int8_naive``
(beside it with weights that are not rounded to powers of two); and p and v in fp16 with sums rounded to fp16 after
every 8 keys, at least as often as tensor cores round them, and added up in fp32 after 64.

Spread: the standard deviation of scores without those of means, which are not rounded. Of normal inputs it is 1.

Gradients: cosines with those of exact attention. Of q, k and v, where the backward of exact attention, in fp32, takes
out and lse of the int8 forward, for a random gradient of out. Of ToyWorld's LoRA, after one update's relay on the first
training prompts:

- kept: graded steps with kept attentions, at the latents of an exact rollout;
- recorded: with ``memory.record_rollout``, against exact graded steps at the clips of the same int8 rollout;
- the same against the gradient at the clips of an exact rollout, which are other clips; as a yardstick, what computing
  in bf16 in the place of fp32 changes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import cache, partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.accuracy.quant_error import put_lora
from bench.script import make_parser, save
from lowmem_drf.assembly.assemble import Models, derive_seed, run_prompts, step_spec
from lowmem_drf.assembly.loading import load_models
from lowmem_drf.config import load_config
from lowmem_drf.kernels.attention_int8 import KEYS, V_BITS, attention_int8_naive, hadamard
from lowmem_drf.method.step import drf_step
from lowmem_drf.models.attention import attention_named, with_int8_forward
from lowmem_drf.models.lora.adapter import lora_parameters
from lowmem_drf.models.wan.denoiser import load_denoiser
from lowmem_drf.models.weights.sources import TOYWORLD, resolve
from lowmem_drf.questions.make import make_questions

CHANNELS = 128
FAR, WIDE = 15.0, 4.0
"""Of a channel that is far from zero, its mean; of one that is larger than the others, its standard deviation."""
FIRST, HEIGHT, WIDTH = 10 * 30 * 52, 30, 52
"""The first token, and tokens to a column and a row, of a clip."""
EXACT_SUM = 8
"""Products that a tensor core sums before it rounds to fp16: 8 on the oldest of ``CARDS``, 16 later."""


def _far(q: Tensor, k: Tensor) -> None:
    q[:, 5] += FAR
    k[:, 7] += FAR


def _four(q: Tensor, k: Tensor) -> None:
    q[:, [5, 30, 70, 100]] += FAR


def _wide(q: Tensor, k: Tensor) -> None:
    q[:, 5] *= WIDE
    k[:, 9] *= WIDE


def _spread(q: Tensor, k: Tensor) -> None:
    q *= 1.5
    k *= 1.5


def _rotary(channel: int) -> Callable[[Tensor, Tensor], None]:
    def apply(q: Tensor, k: Tensor) -> None:
        q[:, channel] += FAR
        for x in (q, k):
            x.copy_(_turned(x))

    return apply


CASES: dict[str, Callable[[Tensor, Tensor], None]] = {
    "normal": lambda q, k: None,
    "one channel of q and one of k far from zero": _far,
    "four channels of q far from zero": _four,
    "one channel of q and one of k four times as large": _wide,
    "rotary, a slow channel of q far from zero": _rotary(42),
    "rotary, a fast channel of q far from zero": _rotary(44),
    "scores 2.25 times as wide": _spread,
}


def inputs(case: str, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v, (tokens, CHANNELS) in fp64."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, tokens, CHANNELS, generator=generator, dtype=torch.float64)
    CASES[case](q, k)
    return q, k, v


def _turned(x: Tensor) -> Tensor:
    """Rotary embedding: 44 channels by the frame, 42 each by row and column."""
    place = FIRST + torch.arange(len(x))
    frame, row, column = place // (HEIGHT * WIDTH), place // WIDTH % HEIGHT, place % WIDTH
    angles = [
        where[:, None] * 10_000.0 ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
        for where, channels in ((frame, 44), (row, 42), (column, 42))
    ]
    angle = torch.cat(angles, 1)
    turned = torch.view_as_complex(x.unflatten(1, (-1, 2))) * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(turned).flatten(1)


def _rounded(x: Tensor, rows: int) -> Tensor:
    """To 8 bits and back; ``rows`` share a scale."""
    parts = x.split(rows)
    return torch.cat([(part / (step := part.abs().max() / 127)).round() * step for part in parts])


def _attended(
    q: Tensor,
    k: Tensor,
    rows: tuple[int, int] = (1, 1),
    mean: bool = False,
    rotated: bool = False,
    weigh: Callable[[Tensor], Tensor] = torch.ones_like,
) -> Tensor:
    """softmax(q k^T). ``weigh``: the best weights of channels -> those that are taken."""
    k = k - k.mean(0)
    q_mean = q.mean(0) if mean else torch.zeros_like(q[0])
    basis = hadamard(q.shape[1]).to(q) / q.shape[1] ** 0.5 if rotated else torch.eye(q.shape[1], dtype=q.dtype)
    weight = weigh((q.std(0) / k.std(0)).sqrt())
    scores = _rounded((q - q_mean) / weight @ basis, rows[0]) @ _rounded(k * weight @ basis, rows[1]).T
    return ((scores + k @ q_mean) * q.shape[1] ** -0.5).softmax(-1)


def fp16_sums(p: Tensor, v: Tensor) -> Tensor:
    """p v with p and v in fp16 and sums rounded as the module says, for p of at most 1."""
    unit = 2.0 ** (torch.frexp(v.abs().amax(0)).exponent - V_BITS)
    p, v = p.half().double(), (v / unit).half().double()
    out = torch.zeros(len(p), v.shape[1], dtype=torch.float64)
    for keys in range(0, len(v), KEYS):
        part = torch.zeros_like(out)
        for first in range(keys, min(keys + KEYS, len(v)), EXACT_SUM):
            some = slice(first, first + EXACT_SUM)
            part = (part + p[:, some] @ v[some]).half().double()
        out += part
    return out * unit


def measured(case: str, tokens: int) -> dict[str, float]:
    """Column -> error; and ``spread``."""
    q, k, v = inputs(case, tokens)
    scores = q @ k.T * CHANNELS**-0.5
    exact = scores.softmax(-1) @ v
    ours = _attended(q, k, mean=True, rotated=True, weigh=lambda best: best.log2().round().exp2())
    largest = ours.amax(-1, keepdim=True)
    found = {
        "scales of blocks": _attended(q, k, (128, 64)) @ v,
        "of tokens": _attended(q, k) @ v,
        "mean of q": _attended(q, k, mean=True) @ v,
        "rotation": _attended(q, k, mean=True, rotated=True) @ v,
        "weights": attention_int8_naive(*(x[None, :, None] for x in (q, k, v)))[0, :, 0],
        "not rounded": _attended(q, k, mean=True, rotated=True, weigh=lambda best: best) @ v,
        "fp16 sums": fp16_sums(ours / largest, v) * largest,
    }
    errors = {name: ((out - exact).norm() / exact.norm()).item() for name, out in found.items()}
    q, k = q - q.mean(0), k - k.mean(0)  # what the softmax cancels, and what is added exactly
    return errors | {"spread": (q @ k.T * CHANNELS**-0.5).std().item()}


def gradient_cosines(case: str, tokens: int) -> dict[str, float]:
    """Input -> cosine of its gradient."""
    q, k, v = (x[None, :, None].float() for x in inputs(case, tokens))
    d_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    exact = attention_named("sdpa")
    found = []
    for forward, backward in (exact.pair, with_int8_forward(exact, torch.device("cpu")).pair):
        found.append(backward(d_out, q, k, v, *forward(q, k, v)))
    return {name: cosine(*pair) for name, *pair in zip("qkv", *found, strict=True)}


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.cosine_similarity(a.flatten().double(), b.flatten().double(), 0).item()


KEPT, RECORDED = "memory.keep_attention=host", "memory.record_rollout=true"
INT8 = "kernels.graded_attention=int8"
RELAYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "kept": ((KEPT,), (KEPT, INT8)),
    "recorded": ((KEPT, "kernels.rollout_attention=int8"), (RECORDED, INT8)),
    "recorded, clips of an exact rollout": ((RECORDED,), (RECORDED, INT8)),
    "bf16, clips of an fp32 rollout": ((RECORDED,), (RECORDED, "dtype=bf16")),
}
"""Settings of the gradient that is taken for true, and of the other one."""


def toy_cosines(preset: str, clips: int, names: Iterable[str] = RELAYS) -> dict[str, float]:
    """Entry of ``RELAYS`` -> cosine of the LoRA's gradient."""
    gradient = cache(partial(_toy_gradient, preset, clips))
    return {name: cosine(*map(gradient, RELAYS[name])) for name in names}


def _toy_gradient(preset: str, clips: int, settings: tuple[str, ...]) -> Tensor:
    size = (f"batch={clips}", f"micro_batch={clips}", "memory.checkpoint=true", "critic.token_weights=uniform")
    config = load_config(preset, [*size, *settings])
    prompts = run_prompts(config)[:clips]
    models: Models = load_models(config, prompts)
    put_lora(models.transformer, load_denoiser(resolve(TOYWORLD, "generator")))
    lora = lora_parameters(models.transformer)
    seeds = [derive_seed(config.seed, "noise", 0, clip) for clip in range(clips)]
    cond, uncond = models.condition(prompts), models.no_condition(prompts)
    asked = [make_questions(prompt.text, "dense") for prompt in prompts]
    drf_step(models.parts(lora), step_spec(config, 0), models.noise(seeds), cond, uncond, asked)
    return torch.cat([tensor.grad.flatten() for tensor in lora if tensor.grad is not None])


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    parser = make_parser(__spec__.name, __doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--clips", type=int, default=4, help="of ToyWorld's update")
    options = parser.parse_args(arguments)
    rows = {case: measured(case, options.tokens) for case in CASES}
    table = Table("error in %", *next(iter(rows.values())))
    for case, found in rows.items():
        spread = found["spread"]
        table.add_row(case, *(f"{100 * x:.2f}" for name, x in found.items() if name != "spread"), f"{spread:.2f}")
    gradients = {case: gradient_cosines(case, options.tokens) for case in CASES}
    cosines = Table("cosine of the gradient of", *"qkv")
    for case, found in gradients.items():
        cosines.add_row(case, *(f"{found[name]:.5f}" for name in "qkv"))
    toy = {preset: toy_cosines(preset, options.clips) for preset in ("toy", "toy-fast")}
    of_lora = Table("cosine of the LoRA's gradient", *RELAYS)
    for preset, found in toy.items():
        of_lora.add_row(preset, *(f"{found[name]:.5f}" for name in RELAYS))
    console = Console(width=None if sys.stdout.isatty() else 130)
    for one in (table, cosines, of_lora):
        console.print(one)
    save(options.json, {"rows": rows, "gradients": gradients, "toy": toy, "tokens": options.tokens}, "torch")
    return 0


if __name__ == "__main__":
    sys.exit(main())
