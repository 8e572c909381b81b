"""Configuration -> the prompts of a run, the plan of an update, and loaded models put together as ``types.Parts``."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from lowmem_drf.assembly.kernel_choice import Chosen, choose
from lowmem_drf.assembly.text_cache import DTYPES
from lowmem_drf.errors import BadInputError
from lowmem_drf.memory.host import HostStore
from lowmem_drf.memory.recorded_rollout import Recorder
from lowmem_drf.memory.residency import NEEDS, Residency, bring
from lowmem_drf.memory.streaming import Streamed
from lowmem_drf.method.frames import frames_at_rate, kept_fps, kept_frames
from lowmem_drf.method.reward import RewardSpec
from lowmem_drf.method.schedule import choose_graded, draw_noise, flow_sigmas
from lowmem_drf.method.step import StepSpec
from lowmem_drf.models.weights.sources import TOYWORLD
from lowmem_drf.ops import ranged_attention
from lowmem_drf.prompts import as_prompts, load_prompts
from lowmem_drf.schema import Config, Parkable
from lowmem_drf.types import Parts, Prompt

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem_drf.models.qwen_vl.critic import QwenCritic
    from lowmem_drf.models.wan.decoder import WanDecoder
    from lowmem_drf.models.wan.experts import OtherExpert
    from lowmem_drf.types import Critic, Velocity


def derive_seed(*words: object) -> int:
    """A 63-bit seed from a run's seed and what it is for: noise needs no state that a checkpoint would have to keep."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, words)).encode()).digest()[:8]) >> 1


def resolve_device(name: str) -> torch.device:
    """``auto``, ``cpu`` or ``cuda`` -> a device. Raises BadInputError for a card that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInputError(
            'device = "cuda", but torch sees no CUDA card. Use -s device=cpu, or install a CUDA build of torch.'
        )
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
    return (
        frames
        if isinstance(frames, int)
        else frames_at_rate(video.frames, video.fps, float(frames.removeprefix("fps:")))
    )


def critic_rate(config: Config) -> float:
    """Frames a second of what the critic sees."""
    return kept_fps(config.video.frames, config.video.fps, critic_frames(config), config.critic.frame_sampling)


def step_plan(config: Config, step: int, scales: Mapping[str, float] | None = None) -> StepSpec:
    """The plan of update ``step``: its random choices depend on the run's seed and on ``step`` alone. ``scales``:
    ``RewardSpec.scales``."""
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "plan", step))
    sampler, critic = config.sampler, config.critic
    return StepSpec(
        sigmas=flow_sigmas(sampler.steps, sampler.shift),
        graded=choose_graded(sampler.graded, sampler.steps, sampler.graded_steps, generator),
        kept=kept_frames(config.video.frames, critic_frames(config), critic.frame_sampling, generator),
        follow_motion=critic.frame_sampling == "motion",
        chain=sampler.chain,
        guidance=sampler.guidance,
        guidance_grad=sampler.guidance_grad,
        vae_window=config.vae_window,
        vae_cache_every=config.memory.vae_cache_every,
        lv_samples=sampler.lv_samples,
        reward=replace(reward_spec(config), scales=scales or {}),
    )


class StageMeter(Protocol):
    """Measures the stages of an update: ``memory.meter.Meter``, or the plan's."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Entered around each stage."""
        ...

    def take(self) -> tuple[dict[str, float], dict[str, float]]:
        """(seconds by stage, peak GiB by stage) since the last time."""
        ...


@dataclass(frozen=True)
class Models:
    """What is loaded: the generator with its LoRA, the critic if it is needed, and the embeddings of every text."""

    transformer: Any
    """The one that is trained."""
    velocity: Velocity
    decoder: WanDecoder
    critic: QwenCritic | None
    texts: Mapping[str, Tensor]
    """Text -> (l, D) on the host, without the zeros after its end, the negative prompt's among them: padded, a thousand
    prompts of Wan's would take 4 GiB."""
    text_tokens: int
    """L: what they are padded to."""
    negative_prompt: str
    latent_shape: tuple[int, int, int, int]
    device: torch.device
    meter: StageMeter = field(compare=False)
    residency: Residency = field(compare=False)
    recorder: Recorder | None = field(compare=False, default=None)
    kernels: str = ""
    """The form of the operations, in words."""
    ask: Critic | None = field(compare=False, default=None)
    """How the critic is to be called, where that is not the critic itself."""
    expert: Any = None
    """Of a generator of two transformers, the one that is not trained."""

    @property
    def asked_critic(self) -> QwenCritic:
        """The critic, which must have been loaded. Outside the stages of a step ``awake`` comes first."""
        if self.critic is None:
            raise ValueError("the models were loaded without a critic")
        return self.critic

    def awake(self, *names: Parkable) -> None:
        """Outside the stages of a step: from here on these models are on the card, and no other one that may be
        parked."""
        self.residency.need(*names)

    def awake_for(self, stage: str) -> None:
        """Outside the stages of a step: as at the beginning of this one."""
        self.residency.need_for(stage)

    def parts(self, lora: Sequence[Tensor]) -> Parts:
        """For training."""
        parts = Parts(self.velocity, self.decoder, self.ask or self.asked_critic, lora, self.residency.stage)
        return parts if self.recorder is None else replace(parts, recorder=self.recorder)

    def condition(self, texts: Sequence[str]) -> Tensor:
        """(B, L, D) on the device."""
        rows = [self.texts[text] for text in texts]
        return torch.stack([torch.nn.functional.pad(row, (0, 0, 0, self.text_tokens - len(row))) for row in rows]).to(
            self.device
        )

    def no_condition(self, batch: int) -> Tensor:
        """The negative prompt, (B, L, D)."""
        return self.condition([self.negative_prompt] * batch)

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """(B, C, F, h, w) fp32 on the device, drawn on the CPU."""
        return draw_noise(self.latent_shape, seeds).to(self.device)


def assemble(
    config: Config,
    transformer: Any,
    vae: Any,
    critic: QwenCritic | None,
    texts: Mapping[str, Tensor],
    device: torch.device,
    meter: StageMeter,
    chosen: Chosen | None = None,
    other: OtherExpert | None = None,
    store: HostStore | None = None,
) -> Models:
    """Loaded models with the configuration's memory settings on them, the VAE without its encoder. ``texts``: see
    ``Models``.

    ``chosen``: the form of the operations; ``None``: it is chosen here, for ``device``. ``other``: the transformer that
    is not trained, where there are two; it is parked and streamed where ``transformer`` is, and in a rollout one of
    them is awake at a time. ``store``: where tensors wait on the host; a plan's only counts.

    Raises BadInputError: the video's size does not fit the models, or a kernel that is asked for cannot run.
    """
    from lowmem_drf.models.wan.decoder import WanDecoder, drop_encoder
    from lowmem_drf.models.wan.denoiser import as_velocity, set_activations
    from lowmem_drf.models.wan.experts import two_experts

    drop_encoder(vae)
    memory, store = config.memory, store or HostStore(device)
    streamed: dict[str, Streamed] = {}
    generators = {"transformer": transformer} | ({} if other is None else {"expert": other.transformer})
    if "transformer" in memory.stream:
        streamed |= {name: Streamed(list(model.blocks), device, store) for name, model in generators.items()}
    if critic is not None and "critic" in memory.stream:
        streamed["critic"] = critic.stream(device, store)
    shape = latent_shape(config, transformer, vae)
    chosen = chosen or choose(config, device, attention_shape(config, transformer, shape), DTYPES[config.dtype])
    recorder = Recorder(store, memory.keep_attention != "none") if memory.record_rollout else None
    set_activations(
        transformer, memory.checkpoint, memory.token_slices, store,
        chosen.rows, chosen.attention, memory.keep_attention, recorder, chosen.rollout_attention,
        streamed.get("transformer"), hooked=config.engine == "zero3",
    )  # fmt: skip
    if other is not None:  # it has no gradient, and nothing to keep
        set_activations(
            other.transformer, checkpoint=False, slices=memory.token_slices, rows=chosen.rows, attention=chosen.attention,
            rollout_attention=chosen.rollout_attention, streamed=streamed.get("expert"),
        )  # fmt: skip
    if critic is not None:
        critic.set_checkpointing(bool(memory.checkpoint))
        critic.set_attention(*(ranged_attention() if chosen.attention.name == "triton" else (None,)))
    decoder = WanDecoder(
        vae,
        grad_dtype=DTYPES[memory.vae_grad_dtype],
        strips=memory.vae_strips,
        caches=memory.vae_caches,
        store=store,
        norm_silu=chosen.rows.norm_silu,
    )
    modules = generators | {"vae": vae} | ({} if critic is None else {"critic": critic.model})
    parked = modules.keys() & {*memory.park, *(["expert"] if "transformer" in memory.park else [])}
    # in a rollout the two transformers are woken as their turn comes
    residency = Residency(
        modules, parked, device, store, meter.stage, streamed, NEEDS if other is None else {**NEEDS, "rollout": ()}
    )
    velocity = as_velocity(transformer, recorder)
    if other is not None:
        velocity = two_experts(
            velocity, as_velocity(other.transformer), config.model.expert, other.boundary, residency.need
        )
    for name in streamed.keys() - parked:
        bring(modules[name], device)  # what is not streamed: it was loaded in host memory
    return Models(
        transformer=transformer,
        velocity=velocity,
        decoder=decoder,
        critic=critic,
        texts=texts,
        text_tokens=config.model.text_tokens,
        negative_prompt=config.sampler.negative_prompt,
        latent_shape=shape,
        device=device,
        meter=meter,
        residency=residency,
        recorder=recorder,
        kernels=str(chosen),
        expert=other.transformer if other else None,
    )


def attention_shape(config: Config, transformer: Any, latent: Sequence[int]) -> tuple[int, int, int, int]:
    """(B, L, H, d) of the transformer's self-attention over latents of this shape (C, F, h, w)."""
    tokens = math.prod(side // patch for side, patch in zip(latent[1:], transformer.config.patch_size, strict=True))
    return config.micro_batch, tokens, transformer.config.num_attention_heads, transformer.config.attention_head_dim


def latent_shape(config: Config, transformer: Any, vae: Any) -> tuple[int, int, int, int]:
    """(C, F, h, w). Raises BadInputError: the video's size does not fit the models."""
    video, factor = config.video, vae.config.scale_factor_spatial
    _, patch_height, patch_width = transformer.config.patch_size
    for name, value, unit in (
        ("width", video.width, factor * patch_width),
        ("height", video.height, factor * patch_height),
    ):
        if value % unit:
            raise BadInputError(
                f"video.{name} = {value} is not a multiple of {unit}, the patch grid of {config.model.id}. "
                f"Nearest: -s video.{name}={max(unit, round(value / unit) * unit)}"
            )
    frames = (video.frames - 1) // vae.config.scale_factor_temporal + 1
    return transformer.config.in_channels, frames, video.height // factor, video.width // factor


def toyworld_models(config: Config) -> bool:
    """The oracle can judge: ToyWorld's generator at the size its oracle measures."""
    return config.model.id == TOYWORLD and config.video.width == config.video.height == 32
