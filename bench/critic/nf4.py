"""Quality of a 4-bit critic's gradient.

    python -m bench.critic.nf4 --json bench/results/critic_nf4.json
    python -m bench.critic.nf4 --critic Qwen/Qwen2.5-VL-7B-Instruct --device cuda
    python -m bench.critic.nf4 --random Qwen/Qwen2.5-VL-7B-Instruct --layers 2

Compares the same critic with NF4 weights and with its original ones, for each aspect: the cosine between their d reward
/ d frames, clip by clip, and the rank correlation (Spearman) of their rewards. If the reference is fp32, bfloat16
throughout is compared too, which shows the share of rounding. The clips are ToyWorld's: half are drawn, most of them
with a defect, and half come from the base generator. The answers of a critic with random weights mean nothing: its
figures only show how the weights' rounding passes through a network of that width.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.script import make_parser, reports_errors, save
from lowmem_drf.method.reward import RewardSpec, question_reward
from lowmem_drf.method.schedule import draw_noise, flow_sigmas
from lowmem_drf.method.step import rollout
from lowmem_drf.models.qwen_vl.critic import VLMCritic, load_critic
from lowmem_drf.models.qwen_vl.random_critic import random_critic
from lowmem_drf.models.wan.denoiser import as_velocity, load_denoiser
from lowmem_drf.models.wan.text import load_text
from lowmem_drf.models.wan.vae.decoder import WanDecoder, load_vae
from lowmem_drf.models.weights.sources import TOYWORLD, resolve
from lowmem_drf.questions import toyworld
from lowmem_drf.toy.build.generator import SHIFT, TEXT_TOKENS
from lowmem_drf.toy.build.tower import draw_labelled
from lowmem_drf.toy.captions import caption, heldout_prompts
from lowmem_drf.toy.scenes import FPS, Combo
from lowmem_drf.types import Question

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BATCH = 8


@torch.no_grad()
def toy_clips(count: int, seed: int = 0) -> tuple[Tensor, list[str]]:
    """``count`` clips (B, T, C, H, W) in [0, 1] and their captions: the first half drawn, the second half generated for
    held-out prompts."""
    drawn = count // 2
    frames, _, combos, _ = draw_labelled(drawn, torch.Generator().manual_seed(seed), clean_share=0.4)
    texts = [caption(Combo(*combo)) for combo in combos.tolist()]
    prompts = heldout_prompts(count - drawn, seed=seed)
    folder = resolve(TOYWORLD, "generator")
    text, decoder, velocity = load_text(folder), WanDecoder(load_vae(folder)), as_velocity(load_denoiser(folder))
    noise = draw_noise((16, 3, 8, 8), range(len(prompts)))
    latents, _ = rollout(velocity, flow_sigmas(10, SHIFT), noise, text.encode(prompts, TEXT_TOKENS), None)
    return torch.cat([frames, decoder.decode(latents)]), [*texts, *prompts]


def kinds_of_reward(questions: Sequence[Question]) -> dict[str, list[int]]:
    """Name -> indices of the questions to average: the yes/no ones of each aspect, all yes/no ones, all dense ones."""
    yesno = [i for i, question in enumerate(questions) if question.kind == "yesno"]
    chosen = {aspect: [i for i in yesno if questions[i].aspect == aspect] for aspect in ("TA", "Phy", "VQ")}
    return {**chosen, "yes/no": yesno, "dense": [i for i, question in enumerate(questions) if question.kind == "dense"]}


def rewards_and_gradients(
    critic: VLMCritic, frames_BTCHW: Tensor, questions: Sequence[Sequence[Question]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Rewards (B,) and their gradients (B, T, C, H, W) by kind, fp32 on the CPU. Clips are independent, so the gradient
    of the sum holds the gradient of each clip."""
    device = critic.model.device
    rewards: dict[str, list[Tensor]] = {}
    gradients: dict[str, list[Tensor]] = {}
    for start in range(0, len(frames_BTCHW), BATCH):
        frames = frames_BTCHW[start : start + BATCH].to(device, torch.float32).requires_grad_()
        asked = questions[start : start + BATCH]
        single = [
            torch.stack([question_reward(a, q, RewardSpec()) for a, q in zip(answers, clip, strict=True)])
            for answers, clip in zip(critic(frames, asked), asked, strict=True)
        ]
        kinds = [kinds_of_reward(clip) for clip in asked]
        for name in kinds[0]:
            reward_B = torch.stack([row[kind[name]].mean() for row, kind in zip(single, kinds, strict=True)])
            gradient = torch.autograd.grad(reward_B.sum(), frames, retain_graph=True)[0]
            rewards.setdefault(name, []).append(reward_B.detach().float().cpu())
            gradients.setdefault(name, []).append(gradient.float().cpu())
    made = [{name: torch.cat(parts) for name, parts in kinds.items()} for kinds in (rewards, gradients)]
    return made[0], made[1]


def spearman(a_B: Tensor, b_B: Tensor) -> float:
    """Rank correlation; ties get their mean rank."""
    ranks = [((x[:, None] > x).sum(1) + (x[:, None] >= x).sum(1)).double() for x in (a_B, b_B)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def compare(
    one: tuple[dict[str, Tensor], dict[str, Tensor]], other: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> dict[str, dict[str, float]]:
    """Cosines of the clips' gradients (mean, median, min), mean ratio of their norms, and Spearman of the rewards, by
    kind."""
    made = {}
    for name in one[0]:
        mine, theirs = (gradients[name].flatten(1).double() for _, gradients in (one, other))
        cosine = torch.nn.functional.cosine_similarity(mine, theirs, dim=1)
        made[name] = {
            "cosine_mean": cosine.mean().item(),
            "cosine_median": cosine.median().item(),
            "cosine_min": cosine.min().item(),
            "norm_ratio": (theirs.norm(dim=1) / mine.norm(dim=1)).mean().item(),
            "spearman": spearman(one[0][name], other[0][name]),
        }
    return made


def table(title: str, rows: dict[str, dict[str, float]]) -> Table:
    columns = ("cosine_mean", "cosine_median", "cosine_min", "norm_ratio", "spearman")
    made = Table("reward", "cosine: mean", "median", "min", "norm", "Spearman", title=title, title_justify="left")
    for name, row in rows.items():
        made.add_row(name, *(f"{row[column]:.4f}" for column in columns))
    return made


def critics(options: argparse.Namespace) -> dict[str, Callable[[], VLMCritic]]:
    """Loaders of the ``reference`` and of the critics to compare with it, so that only one is loaded at a time."""
    reference = DTYPES[options.reference or ("bf16" if options.device.startswith("cuda") else "fp32")]

    def loaded(dtype: torch.dtype, quant: Any) -> VLMCritic:
        if options.random:
            critic = random_critic(options.random, dtype, options.device, FPS, quant, layers=options.layers)
        else:
            fps = None if options.critic == TOYWORLD else FPS
            critic = load_critic(resolve(options.critic, "critic"), dtype, options.device, fps, quant)
        critic.set_checkpointing(options.device.startswith("cuda"))
        return critic

    made = {"reference": lambda: loaded(reference, "none"), "nf4": lambda: loaded(reference, "nf4")}
    if reference is torch.float32:
        made["bf16"] = lambda: loaded(torch.bfloat16, "none")
    return made


@reports_errors
def main(arguments: list[str] | None = None) -> int:
    """Prints a table per critic that is compared with the reference; returns the exit code."""
    parser = make_parser(__spec__.name, __doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--critic", default=TOYWORLD, help="toyworld, a folder or a hub id")
    which.add_argument("--random", metavar="NAME", help="random weights: a known hub id, or a folder")
    parser.add_argument("--layers", type=int, help="with --random: number of layers, at full width")
    parser.add_argument("--clips", type=int, default=64)
    text = "default: bf16 on CUDA, else fp32; also the compute dtype of NF4"
    parser.add_argument("--reference", choices=tuple(DTYPES), help=text)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    if options.layers is not None and not options.random:
        parser.error("--layers needs --random")
    console = Console(soft_wrap=True)
    frames, texts = toy_clips(options.clips)
    values = [toyworld.attributes(text) or {} for text in texts]
    questions = [[*toyworld.yesno(value), *toyworld.dense(value)] for value in values]
    results = {name: rewards_and_gradients(load(), frames, questions) for name, load in critics(options).items()}
    reference = results.pop("reference")
    rows = {name: compare(reference, result) for name, result in results.items()}
    for name, row in rows.items():
        console.print(table(f"{name} against the reference, {len(frames)} clips", row))
    result = {
        "critic": options.random or options.critic,
        "random": bool(options.random),
        **{name: getattr(options, name) for name in ("layers", "reference", "device")},
        "clips": len(frames),
        **rows,
    }
    save(options.json, result, "torch", "transformers", "bitsandbytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
