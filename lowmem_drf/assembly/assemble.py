"""Configuration -> the prompts of a run, the ``StepSpec`` of an update, and loaded models as ``types.Parts``."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch

from lowmem_drf.assembly.conditions import DTYPES
from lowmem_drf.assembly.kernel_choice import Chosen, choose
from lowmem_drf.assembly.sizes import latent_shape
from lowmem_drf.assembly.trials import Work
from lowmem_drf.distributed.ranks import ALONE, Ranks
from lowmem_drf.errors import BadInputError
from lowmem_drf.memory.host import HostStore
from lowmem_drf.memory.recorded_rollout import Recorder
from lowmem_drf.memory.residency import NEEDS, Residency, bring
from lowmem_drf.memory.streaming import Streamed
from lowmem_drf.method.frames import frames_at_rate, kept_fps, kept_frames
from lowmem_drf.method.reward import RewardSpec
from lowmem_drf.method.schedule import TRAIN_TIMESTEPS, choose_graded, draw_noise, flow_sigmas
from lowmem_drf.method.step import StepSpec
from lowmem_drf.models.blocks import Activations
from lowmem_drf.models.family import ImageCondition
from lowmem_drf.models.generators import blocks_of, family_of
from lowmem_drf.models.lora.adapter import lora_scale
from lowmem_drf.models.rewards.combined import Combined
from lowmem_drf.models.weights.sources import TOYWORLD
from lowmem_drf.ops import ranged_attention
from lowmem_drf.prompts import as_prompts, load_prompts
from lowmem_drf.schema import Config
from lowmem_drf.schema.running import Parkable
from lowmem_drf.types import Parts, Prompt

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from lowmem_drf.models.experts import OtherExpert
    from lowmem_drf.models.family import ClipDecoder, EncodedImage
    from lowmem_drf.models.qwen_vl.critic import VLMCritic
    from lowmem_drf.models.tiny.decoder import TinyBackward, TinyDecoder
    from lowmem_drf.models.tiny.decoder_check import Uses
    from lowmem_drf.models.tiny.network import TinyNetwork
    from lowmem_drf.types import Critic, Velocity

SMALL = 10_000_000
"""Parameters of a transformer whose products are so short that a second thread of the CPU wins little.
OpenMP's threads spin while they wait: beside another program two of them take many times as long as one."""
THREADS = "OMP_NUM_THREADS"
"""What a user sets to choose the number of threads."""


def derive_seed(*words: object) -> int:
    """A 63-bit seed from a run's seed and a purpose, so that checkpoints need no random state."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, words)).encode()).digest()[:8]) >> 1


def resolve_device(name: str) -> torch.device:
    """``auto``, ``cpu`` or ``cuda`` -> a device. A card has its number: some functions of torch.cuda refuse a device
    without one, and no tensor is on such a device. Raises BadInputError if there is no CUDA card."""
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInputError(
            'device = "cuda", but torch sees no CUDA card. Use -s device=cpu, or install a CUDA build of torch.'
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def run_prompts(config: Config) -> tuple[Prompt, ...]:
    """The training prompts of a configuration. Raises BadInputError if it names none."""
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
    """Number of frames of a clip that the critic sees."""
    frames, video = config.critic.frames, config.video
    if isinstance(frames, int):
        return frames
    return frames_at_rate(video.frames, video.fps, float(frames.removeprefix("fps:")))


def critic_rate(config: Config) -> float:
    """Frames per second that the critic sees."""
    return kept_fps(config.video.frames, config.video.fps, critic_frames(config), config.critic.frame_sampling)


def step_spec(config: Config, step: int, scales: Mapping[str, float] | None = None) -> StepSpec:
    """The specification of update ``step``. Its random choices depend only on the run's seed and ``step``. ``scales``:
    ``RewardSpec.scales``."""
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "plan", step))
    sampler, critic = config.sampler, config.critic
    graded = choose_graded(sampler.graded, sampler.steps, sampler.graded_steps, generator)
    every = config.optim.anchor_every
    anchor = config.optim.anchor * every if step % every == 0 else 0.0
    anchored = graded[derive_seed(config.seed, "anchor", step) % len(graded)]
    return StepSpec(
        sigmas=flow_sigmas(sampler.steps, sampler.shift, sampler.timesteps),
        graded=graded,
        kept=kept_frames(config.video.frames, critic_frames(config), critic.frame_sampling, generator),
        follow_motion=critic.frame_sampling == "motion",
        update=sampler.update,
        chain=sampler.chain,
        guidance=sampler.guidance,
        guidance_grad=sampler.guidance_grad,
        vae_window=config.vae_window,
        vae_cache_every=config.memory.vae_cache_every,
        record_decode=config.memory.record_decode,
        anchor=anchor,
        anchored=(anchored,) if anchor else (),
        anchor_huber=None if config.optim.anchor_huber == "off" else config.optim.anchor_huber,
        lv_samples=sampler.lv_samples,
        reward=replace(reward_spec(config), scales=scales or {}),
    )


class StageMeter(Protocol):
    """Measures the stages of an update: ``memory.meter.Meter``, or the planner's."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Entered around each stage."""
        ...

    def take(self) -> tuple[dict[str, float], dict[str, float]]:
        """(seconds by stage, peak GiB by stage) since the last call."""
        ...


@dataclass(frozen=True)
class Models:
    """The loaded models: the generator with its LoRA, the critic if it is needed, and the text embeddings."""

    transformer: Any
    """The trained one."""
    velocity: Velocity
    decoder: ClipDecoder
    critic: VLMCritic | None
    """``None`` where none is asked, too."""
    texts: Mapping[str, Tensor]
    """Text, or negative prompt -> (l, D) on the host, unpadded: padded, a thousand prompts of 512 tokens take 4 GiB."""
    text_tokens: int
    """L, to which ``condition`` pads."""
    images: Mapping[str, EncodedImage]
    """By file."""
    negative_prompt: str
    latent_shape: tuple[int, int, int, int]
    device: torch.device
    meter: StageMeter = field(compare=False)
    residency: Residency = field(compare=False)
    recorder: Recorder | None = field(compare=False, default=None)
    kernels: str = ""
    """The chosen operations, for printing."""
    kernel_record: Mapping[str, Any] | None = None
    """The choice, for ``kernels.json``."""
    ask: Critic | None = field(compare=False, default=None)
    """Callable to use in place of ``critic`` if its weights are partitioned."""
    expert: Any = None
    """The transformer that is not trained, if the generator has two."""
    first_level: float = 1.0
    """Sigma of the latents that denoising begins with."""
    max_sigma: float = 1.0
    """``lora.max_sigma``."""
    rewards: Mapping[str, torch.nn.Module] = field(default_factory=dict)
    """Scalar rewards by name (``types.ScalarReward``). They are woken with the critic, and parked if it is offloaded
    or streamed."""
    tiny: TinyDecoder | TinyBackward | None = None
    """With another ``model.decoder`` than the VAE."""

    @property
    def asked_critic(self) -> VLMCritic:
        """The critic. Outside the stages of a step, call ``awake`` first. Raises ValueError if it was not loaded."""
        if self.critic is None:
            raise ValueError("the models were loaded without a critic")
        return self.critic

    @property
    def judge(self) -> Critic:
        """What answers every question: the critic, with the scalar rewards. Raises ValueError if there is neither."""
        if not self.rewards:
            return self.ask or self.asked_critic
        return Combined(self.ask or self.critic, self.rewards)

    def awake(self, *names: Parkable) -> None:
        """Outside the stages of a step: brings these models to the card, and offloads all others that may be."""
        self.residency.need(*names, *(["rewards"] if "critic" in names else []))

    def parts(self, lora: Sequence[Tensor], uses: Uses = "exact") -> Parts:
        """For training."""
        parts = Parts(self.velocity, self.decoder, self.judge, lora, self.residency.stage)
        parts = replace(parts, base=self.base_velocity)
        if self.recorder is not None:
            parts = replace(parts, recorder=self.recorder)
        if uses == "tiny" and self.tiny is not None:
            stage = partial(self.residency.stage, spared={"vae": self.tiny.spares})
            return replace(parts, decoder=self.tiny, stage=stage)
        if uses == "both" and self.tiny is not None:
            return replace(parts, compared=self.tiny, same_frames="decode" not in self.tiny.spares)
        return parts

    def base_velocity(self, x: Tensor, sigma: float, cond: Any) -> Tensor:
        """The velocity without the LoRA."""
        with lora_scale(self.transformer, 0.0):
            return self.velocity(x, sigma, cond)

    def condition(self, prompts: Sequence[Prompt]) -> Tensor | ImageCondition:
        """Embeddings (B, L, D) on the device; with those of their images, if the prompts have some."""
        return self._condition([prompt.text for prompt in prompts], prompts)

    def no_condition(self, prompts: Sequence[Prompt]) -> Tensor | ImageCondition:
        """The same with the negative prompt in the place of each text."""
        return self._condition([self.negative_prompt] * len(prompts), prompts)

    def _condition(self, texts: Sequence[str], prompts: Sequence[Prompt]) -> Tensor | ImageCondition:
        rows = [self.texts[text] for text in texts]
        padded = [torch.nn.functional.pad(row, (0, 0, 0, self.text_tokens - len(row))) for row in rows]
        text_BLD = torch.stack(padded).to(self.device)
        images = [self.images[prompt.image] for prompt in prompts if prompt.image]
        if not images:
            return text_BLD
        latents = torch.stack([image.latents_CFhw for image in images]).to(self.device)
        tokens = [image.tokens_LD for image in images if image.tokens_LD is not None]
        return ImageCondition(text_BLD, latents, torch.stack(tokens).to(self.device) if tokens else None)

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """The latents that denoising begins with: (B, C, F, h, w) fp32 on the device, drawn on the CPU."""
        return self.first_level * draw_noise(self.latent_shape, seeds).to(self.device)

    def generators(self, seeds: Sequence[int]) -> list[Generator]:
        """Of the noise that is drawn while clips with these seeds are denoised."""
        return [torch.Generator().manual_seed(derive_seed("lv", seed)) for seed in seeds]


def assemble(
    config: Config,
    transformer: Any,
    vae: Any,
    critic: VLMCritic | None,
    texts: Mapping[str, Tensor],
    device: torch.device,
    meter: StageMeter,
    chosen: Chosen | None = None,
    other: OtherExpert | None = None,
    store: HostStore | None = None,
    kernels: Mapping[str, Any] | None = None,
    ranks: Ranks = ALONE,
    tiny: TinyNetwork | None = None,
    rewards: Mapping[str, torch.nn.Module] | None = None,
    images: Mapping[str, EncodedImage] | None = None,
) -> Models:
    """Applies the configuration's memory settings to loaded models, and removes the VAE's encoder.

    Args:
        texts: see ``Models``.
        chosen: the operations. ``None``: chosen here for ``device``.
        other: the second transformer, which is not trained. It is offloaded and streamed like ``transformer``; in a
            rollout only one of the two is on the card.
        store: host memory for parked, streamed and offloaded tensors. A plan passes one that only counts.
        kernels: the run's first choice of operations (``kernel_choice.choose``).
        tiny: of ``model.decoder``. It is small, and stays on the card.
        rewards, images: see ``Models``.

    Raises BadInputError: the video's size does not fit the models, or a requested kernel cannot run.
    """
    from lowmem_drf.models.experts import two_experts
    from lowmem_drf.models.tiny.decoder import TinyBackward, TinyDecoder
    from lowmem_drf.models.weights.quant import set_products

    family = family_of(transformer)
    family.drop_encoder(vae)
    memory, store = config.memory, store or HostStore(device)
    streamed: dict[str, Streamed] = {}
    generators = {"transformer": transformer} | ({} if other is None else {"expert": other.transformer})
    if "transformer" in memory.stream:
        streamed |= {name: Streamed(blocks_of(model), device, store) for name, model in generators.items()}
    if critic is not None and "critic" in memory.stream:
        streamed["critic"] = critic.stream(device, store)
    sizes = family.sizes(transformer.config, vae.config)
    shape = latent_shape(config, sizes)
    if chosen is None:
        seen = critic_frames(config) if critic is not None else 0
        chosen = choose(config, Work(config, sizes, critic, seen, shape, device), kernels, ranks)
    for model in generators.values():
        set_products(model, chosen.integers)
    recorder = Recorder(store, memory.keep_attention != "none") if memory.record_rollout else None
    computed = Activations(
        slices=memory.token_slices, rows=chosen.rows, attention=chosen.attention,
        rollout_attention=chosen.rollout_attention,
    )  # fmt: skip
    kept = replace(
        computed, checkpoint=memory.checkpoint, store=store, keep_attention=memory.keep_attention, recorder=recorder,
        graded_attention=chosen.graded_attention, streamed=streamed.get("transformer"), hooked=config.engine == "zero3",
    )  # fmt: skip
    unused = family.set_activations(transformer, kept)
    said = f"{chosen}; without effect on {family.NAME}: {', '.join(unused)}" if unused else str(chosen)
    if other is not None:  # it has no gradient, and nothing to keep
        family.set_activations(other.transformer, replace(computed, checkpoint=False, streamed=streamed.get("expert")))
    if critic is not None:
        critic.set_checkpointing(bool(memory.checkpoint))
        critic.set_attention(*(ranged_attention() if chosen.ranged else (None,)))
    decoder = family.decoder(
        vae, grad_dtype=DTYPES[memory.vae_grad_dtype], strips=memory.vae_strips, caches=memory.vae_caches,
        store=store, norm_silu=chosen.rows.norm_silu,
    )  # fmt: skip
    small: TinyDecoder | TinyBackward | None = None
    if tiny is not None:
        small = TinyDecoder(tiny, grad_dtype=DTYPES[memory.vae_grad_dtype], store=store)
        small = small if config.model.decoder == "tiny" else TinyBackward(decoder, small)
    modules = generators | {"vae": vae} | ({} if critic is None else {"critic": critic.model})
    modules |= {"rewards": torch.nn.ModuleList(rewards.values())} if rewards else {}
    parked = modules.keys() & {
        *(*memory.park, *(["expert"] if "transformer" in memory.park else [])),
        *(["rewards"] if "critic" in (*memory.park, *memory.stream) else []),
    }
    needs = NEEDS if other is None else {**NEEDS, "rollout": ()}  # two_experts brings each transformer in its turn
    residency = Residency(modules, parked, device, store, meter.stage, streamed, needs)
    velocity = family.as_velocity(transformer, recorder, fps=config.video.fps)
    if other is not None:
        second = family.as_velocity(other.transformer, fps=config.video.fps)
        velocity = two_experts(velocity, second, config.model.expert, other.boundary, residency.need)
    for name in (streamed.keys() | modules.keys() & {"rewards"}) - parked:
        bring(modules[name], device)  # the parts that are not streamed were loaded to the host
    if device.type == "cuda":
        torch.cuda.empty_cache()  # loading, packing and timing leave pieces that no stage can use
    elif THREADS not in os.environ and transformer.num_parameters() < SMALL:
        torch.set_num_threads(1)
    return Models(
        transformer=transformer, velocity=velocity, decoder=decoder, critic=critic, texts=texts,
        text_tokens=config.model.text_tokens, images=images or {}, negative_prompt=config.sampler.negative_prompt,
        latent_shape=shape,
        device=device, meter=meter, residency=residency, recorder=recorder, kernels=said,
        kernel_record=chosen.record, expert=other.transformer if other else None,
        first_level=config.sampler.timesteps[0] / TRAIN_TIMESTEPS if config.sampler.timesteps else 1.0,
        max_sigma=config.lora.max_sigma, rewards=rewards or {}, tiny=small,
    )  # fmt: skip
