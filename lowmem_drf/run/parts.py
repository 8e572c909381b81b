"""Configuration -> the models of a step (``types.Parts``), the prompts with their text embeddings, and their questions."""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowmem_drf.errors import BadInputError
from lowmem_drf.memory.meter import Meter
from lowmem_drf.method.frames import frames_at_rate, kept_fps, kept_frames
from lowmem_drf.method.reward import RewardSpec
from lowmem_drf.method.schedule import choose_graded, draw_noise, flow_sigmas
from lowmem_drf.method.step import StepPlan
from lowmem_drf.models.sources import TOYWORLD, resolve
from lowmem_drf.prompts import as_prompts, load_prompts
from lowmem_drf.schema import Config
from lowmem_drf.types import Parts, Prompt

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem_drf.models.critic import QwenCritic
    from lowmem_drf.models.decoder import WanDecoder
    from lowmem_drf.types import Velocity

TEXT_BATCH = 32
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def derive_seed(*words: object) -> int:
    """A 63-bit seed from a run's seed and what it is for: noise needs no state that a checkpoint would have to keep."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, words)).encode()).digest()[:8]) >> 1


def resolve_device(name: str) -> torch.device:
    """``auto``, ``cpu`` or ``cuda`` -> a device. Raises BadInputError for a card that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInputError('device = "cuda", but torch sees no CUDA card. Use -s device=cpu, or install a CUDA build of torch.')
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def run_prompts(config: Config) -> tuple[Prompt, ...]:
    """The training prompts of a configuration. Raises BadInputError where it names none."""
    if config.prompts == TOYWORLD:
        from lowmem_drf.toy.captions import train_prompts

        return as_prompts(train_prompts())
    if not config.prompts:
        raise BadInputError("no prompts: give a file with --prompts (txt with one prompt a line, or jsonl).")
    return load_prompts(config.prompts)


def reward_spec(config: Config) -> RewardSpec:
    hinge = None if config.critic.hinge == "off" else config.critic.hinge
    return RewardSpec(config.critic.reward, hinge, config.critic.weights.model_dump())


def critic_frames(config: Config) -> int:
    """How many frames of a clip the critic sees."""
    frames, video = config.critic.frames, config.video
    return frames if isinstance(frames, int) else frames_at_rate(video.frames, video.fps, float(frames.removeprefix("fps:")))


def critic_rate(config: Config) -> float:
    """Frames a second of what the critic sees."""
    return kept_fps(config.video.frames, config.video.fps, critic_frames(config), config.critic.frame_sampling)


def step_plan(config: Config, step: int, scales: Mapping[str, float] | None = None) -> StepPlan:
    """The plan of update ``step``: its random choices depend on the run's seed and on ``step`` alone. ``scales``: ``RewardSpec.scales``."""
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "plan", step))
    sampler, critic = config.sampler, config.critic
    return StepPlan(
        sigmas=flow_sigmas(sampler.steps, sampler.shift),
        graded=choose_graded(sampler.graded, sampler.steps, sampler.graded_steps, generator),
        kept=kept_frames(config.video.frames, critic_frames(config), critic.frame_sampling, generator),
        chain=sampler.chain,
        guidance=sampler.guidance,
        guidance_grad=sampler.guidance_grad,
        vae_window=config.vae_window,
        lv_samples=sampler.lv_samples,
        reward=replace(reward_spec(config), scales=scales or {}),
    )


@dataclass(frozen=True)
class Models:
    """What is loaded: the generator with its LoRA, the critic if it is needed, and the embeddings of every text."""

    transformer: Any
    velocity: Velocity
    decoder: WanDecoder
    critic: QwenCritic | None
    texts: Mapping[str, Tensor]
    """Text -> (l, D) on the host, without the zeros after its end, the negative prompt's among them: padded, a thousand prompts of Wan's
    would take 4 GiB."""
    text_tokens: int
    """L: what they are padded to."""
    negative_prompt: str
    latent_shape: tuple[int, int, int, int]
    device: torch.device
    meter: Meter = field(compare=False)

    @property
    def asked_critic(self) -> QwenCritic:
        """The critic, which must have been loaded."""
        if self.critic is None:
            raise ValueError("the models were loaded without a critic")
        return self.critic

    def parts(self, lora: Sequence[Tensor]) -> Parts:
        """For training."""
        return Parts(self.velocity, self.decoder, self.asked_critic, lora, self.meter.stage)

    def condition(self, texts: Sequence[str]) -> Tensor:
        """(B, L, D) on the device."""
        rows = [self.texts[text] for text in texts]
        return torch.stack([torch.nn.functional.pad(row, (0, 0, 0, self.text_tokens - len(row))) for row in rows]).to(self.device)

    def no_condition(self, batch: int) -> Tensor:
        """The negative prompt, (B, L, D)."""
        return self.condition([self.negative_prompt] * batch)

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """(B, C, F, h, w) fp32 on the device, drawn on the CPU."""
        return draw_noise(self.latent_shape, seeds).to(self.device)


def load_models(config: Config, texts: Sequence[str], with_critic: bool = True) -> Models:
    """Loads every model the configuration names; the text encoder is freed once all ``texts`` are encoded. The LoRA is the caller's.

    Raises BadInputError: a model cannot be found, or the video's size does not fit it.
    """
    _hide_loading_bars(config)
    from lowmem_drf.models.decoder import WanDecoder, load_vae
    from lowmem_drf.models.denoiser import as_velocity, load_denoiser, set_checkpointing

    device, dtype = resolve_device(config.device), DTYPES[config.dtype]
    generator = resolve(config.model.id, "generator")
    encoded = _encode(generator, config, [*texts, config.sampler.negative_prompt], device)
    transformer = load_denoiser(generator, dtype, device)
    set_checkpointing(transformer, config.memory.checkpoint)
    decoder = WanDecoder(load_vae(generator, torch.float32, device))
    return Models(
        transformer=transformer,
        velocity=as_velocity(transformer),
        decoder=decoder,
        critic=load_run_critic(config) if with_critic else None,
        texts=encoded,
        text_tokens=config.model.text_tokens,
        negative_prompt=config.sampler.negative_prompt,
        latent_shape=_latent_shape(config, transformer, decoder),
        device=device,
        meter=Meter(device),
    )


def _hide_loading_bars(config: Config) -> None:
    """Where nothing is downloaded. To be called before the libraries are imported."""
    if Path(resolve(config.model.id, "generator")).is_dir() and Path(resolve(config.critic.id, "critic")).is_dir():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _encode(generator: str, config: Config, texts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
    from lowmem_drf.models.text import load_text

    encoder = load_text(generator, DTYPES[config.dtype], device)
    unique = list(dict.fromkeys(texts))
    chunks = [unique[i : i + TEXT_BATCH] for i in range(0, len(unique), TEXT_BATCH)]
    encoded = {text: _without_padding(row.cpu()) for chunk in chunks for text, row in zip(chunk, encoder.encode(chunk, config.model.text_tokens), strict=True)}
    del encoder
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return encoded


def _without_padding(row_LD: Tensor) -> Tensor:
    """Without the rows of zeros at the end; a copy, so that the batch it came from is freed."""
    used = row_LD.any(dim=1).nonzero()
    return row_LD[: int(used.max()) + 1 if len(used) else 0].clone()


def load_run_critic(config: Config) -> QwenCritic:
    """The critic alone, as a run has it."""
    _hide_loading_bars(config)
    from lowmem_drf.models.critic import load_critic

    # ToyWorld's critic was trained at the one frame rate that its folder names; a real one is told how fast its frames pass
    fps = None if config.critic.id == TOYWORLD else critic_rate(config)
    critic = load_critic(resolve(config.critic.id, "critic"), DTYPES[config.dtype], resolve_device(config.device), fps, config.critic.quant)
    critic.set_checkpointing(config.memory.checkpoint)
    return critic


def _latent_shape(config: Config, transformer: Any, decoder: WanDecoder) -> tuple[int, int, int, int]:
    video, factor = config.video, decoder.spatial_factor
    _, patch_height, patch_width = transformer.config.patch_size
    for name, value, unit in (("width", video.width, factor * patch_width), ("height", video.height, factor * patch_height)):
        if value % unit:
            raise BadInputError(
                f"video.{name} = {value} is not a multiple of {unit}, the patch grid of {config.model.id}. "
                f"Nearest: -s video.{name}={max(unit, round(value / unit) * unit)}"
            )
    frames = (video.frames - 1) // decoder.temporal_factor + 1
    return transformer.config.in_channels, frames, video.height // factor, video.width // factor


def toyworld_models(config: Config) -> bool:
    """The oracle can judge: ToyWorld's generator at the size its oracle measures."""
    return config.model.id == TOYWORLD and config.video.width == config.video.height == 32
