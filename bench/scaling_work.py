"""The work of one clip of an update, as ``bench.scaling`` splits it: seconds by stage from the plan, sizes from the
models' configurations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from bench.plans.streaming import LARGE, STREAMED
from lowmem_drf.assembly.assemble import attention_shape, critic_frames, latent_shape
from lowmem_drf.assembly.text_cache import DTYPES
from lowmem_drf.config import load_config
from lowmem_drf.models.generators import KNOWN_GENERATORS
from lowmem_drf.models.wan.decoder import WanDecoder
from lowmem_drf.models.wan.random_generator import empty_transformer, empty_vae
from lowmem_drf.planner.cards import card_named
from lowmem_drf.planner.fakes import Fakes
from lowmem_drf.planner.plan import make_plan, new_fakes

WAN_14B = "model.id=Wan-AI/Wan2.1-T2V-14B-Diffusers"
CASES = {
    "1.3B, RTX 4090": ("rtx4090", (), "RTX 4090", "PCIe"),
    "14B, 8 bit, 4 steps, RTX 4090": ("rtx4090-wan14b", (), "RTX 4090", "PCIe"),
    "14B, 16 bit, streamed, RTX 4090": ("rtx4090", (*LARGE, *STREAMED), "RTX 4090", "PCIe"),
    "14B, 16 bit, H200": ("rtx4090", (WAN_14B, "memory.keep_attention=card"), "H200", "NVLink"),
}
"""Name -> preset, what differs from it, the card, and the name of the fabric between cards. All but the second: 20
steps with guidance, K = 3."""

FULL_CHUNK = 2
"""The first chunk whose caches are those of all later ones: the VAE's first latent frame makes one frame of pixels, and
leaves less behind."""


@dataclass(frozen=True)
class Work:
    """One clip of an update, on one card; ``update_s`` and ``lora_bytes`` are of the update."""

    name: str
    fabric: str
    stages_s: Mapping[str, float]
    update_s: float
    steps: int
    branches: int
    """Passes of the transformer in a step of the rollout: 2 with guidance."""
    graded_steps: int
    """K."""
    graded_per_step: int
    """Passes with gradient in a graded step: 2 with ``guidance_grad = "both"``."""
    keeps_attention: bool
    """``memory.keep_attention``: a block's recompute does not repeat its attentions."""
    packed: bool
    """``model.quant``."""
    tokens: int
    width: int
    """Numbers of a token."""
    heads: int
    layers: int
    lora_bytes: int
    weights_bytes: int
    """Of the whole transformer, in ``dtype``."""
    latent_bytes: int
    frame_bytes: int
    """Of the frames before the critic."""
    chunks: int
    cache_bytes: int
    """Handed on between two chunks of the VAE, in ``vae_dtype``."""
    cache_gradient_bytes: int
    """The same in ``vae_grad_dtype``."""

    @property
    def clip_s(self) -> float:
        return sum(self.stages_s.values())

    @property
    def rollout_s(self) -> float:
        return self.stages_s["rollout"]

    @property
    def denoise_s(self) -> float:
        return self.stages_s["denoise_backward"]

    @property
    def transformer_s(self) -> float:
        return self.rollout_s + self.denoise_s

    @property
    def vae_s(self) -> float:
        return self.stages_s["decode"] + self.stages_s["vae_backward"]

    @property
    def critic_s(self) -> float:
        return self.stages_s["critic"]

    @property
    def forwards(self) -> int:
        """Passes of the rollout."""
        return self.steps * self.branches

    @property
    def boundary_bytes(self) -> int:
        """What enters a block."""
        return self.tokens * self.width * 2

    @property
    def graded_passes(self) -> int:
        return self.graded_steps * self.graded_per_step


def lora_numbers(transformer: Mapping[str, Any], rank: int, targets: Sequence[str]) -> int:
    """Trainable numbers of ``models.lora.adapter.add_lora`` on this ``config.json``: rank x (in + out) for each linear
    layer of a block that ``targets`` name.

    Raises ValueError: a target that names none of them.
    """
    width, ffn = transformer["num_attention_heads"] * transformer["attention_head_dim"], transformer["ffn_dim"]
    sides = {
        f"{attention}.{linear}": 2 * width
        for attention in ("attn1", "attn2")
        for linear in ("to_q", "to_k", "to_v", "to_out.0")
    }
    sides |= {"ffn.net.0.proj": width + ffn, "ffn.net.2": ffn + width}
    chosen = {target: {name for name in sides if name == target or name.endswith(f".{target}")} for target in targets}
    if unknown := [target for target, names in chosen.items() if not names]:
        raise ValueError(f"{unknown} name no linear layer of a block; it has {', '.join(sides)}")
    return transformer["num_layers"] * rank * sum(sides[name] for name in set().union(*chosen.values()))


def cache_numbers(vae: Any, latent: Sequence[int]) -> int:
    """Numbers that a chunk of this VAE (on any device; ``meta`` does) hands on to the next, for a clip with latents of
    the shape (C, F, h, w)."""
    decoder, (channels, _, height, width) = WanDecoder(vae), latent
    caches = decoder.start(1)
    with torch.no_grad():
        for _ in range(FULL_CHUNK):
            caches = decoder.chunk(torch.zeros(1, channels, 1, height, width, device=vae.device), caches)[1]
    return sum(cache.numel() for cache in caches if isinstance(cache, torch.Tensor))


@cache
def _fakes() -> Fakes:
    """Shared by all plans."""
    return new_fakes()


def work(name: str) -> Work:
    """Of one of ``CASES``: plans it (half a minute)."""
    preset, overrides, card, fabric = CASES[name]
    config = load_config(preset, overrides)
    known, sampler, memory = KNOWN_GENERATORS[config.model.id], config.sampler, config.memory
    transformer, vae = known.config.transformer, empty_vae(known.config.vae)
    plan = make_plan(config, card_named(card), fakes=_fakes())
    laid_out = empty_transformer(transformer, layers=1)
    latent = latent_shape(config, laid_out, vae)
    _, tokens, heads, per_head = attention_shape(config, laid_out, latent)
    values, gradients = DTYPES[memory.vae_dtype].itemsize, DTYPES[memory.vae_grad_dtype].itemsize
    caches, branches = cache_numbers(vae, latent), 1 if sampler.guidance == 1 else 2
    return Work(
        name=name,
        fabric=fabric,
        stages_s={stage: row.s / config.batch for stage, row in plan.stages.items() if stage not in ("text", "update")},
        update_s=plan.stages["update"].s,
        steps=sampler.steps,
        branches=branches,
        graded_steps=sampler.graded_steps,
        graded_per_step=branches if sampler.guidance_grad == "both" else 1,
        keeps_attention=memory.keep_attention != "none",
        packed=config.model.quant != "none",
        tokens=tokens,
        width=heads * per_head,
        heads=heads,
        layers=transformer["num_layers"],
        lora_bytes=4 * lora_numbers(transformer, config.lora.rank, config.lora.targets),
        weights_bytes=known.parameters["transformer"] * DTYPES[config.dtype].itemsize,
        latent_bytes=4 * latent[0] * latent[1] * latent[2] * latent[3],
        frame_bytes=critic_frames(config) * 3 * config.video.height * config.video.width * values,
        chunks=latent[1],
        cache_bytes=caches * values,
        cache_gradient_bytes=caches * gradients,
    )
