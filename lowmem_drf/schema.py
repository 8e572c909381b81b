"""The configuration of a run as a frozen, typed tree (pydantic). Its defaults are the product's; a preset holds only
what differs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Parkable = Literal["critic", "vae", "transformer"]
Streamable = Literal["critic", "transformer"]
Name = Annotated[str, Field(min_length=1)]


class Node(BaseModel):
    """A section. ``problems`` yields (field, message) for what one field's type cannot say."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from ()


class Video(Node):
    width: Positive = 832
    height: Positive = 480
    frames: Positive = 81
    """Pixel frames: 4n + 1, one for the first latent frame and four for every other."""
    fps: Positive = 16

    def problems(self) -> Iterator[tuple[str, str]]:
        for name, value in (("width", self.width), ("height", self.height)):
            if value % 8:
                yield name, f"{value} is not a multiple of 8; nearest: {max(8, round(value / 8) * 8)}"
        if self.frames % 4 != 1:
            low = max(1, (self.frames - 1) // 4 * 4 + 1)
            yield "frames", f"{self.frames} is not 4n + 1 (the VAE makes 1 + 4n frames); nearest: {low} or {low + 4}"


class Model(Node):
    id: Name = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    """A diffusers folder, a Hugging Face id, or ``toyworld`` for the models in this package."""
    transformer: str = ""
    """A single safetensors file (as ComfyUI's) in place of the transformer of ``id``. Empty: that of ``id``."""
    expert: Literal["low", "high"] = "low"
    """Of a generator of two transformers (Wan2.2-T2V-A14B): the LoRA is trained on the one for low noise, or on that
    for high noise. All graded steps are to be its own."""
    base_lora: str = ""
    """A LoRA that is merged into the frozen base before training, for example a step-distillation one: a safetensors
    file, or ``owner/repo/file.safetensors`` on the hub. Empty: none."""
    base_lora_scale: PositiveFloat = 1.0
    quant: Literal["none", "nf4", "int8"] = "none"
    """What the linears of the frozen base's blocks are kept in: ``nf4`` (bitsandbytes' 4 bit), ``int8``, or ``dtype``
    (``none``)."""
    text_tokens: Positive = 512
    """Prompts are padded or cut to this many tokens, as ``WanPipeline`` does."""


class Sampler(Node):
    steps: Positive = 20
    graded_steps: Positive = 3
    """K: how many steps carry gradient."""
    graded: Literal["tail", "last", "random"] | list[NonNegative] = "tail"
    """Which: the last K (``tail``), the very last one (``last``), K at random each update, or an explicit list of step
    numbers."""
    chain: Literal["full", "drtune"] = "full"
    """``drtune`` stops the gradient at the transformer's input; ``full`` lets it through to earlier graded steps."""
    guidance: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 5.0
    """1 is no guidance and one transformer pass a step; above 1 there are two. A generator of two transformers has it
    for both."""
    guidance_grad: Literal["cond", "both"] = "cond"
    """Gradient through the conditional branch alone, or through both."""
    shift: PositiveFloat = 3.0
    lv_samples: NonNegative = 0
    """DRaFT-LV: extra noise draws at the last step that average its gradient. 0 is off."""
    negative_prompt: str = ""

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.graded_steps > self.steps:
            yield "graded_steps", f"{self.graded_steps} graded steps do not fit in sampler.steps = {self.steps}"
        if self.graded == "last" and self.graded_steps != 1:
            yield (
                "graded_steps",
                f'graded = "last" is one step, graded_steps = {self.graded_steps}; set it to 1, or graded = "tail"',
            )
        if isinstance(self.graded, list):
            if len(set(self.graded)) != len(self.graded) or any(k >= self.steps for k in self.graded):
                yield "graded", f"{self.graded} is to hold different step numbers from 0 to {self.steps - 1}"
            elif len(self.graded) != self.graded_steps:
                yield (
                    "graded_steps",
                    f"graded lists {len(self.graded)} steps, graded_steps says {self.graded_steps}; make them agree",
                )
        if self.lv_samples and self.graded != "last":
            yield "lv_samples", 'DRaFT-LV works on the last step only; set graded = "last" and graded_steps = 1'


class Weights(Node):
    TA: NonNegativeFloat = 1.0
    Phy: NonNegativeFloat = 1.0
    VQ: NonNegativeFloat = 1.0

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.TA + self.Phy + self.VQ == 0:
            yield "TA", "all three weights are 0: there would be no reward"


class Critic(Node):
    id: Name = "Qwen/Qwen2.5-VL-7B-Instruct"
    """A transformers folder, a Hugging Face id, or ``toyworld``."""
    quant: Literal["none", "nf4"] = "nf4"
    """``nf4``: the language layers in 4 bit (bitsandbytes), vision tower and lm_head in ``dtype``. ``none``: all in
    ``dtype``."""
    mode: Literal["yesno", "dense", "both", "vanilla"] = "both"
    """``yesno``: yes/no questions of all three aspects. ``dense``: explanation queries of all three, scored token by
    token. ``both``. ``vanilla``: one global yes/no question, the baseline that collapses."""
    questions: Name = "templates"
    """Who writes them: ``templates``, ``critic`` (the critic itself, once, before training; cached), or a JSON file in
    the form that ``lowmem-drf questions --json`` prints. Questions in a prompt file come before all of these."""
    reference: Literal["auto", "prompt"] = "auto"
    """Where the answers wanted of dense questions come from. ``auto``: what the critic says of the prompt's
    ``reference_video``, where there is one. ``prompt``: always the writer's, made from the prompt."""
    token_weights: Literal["contrast", "uniform"] = "contrast"
    """Of a dense answer. ``contrast``: a token weighs what seeing the clip does for it; words the critic would say
    anyway weigh little."""
    normalize: bool = False
    """Divide each question's reward by how much it has varied so far."""
    frames: Positive | Annotated[str, Field(pattern=r"^fps:\d+(\.\d+)?$")] = 8
    """How many of the clip's frames the critic sees, or how many a second (``"fps:2"``)."""
    frame_sampling: Literal["uniform", "random_phase", "motion"] = "uniform"
    """Which: evenly spaced with both ends (``uniform``), a grid with a random phase every update (``random_phase``), or
    denser where the clip moves (``motion``)."""
    reward: Literal["yes_logprob", "yes_margin"] = "yes_logprob"
    hinge: Literal["off"] | Annotated[float, Field(allow_inf_nan=False)] = "off"
    """Stop pushing a question whose reward is above this."""
    weights: Weights = Weights()


class Lora(Node):
    rank: Positive = 32
    alpha: PositiveFloat = 32.0
    targets: list[Name] = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]

    def problems(self) -> Iterator[tuple[str, str]]:
        if not self.targets:
            yield "targets", "is empty: nothing would be trained"


class Optim(Node):
    name: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"
    """``adamw8bit``: moments in 8 bit (bitsandbytes), a quarter of the bytes. ``paged_adamw8bit``: and they move to the
    host when the card is full."""
    lr: PositiveFloat = 1e-4
    weight_decay: NonNegativeFloat = 0.0
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    eps: PositiveFloat = 1e-8
    grad_clip: PositiveFloat = 1.0
    warmup_steps: NonNegative = 0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """After the warm-up: hold the rate, or let it fall to 0 at the last update."""


class Memory(Node):
    vae_backward: Annotated[str, Field(pattern=r"^(exact|window:\d+)$")] = "exact"
    """``exact``, or ``window:n``: cache gradients stop after n chunks (ChopGrad)."""
    vae_dtype: Literal["fp32", "bf16"] = "fp32"
    """Of the decode whose frames the critic sees. In bf16 the Wan VAE bands."""
    vae_grad_dtype: Literal["fp32", "bf16"] = "fp32"
    """Of the VAE's recompute with gradient."""
    vae_strips: Positive = 1
    """Strips of rows in which a decode chunk is recomputed with gradient."""
    vae_cache_every: Positive = 1
    """What enters a decode chunk is kept on the host for one chunk in so many, and computed again between."""
    vae_caches: Literal["card", "host"] = "card"
    """Where the running caches of the decode wait between two uses."""
    checkpoint: bool | Literal["host"] = True
    """Recompute each transformer block in its backward; ``"host"``: and what enters the blocks waits on the host.
    ``false`` keeps all."""
    token_slices: Positive = 1
    """Slices of tokens in which a transformer block does what it does token by token: all but its self-attention."""
    keep_attention: Literal["none", "card", "host"] = "none"
    """Under ``checkpoint``, blocks keep the results of their attentions, and no graded step computes one twice."""
    record_rollout: bool = False
    """At the graded steps the rollout leaves on the host what their backward needs, and they run no forward of their
    own."""
    park: list[Parkable] = []
    """Whose weights wait on the host outside their stages."""
    stream: list[Streamable] = []
    """Whose layers wait on the host in their stages too, and come to the card one after another as they are needed."""
    text_device: Literal["card", "stream", "host"] = "card"
    """Where the text encoder runs, once for all prompts: on the card; there too, its layers coming from the host one
    after another (``"stream"``: the same embeddings, under a second more for a prompt); or on the host, which takes
    minutes and none of the card."""
    vram_gib: NonNegativeFloat = 0.0
    """The budget of the whole process on the card: ``train`` refuses a plan above it. 0: what the card has."""

    def problems(self) -> Iterator[tuple[str, str]]:
        for name, on in (("keep_attention", self.keep_attention != "none"), ("record_rollout", self.record_rollout)):
            if on and self.checkpoint is False:
                yield (
                    name,
                    "blocks that keep everything (memory.checkpoint = false) have nothing to take from it; set checkpoint = true or leave it out",
                )
        if self.stream and self.checkpoint is False:
            yield (
                "stream",
                "layers that keep everything (memory.checkpoint = false) keep their weights too; set checkpoint = true",
            )


class Zero(Node):
    """DeepSpeed's ZeRO (arXiv 1910.02054). Of interest where ``engine`` is not ``single``."""

    offload: Literal["cpu", "nvme", "none"] = "cpu"
    """Where the optimizer's state waits, and with ``zero3`` the partitioned weights. ``nvme``: weights in files under
    ``nvme_path``, the optimizer's state in host memory. ``none``: on the cards."""
    nvme_path: str = ""
    pin_memory: bool = True
    """Page-locked host memory: copies run beside computation, and the system cannot swap it out."""
    critic: bool = False
    """``zero3``: the critic's weights are partitioned too, by an engine of its own."""
    rollout: Literal["auto", "gathered", "partitioned"] = "auto"
    """``zero3``: in the rollout the whole transformer stays on each card (``gathered``: its weights travel once), or is
    gathered block by block in every step (``partitioned``). ``auto``: gathered where the plan says that it fits."""
    stage3_prefetch_bucket_size: NonNegative = 50_000_000
    """Numbers of weights that are gathered ahead of their use."""
    stage3_max_live_parameters: Positive = 1_000_000_000
    """Gathered weights above which nothing more is gathered ahead."""
    stage3_param_persistence_threshold: NonNegative = 100_000
    """Tensors of no more numbers stay on every card."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if (self.offload == "nvme") != bool(self.nvme_path):
            yield "nvme_path", 'goes with offload = "nvme", and only with it: the folder on the disk'


class Kernels(Node):
    ops: Literal["auto", "fused", "naive"] = "auto"
    """Norms, modulation, rotary embedding and gates of the transformer, norm and SiLU of the VAE: our Triton kernels
    (``fused``), or as diffusers computes them (``naive``). ``auto``: ``fused`` on a CUDA card."""
    attention: Literal["auto", "triton", "sdpa", "xformers", "flash"] = "auto"
    """Of the transformer; with ``triton`` the critic's too. ``auto``: the fastest on this card, timed at the start."""
    rollout_attention: Literal["same", "int8"] = "same"
    """Wherever there is no gradient (rollout, samples): ``int8`` is faster and inexact. Graded steps are never computed
    with it."""


class Log(Node):
    checkpoint_every: Positive = 25
    keep: Positive = 3
    """Checkpoints kept; older ones are deleted."""
    sample_every: NonNegative = 50
    """Write sample clips every so many updates, and at the end. 0 is never."""
    sample_prompts: Positive = 4
    eval_prompts: NonNegative = 8
    """Prompts of the table after training. 0 is no table."""
    eval_seeds: Positive = 2
    eval_batch: Positive = 1
    """Clips made at once where there is no gradient (samples, evaluation)."""


class Config(Node):
    """The whole configuration of a run."""

    prompts: str = ""
    """A prompt file (txt or jsonl), or ``toyworld`` for the prompts of the toy world."""
    steps: Positive = 500
    """Updates of the LoRA."""
    batch: Positive = 4
    """Prompts (clips) of one update."""
    micro_batch: Positive = 1
    """Clips of one relay pass, at most; memory grows with it, the gradient is that of ``batch``."""
    seed: NonNegative = 0
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Of the transformer, the text encoder and the critic. The VAE (bands in bf16), LoRA weights, reward and optimizer
    are fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    engine: Literal["single", "zero1", "zero2", "zero3"] = "single"
    """``single``: one process. Else DeepSpeed: prompts are split over processes, a card each, and of the LoRA's
    training state every process keeps a part: the optimizer's (``zero1``), the gradients too (``zero2``), and of the
    frozen transformer's weights too (``zero3``)."""
    processes: Positive = 1
    """How many ``train`` starts; ``batch`` is split over them. Under ``torchrun`` or ``deepspeed``: as many as these
    started."""
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
        if self.micro_batch > self.batch:
            yield (
                "micro_batch",
                f"{self.micro_batch} is more than batch = {self.batch}; lower it too: -s micro_batch={self.batch}",
            )
        if isinstance(frames := self.critic.frames, int) and frames > self.video.frames:
            yield "critic.frames", f"the critic cannot see {frames} of video.frames = {self.video.frames}; lower it"
        if isinstance(frames, str) and not 0 < float(frames.removeprefix("fps:")) <= self.video.fps:
            yield (
                "critic.frames",
                f"{frames!r}: the clip has {self.video.fps} frames a second (video.fps); give a rate above 0 and no higher",
            )

        yield from self._engine_problems()

    def _engine_problems(self) -> Iterator[tuple[str, str]]:
        count = self.processes
        if self.engine == "single" and count > 1:
            yield (
                "engine",
                f'"single" is one process, not {count}; set engine = "zero1" (weights on every card) or "zero3" (weights partitioned)',
            )
        if count > self.batch:
            yield (
                "processes",
                f"{count} are more than the batch = {self.batch} prompts of an update: some would have none; raise it: -s batch={count}",
            )
        elif self.batch % count:
            low = self.batch // count * count
            yield (
                "batch",
                f"{self.batch} prompts cannot be split evenly over {count} processes; nearest: {low} or {low + count}",
            )
        if self.engine != "single" and self.optim.name != "adamw":
            yield (
                "optim.name",
                f"{self.optim.name} does not go with engine = {self.engine}, which splits the moments over the processes; set adamw",
            )
        if self.zero.critic and self.engine != "zero3":
            yield "zero.critic", 'partitions the critic\'s weights: set engine = "zero3", or leave it out'
        if self.engine != "zero3":
            return
        partitioned = ["transformer", *(["critic"] if self.zero.critic else [])]
        for name, quant in (("model", self.model.quant), ("critic", self.critic.quant)):
            if quant != "none" and (name == "model" or self.zero.critic):
                reason = (
                    "packed weights are gathered and unpacked on every card, which takes more of its memory, not less"
                )
                yield (
                    f"{name}.quant",
                    f'{quant} does not go with ZeRO-3: {reason}; set none, or engine = "zero1" with memory.stream',
                )
        for key, names in (("park", self.memory.park), ("stream", self.memory.stream)):
            if clash := [name for name in partitioned if name in names]:
                yield f"memory.{key}", f"has {', '.join(clash)}, whose weights ZeRO-3 keeps and moves; leave it out"
        if self.memory.record_rollout:
            yield (
                "memory.record_rollout",
                "keeps blocks' weights for a backward that ZeRO-3 has to gather; set it to false",
            )

    @property
    def vae_window(self) -> int | None:
        return None if self.memory.vae_backward == "exact" else int(self.memory.vae_backward.split(":")[1])
