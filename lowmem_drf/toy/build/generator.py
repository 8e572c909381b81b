"""ToyWorld's generator: ``UMT5EncoderModel`` + ``WanTransformer3DModel`` trained by flow matching on the VAE's latents.

Its training captions are as wrong as web captions: form, colour and direction are each replaced at random, in a third
of the clips at first, in a fifth in a second, shorter part (as real trainings end on better captions). So it makes
well-formed clips that follow the prompt only partly, which Diffusion-DRF is to improve. Clips of the split ``unseen``
are left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from lowmem_drf.method.schedule import draw_noise, flow_sigmas
from lowmem_drf.method.step import rollout
from lowmem_drf.models.lora.base import base_changes
from lowmem_drf.models.wan.denoiser import as_velocity, load_denoiser
from lowmem_drf.models.wan.text import load_text
from lowmem_drf.models.wan.vae.decoder import WanDecoder, load_vae
from lowmem_drf.toy.build.loop import Schedule, half_products, scaled, train
from lowmem_drf.toy.build.words import text_tokenizer
from lowmem_drf.toy.captions import WORDINGS, caption
from lowmem_drf.toy.scenes import Combo, combos_of, draw_tracks, render

TEXT_TOKENS = 16
SWAP_RATES = (0.33, 0.2)
SHIFT = 3.0  # noise levels are drawn as the sampler visits them
CLIPS = 12_960  # cached latents: 60 of each of the 216 + 27 combinations, less the remainder


class Generator(nn.Module):
    """Text encoder and transformer, trained together."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tokenizer = text_tokenizer()
        self.text_encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(self.tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
                dropout_rate=0.0, pad_token_id=0, eos_token_id=1,
            )
        )  # fmt: skip
        self.transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=32, in_channels=16, out_channels=16,
            text_dim=64, freq_dim=64, ffn_dim=512, num_layers=4, rope_max_seq_len=64,
        )  # fmt: skip

    def condition(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids (B, L) -> embeddings (B, L, 64), zero after the text's end, as ``WanPipeline`` gives them to the
        transformer."""
        return self.text_encoder(ids, attention_mask=mask).last_hidden_state * mask[..., None]


@torch.no_grad()
def cache_latents(vae: AutoencoderKLWan, seed: int, n: int) -> tuple[Tensor, Tensor]:
    """-> normalised latents (n, 16, 3, 8, 8) of clean clips and their combinations (n, 4)."""
    generator = torch.Generator().manual_seed(seed)
    known = torch.tensor(combos_of("train", "heldout"))
    combos = known[torch.arange(n) % len(known)]
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    latents = []
    for part in combos.split(64):
        frames = render(draw_tracks(part, generator))
        latents.append((vae.encode(frames.transpose(1, 2) * 2 - 1).latent_dist.mode() - mean) / std)
    return torch.cat(latents), combos


def caption_table(tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor, dict[Combo, int]]:
    """Every caption of every combination, tokenised once: ids and mask (270 * WORDINGS, L), and each combination's
    first row."""
    combos = combos_of("train", "heldout", "unseen")
    texts = [caption(c, w) for c in combos for w in range(WORDINGS)]
    out = tokenizer(texts, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt")
    return out.input_ids, out.attention_mask, {c: i * WORDINGS for i, c in enumerate(combos)}


def train_generator(
    vae: AutoencoderKLWan,
    folder: Path,
    seed: int,
    scale: float = 1.0,
    compiled: bool = True,
    parts: int = 2,
    log: Callable[[str], None] = print,
) -> Generator:
    """Flow matching (Lipman et al. 2023): x_s = (1 - s) x_0 + s e, the transformer predicts e - x_0. ``parts``: 1 stops
    before the better captions."""
    model = Generator(seed).train()
    # cached, so that a finished training does not compute it
    data = cache(partial(cache_latents, vae, seed, max(64, int(CLIPS * min(1.0, scale)))))
    ids, mask, row = caption_table(model.tokenizer)
    first = torch.zeros(3, 6, 5, 3, dtype=torch.long)
    for combo, i in row.items():
        first[combo] = i
    sizes = torch.tensor([3, 6, 5])
    velocity = torch.compile(model.transformer) if compiled else model.transformer
    warmup = min(200, scaled(300, scale))

    def loss(swap_rate: float, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        n, (latents, combos) = 64, data()
        rows = torch.randint(len(latents), (n,), generator=generator)
        told = combos[rows].clone()
        swap = torch.rand(n, 3, generator=generator) < swap_rate
        told[:, :3] = torch.where(swap, (torch.rand(n, 3, generator=generator) * sizes).long(), told[:, :3])
        text = first[tuple(told.T)] + torch.randint(WORDINGS, (n,), generator=generator)
        noise = torch.randn(n, *latents.shape[1:], generator=generator)
        u = (torch.arange(n) + torch.rand(n, generator=generator)) / n  # stratified
        sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
        s = sigma.view(-1, 1, 1, 1, 1)
        x = (1 - s) * latents[rows] + s * noise
        with half_products():
            v = velocity(x, sigma * 1000, model.condition(ids[text], mask[text]), return_dict=False)[0]
        error = (v.float() - (noise - latents[rows])).pow(2).mean((1, 2, 3, 4))
        return error.mean(), {"low": error[: n // 2].mean().item()}

    plan = (("generator", 7500, 2e-3, SWAP_RATES[0]), ("generator_better_captions", 3000, 1.2e-3, SWAP_RATES[1]))
    for name, steps, lr, swap_rate in plan[:parts]:
        schedule = Schedule(steps=scaled(steps, scale), lr=lr, warmup=warmup, floor=0.0, ema=0.998, log_every=100)
        train(name, model, partial(loss, swap_rate), schedule, folder, seed, log=log)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def draw_samples(model: Generator, vae: AutoencoderKLWan, seed: int, n: int, steps: int = 10) -> Tensor:
    """n clips of the generator for captions of the training splits: frames_BTCHW in [0, 1]."""
    generator = torch.Generator().manual_seed(seed + 2)
    combos = combos_of("train", "heldout")
    ids, mask, row = caption_table(model.tokenizer)
    chosen = torch.tensor([row[combos[i]] for i in torch.randint(len(combos), (n,), generator=generator).tolist()])
    decoder, sigmas = WanDecoder(vae), flow_sigmas(steps, SHIFT)
    clips = []
    for rows in chosen.split(64):
        cond = model.condition(ids[rows], mask[rows])
        noise = torch.randn(len(rows), 16, 3, 8, 8, generator=generator)
        latents, _ = rollout(as_velocity(model.transformer), sigmas, noise, cond, None)
        clips.append(decoder.decode(latents))
    return torch.cat(clips)


@torch.no_grad()
def folder_samples(
    folder: str, texts: Sequence[str], seed: int, steps: int = 10, shift: float = SHIFT, lora: str = ""
) -> Tensor:
    """A clip of a written generator for each text, from noise ``seed``, ``seed + 1``, …: frames_BTCHW in [0, 1].
    ``lora``: merged, as by ``model.base_lora``."""
    text, decoder = load_text(folder), WanDecoder(load_vae(folder))
    merged = partial(base_changes, [(lora, 1.0)] if lora else [], say=lambda line: None)
    velocity = as_velocity(load_denoiser(folder, changes=merged))
    clips = []
    for start in range(0, len(texts), 64):
        part = texts[start : start + 64]
        noise = draw_noise((16, 3, 8, 8), [seed + start + i for i in range(len(part))])
        latents, _ = rollout(velocity, flow_sigmas(steps, shift), noise, text.encode(part, TEXT_TOKENS), None)
        clips.append(decoder.decode(latents))
    return torch.cat(clips)


def save_generator(model: Generator, vae: AutoencoderKLWan, folder: Path) -> None:
    """Writes a folder in diffusers' layout that loads like Wan2.1's. Weights in fp16: half the bytes, and no measured
    rate changes."""
    model, vae = copy.deepcopy(model).half(), copy.deepcopy(vae).half()
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT, solver_order=1
    )
    pipeline = WanPipeline(
        tokenizer=model.tokenizer,
        text_encoder=model.text_encoder,
        vae=vae,
        scheduler=scheduler,
        transformer=model.transformer,
    )
    pipeline.save_pretrained(folder)
