"""The configuration of a run as a frozen, typed tree (pydantic). Its defaults are the product's; a preset holds only
what differs. docs/configuration.md is generated from the docstrings here: ``python -m bench.configuration_doc``.

The whole is below; a section is a class of ``generator``, ``learning`` or ``running``.

Not here: reading presets and overrides, and messages (``config.py``); bounds that depend on the model and the memory
(``assembly/sizes.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from lowmem_drf.schema.generator import Model, Sampler, Video
from lowmem_drf.schema.learning import Critic, Lora, Optim, Reward
from lowmem_drf.schema.node import Name, Node, Positive, Thousand
from lowmem_drf.schema.running import Kernels, Log, Memory, Zero

RewardName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]


class Config(Node):
    """The whole configuration of a run."""

    prompts: str = ""
    """A prompt file (txt or jsonl), or ``toyworld`` for ToyWorld's prompts."""
    skip_prompts: list[Name] = []
    """Ids of prompts to leave out: those of a jsonl file, or line numbers of four digits (``["0003"]``). It may change
    on resume, which the prompt file may not."""
    steps: Positive = 500
    """Updates of the LoRA."""
    batch: Annotated[int, Field(ge=1, le=10_000)] = 4
    """Prompts per update, one clip each. Time grows with it, memory does not."""
    micro_batch: Thousand = 1
    """Clips in one pass of the relay, at most. Memory grows with it; the gradient is that of the whole ``batch``."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of every random choice: the LoRA's initial weights, the order of prompts, noise."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Number format of the transformer, the text encoder and the critic. LoRA weights, reward and optimizer stay in
    fp32, and so does the VAE by default, which bands in bf16."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: the CUDA card if there is one, else the CPU."""
    engine: Literal["single", "zero1", "zero2", "zero3"] = "single"
    """``single``: one process. Else DeepSpeed: prompts are split over the processes, a card each. Every process keeps a
    part of the optimizer's state (``zero1``), of the LoRA's gradients too (``zero2``), and of the frozen transformer's
    weights too (``zero3``)."""
    processes: Annotated[int, Field(ge=1, le=64)] = 1
    """Number of processes that ``train`` starts; ``batch`` is split over them. Under ``torchrun`` or ``deepspeed``: the
    number that these started."""
    rewards: dict[RewardName, Reward] = {}
    """Scalar rewards besides the critic's: a table for each, under a name of yours. Empty: none."""
    video: Video = Video()
    model: Model = Model()
    sampler: Sampler = Sampler()
    critic: Critic = Critic()
    lora: Lora = Lora()
    optim: Optim = Optim()
    memory: Memory = Memory()
    zero: Zero = Zero()
    kernels: Kernels = Kernels()
    log: Log = Log()

    def problems(self) -> Iterator[tuple[str, str]]:
        if (size := self.micro_batch) > self.batch:
            yield "micro_batch", f"{size} is more than batch = {self.batch}; lower it too: -s micro_batch={self.batch}"
        if isinstance(frames := self.critic.frames, int) and frames > self.video.frames:
            yield "critic.frames", f"the critic cannot see {frames} of video.frames = {self.video.frames}; lower it"
        if isinstance(frames, str) and not 0 < float(frames.removeprefix("fps:")) <= self.video.fps:
            clip = f"the clip has {self.video.fps} frames a second (video.fps)"
            yield "critic.frames", f"{frames!r}: {clip}; give a rate above 0 and no higher"
        if not self.critic.weights.asked and not self.trained_rewards:
            yield "critic.weights.TA", "all three weights are 0: there would be no reward; raise one, or add rewards"
        for name, reward in self.rewards.items():
            if not reward.id:
                yield f"rewards.{name}.id", "is missing: give a CLIP's folder or id, or module:function"
        if self.lora.max_sigma < 1 and self.model.expert == "high":
            reason = f'{self.lora.max_sigma:g} would leave out steps of model.expert = "high", which denoises no others'
            yield "lora.max_sigma", f"{reason} than those of high noise; leave it at 1"
        yield from self._engine_problems()

    @property
    def trained_rewards(self) -> dict[str, Reward]:
        """Those that an update asks."""
        return {name: reward for name, reward in self.rewards.items() if not reward.held_out}

    def strength(self, step: int, steps: int = 0) -> float:
        """Of the LoRA after ``step`` of ``steps`` updates (0: of ``self.steps``), where it is used: 1 at first,
        ``lora.scale`` after the last one."""
        return 1 + (self.lora.scale - 1) * min(step / (steps or self.steps), 1)

    def used_alpha(self, step: int, steps: int = 0) -> float:
        """``lora.scaled_alpha`` where this LoRA is used (``strength``)."""
        return self.lora.scaled_alpha * self.strength(step, steps)

    def _engine_problems(self) -> Iterator[tuple[str, str]]:
        count = self.processes
        if self.engine == "single" and count > 1:
            cure = 'set engine = "zero1" (weights on every card) or "zero3" (weights partitioned)'
            yield "engine", f'"single" is one process, not {count}; {cure}'
        if count > self.batch:
            reason = f"more than the batch = {self.batch} prompts of an update: some would have none"
            yield "processes", f"{count} are {reason}; raise it: -s batch={count}"
        elif self.batch % count:
            low = self.batch // count * count
            cure = f"nearest: {low} or {low + count}"
            yield "batch", f"{self.batch} prompts cannot be split evenly over {count} processes; {cure}"
        if self.engine != "single" and self.optim.name != "adamw":
            reason = f"engine = {self.engine}, which splits the moments over the processes"
            yield "optim.name", f"{self.optim.name} does not go with {reason}; set adamw"
        if self.engine != "single" and self.memory.on_oom == "adapt":
            yield (
                "memory.on_oom",
                f'"adapt" starts one process anew, and not those of engine = {self.engine}; set "stop"',
            )
        if self.zero.critic and not self.critic.weights.asked:
            yield "zero.critic", "partitions a critic, and with all critic.weights 0 there is none; leave it out"
        if self.zero.critic and self.engine != "zero3":
            yield "zero.critic", 'partitions the critic\'s weights: set engine = "zero3", or leave it out'
        if self.engine != "zero3":
            return
        partitioned = ["transformer", *(["critic"] if self.zero.critic else [])]
        for name, quant in (("model", self.model.quant), ("critic", self.critic.quant)):
            if quant != "none" and (name == "model" or self.zero.critic):
                reason = "gathering and unpacking the weights on a card takes more of its memory, not less"
                cure = 'set none, or engine = "zero1" with memory.stream'
                yield f"{name}.quant", f"{quant} does not go with ZeRO-3: {reason}; {cure}"
        if self.model.products != "16bit" and self.model.quant == "none":
            reason = 'does not go with ZeRO-3, which does not partition 8-bit weights; set "16bit", or engine = "zero1"'
            yield "model.products", f'"{self.model.products}" {reason}'
        for key, names in (("park", self.memory.park), ("stream", self.memory.stream)):
            if clash := [name for name in partitioned if name in names]:
                yield f"memory.{key}", f"has {', '.join(clash)}, but ZeRO-3 itself moves these weights; leave it out"
        if self.memory.record_rollout:
            yield "memory.record_rollout", "does not gather the weights that ZeRO-3 partitions; set it to false"

    @property
    def vae_window(self) -> int | None:
        return None if self.memory.vae_backward == "exact" else int(self.memory.vae_backward.split(":")[1])
