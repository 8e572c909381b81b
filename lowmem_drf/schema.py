"""The configuration of a run as a frozen, typed tree (pydantic). Its defaults are the product's; a preset holds only
what differs. docs/configuration.md is generated from the docstrings here: ``python -m bench.configuration_doc``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

# counts that cost no memory are bounded so that a slip of the keyboard is seen; sizes have bounds of their own, and
# assembly/sizes.py has those that depend on the model and the memory
MANY = 1_000_000
Positive = Annotated[int, Field(ge=1, le=MANY)]
NonNegative = Annotated[int, Field(ge=0, le=MANY)]
Thousand = Annotated[int, Field(ge=1, le=1000)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# beyond its bounds a number, or what it is multiplied by, would become 0 or infinity in fp32
Scale = Annotated[float, Field(ge=1e-6, le=1e6)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
Parkable = Literal["critic", "vae", "transformer"]
Streamable = Literal["critic", "transformer"]
Name = Annotated[str, Field(min_length=1)]
RewardName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]


class Node(BaseModel):
    """A section. ``problems`` yields (field, message) for errors that the type of one field cannot express."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from ()


class Video(Node):
    """The clips that are generated."""

    width: Positive = 832
    """Width in pixels: a multiple of the generator's patch grid (16 for Wan2.1 and images, 32 for Wan2.2-TI2V-5B and
    LTX-Video). Memory grows with width x height, the time of attention with its square."""
    height: Positive = 480
    """Height in pixels; the same rule as for ``width``."""
    frames: Positive = 81
    """Pixel frames: one for the first latent frame, four for every other (4n + 1), or what the generator's VAE makes
    (8n + 1 of LTX-Video's and CogVideoX's; 1 of Stable Diffusion's, an image). The time of attention grows with their
    square."""
    fps: Thousand = 16
    """Frames per second. It is written into the MP4 and tells the critic how fast the motion is; it costs nothing."""

    def problems(self, n: int = 4, side: int = 8) -> Iterator[tuple[str, str]]:
        """``n``, ``side``: pixel frames of a latent (0: it makes images), and pixels on a side. What else a generator
        asks is known when its configuration is (``assembly.sizes.latent_shape``)."""
        for name, value in (("width", self.width), ("height", self.height)):
            if value % side:
                yield name, f"{value} is not a multiple of {side}; nearest: {max(side, round(value / side) * side)}"
        if not n and self.frames > 1:
            yield "frames", f"{self.frames}: the generator makes images; set 1, and critic.frames = 1"
        if n and (self.frames - 1) % n:
            low = max(1, (self.frames - 1) // n * n + 1)
            makes = f"{n}n + 1 (the VAE makes 1 + {n}n frames)"
            yield "frames", f"{self.frames} is not {makes}; nearest: {low} or {low + n}"


class Model(Node):
    """The generator: a video diffusion model, frozen."""

    id: Name = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    """A diffusers folder, a Hugging Face id, or ``toyworld`` for the models in this package."""
    transformer: str = ""
    """A single file, as ComfyUI uses, that replaces the transformer of ``id``: safetensors, also all-in-one or in fp8,
    or GGUF (``pip install gguf``). fp8 and GGUF are dequantised; ``quant`` packs them anew. Empty: the transformer of
    ``id``."""
    expert: Literal["low", "high"] = "low"
    """For a generator with two transformers (Wan2.2-T2V-A14B): train the LoRA on the low-noise or the high-noise one.
    All graded steps must belong to it."""
    base_lora: str | list[Name] = ""
    """A LoRA that is merged into the frozen base before training, such as a step-distillation LoRA: a safetensors file
    of any tool, or ``owner/repo/file.safetensors`` on the hub, or ``toyworld-fewstep``; or a list of them, merged
    in this order. It costs nothing during training. Empty: none."""
    base_lora_scale: Scale | list[Scale] = 1.0
    """Strength at which ``base_lora`` is merged; of a list, one for all or one for each."""
    quant: Literal["none", "nf4", "int8"] = "none"
    """Storage format of the frozen blocks' linear layers: ``dtype`` (``none``), ``int8`` (half the memory of bf16) or
    ``nf4`` (bitsandbytes' 4 bit, about a quarter). The error of int8 is one to three times that of computing in bf16,
    that of nf4 ten to thirty times."""
    products: Literal["16bit", "int8", "auto"] = "16bit"
    """How the blocks' frozen linear layers multiply. ``16bit``: in ``dtype``. ``int8``: in 8-bit integers, which what
    they multiply is rounded to, forward and backward: faster on a card, but rollout and gradient are approximate. The
    layers are then stored as with ``quant = "int8"``. The LoRA itself stays in ``dtype``. ``auto``: stored like that
    too (unless ``quant = "nf4"``, which stays), and multiplied as ``int8`` only where that is 1.1 times as fast on this
    card, timed at the start; else unpacked, as with ``quant = "int8"``, and so on a CPU."""
    decoder: Literal["exact", "tiny", "tiny_backward"] = "exact"
    """Which decoder updates use. ``tiny``: a small stand-in for the VAE (``decoder_file``), for a fraction of its time
    and memory. ``tiny_backward``: the critic sees the VAE's frames, and only their gradient goes through the stand-in.
    Either gradient is approximate, and compared with the VAE's in some updates. Samples and evaluation always use the
    VAE."""
    decoder_file: str = ""
    """Weights of the tiny decoder, in the architecture of TAEHV (github.com/madebyollin/taehv, MIT): a safetensors
    file, or ``owner/repo/file.safetensors`` on the hub. For Wan2.1 and Wan2.2-A14B it is published as
    ``Kijai/WanVideo_comfy/taew2_1.safetensors``, for Wan2.2-TI2V-5B as ``taew2_2.safetensors`` beside it. (LightX2V's
    ``lighttae`` files take latents of another scale.) Empty: ToyWorld's own."""
    decoder_check_every: Positive = 10
    """With a tiny decoder: in the first of this many updates the VAE makes frames and gradient, and the cosine
    between its gradient at the latents and the tiny decoder's is logged. 1: in every update."""
    decoder_least_cosine: Annotated[float, Field(ge=-1, le=1)] = 0.05
    """Below this cosine the run goes back to the VAE, for good. Unrelated gradients have a cosine near 0, those of
    ToyWorld's tiny decoder 0.1 to 0.4 (``python -m bench.accuracy.tiny_decoder``)."""
    text_tokens: Annotated[int, Field(ge=1, le=512)] = 512
    """Prompts are padded or cut to this many tokens, as in ``WanPipeline``. The transformer sees the padding: keep the
    number it was trained with, which is 512 for Wan. Of Stable Diffusion 3.5: 78 more than T5's, for CLIP's and a
    pooled row; 334 as published."""

    @property
    def storage(self) -> Literal["none", "nf4", "int8"]:
        """``quant``, or what ``products`` makes of it."""
        return self.quant if self.products == "16bit" or self.quant == "nf4" else "int8"

    def base_loras(self) -> list[tuple[str, float]]:
        """(file, strength) of every ``base_lora``."""
        files = ([self.base_lora] if self.base_lora else []) if isinstance(self.base_lora, str) else self.base_lora
        scales = self.base_lora_scale if isinstance(self.base_lora_scale, list) else [self.base_lora_scale] * len(files)
        return list(zip(files, scales, strict=True))

    def problems(self) -> Iterator[tuple[str, str]]:
        files = [self.base_lora] if isinstance(self.base_lora, str) else self.base_lora
        if isinstance(self.base_lora_scale, list) and len(self.base_lora_scale) != len(files):
            yield "base_lora_scale", f"has {len(self.base_lora_scale)} numbers for {len(files)} files of base_lora"
        if self.products == "int8" and self.quant == "nf4":
            cure = 'set quant = "int8", or products = "16bit"'
            yield "products", f'"int8" multiplies the integers that it stores, which quant = "nf4" has not; {cure}'


class Sampler(Node):
    """Denoising, and which of its steps carry gradient."""

    steps: Thousand = 20
    """N: denoising steps, at most the 1000 noise levels that Wan was trained with. Each costs a transformer pass
    without gradient, two with guidance."""
    graded_steps: Thousand = 3
    """K: how many steps carry gradient. Each costs a forward and a backward pass; peak memory does not depend on K."""
    graded: Literal["tail", "last", "random"] | list[NonNegative] = "tail"
    """Which steps carry gradient: the last K (``tail``), the very last one (``last``), K drawn at random in each update
    (``random``), or a list of step numbers, counted from 0."""
    chain: Literal["full", "drtune"] = "full"
    """``full``: the gradient flows through the transformer's input to earlier graded steps. ``drtune`` (arXiv
    2405.00760) stops it there: a little cheaper, and approximate."""
    guidance: Annotated[float, Field(ge=1, le=1000)] = 5.0
    """Classifier-free guidance scale, for both transformers of a generator that has two. 1 is no guidance; above 1 each
    step takes two transformer passes instead of one. ``auto``: as the model's publishers have it (docs/few-step.md), 5
    for others."""
    guidance_grad: Literal["cond", "both"] = "cond"
    """With guidance: gradient through the conditional branch alone (``cond``), or through both (``both``), which costs
    a second graded pass per step and no memory. The relay is exact for the choice made here."""
    shift: Annotated[float, Field(ge=0.01, le=1000)] = 3.0
    """Timestep shift of the flow-matching schedule: higher values put more steps at high noise. ``auto``: as the
    model's publishers have it, 3 for others."""
    timesteps: list[Annotated[float, Field(ge=1, le=1000)]] = []
    """The noise levels themselves, falling, 1000 for pure noise: one for each of ``steps``. A generator distilled to a
    few steps knows no others (docs/few-step.md). Empty: the grid that ``shift`` makes; so it is with another number of
    ``steps`` than the preset's by ``-s``. Left out for a model of discrete diffusion that is known: the levels of its
    scheduler for this number of steps."""
    update: Literal["euler", "renoise"] = "euler"
    """From one noise level to the next: along the velocity (``euler``), or to the predicted clip and back to the next
    level with fresh noise (``renoise``: ``lcm`` in ComfyUI, ``stochastic_sampling`` in diffusers). A distilled
    generator takes the one it was made for."""
    lv_samples: Annotated[int, Field(ge=0, le=1000)] = 0
    """DRaFT-LV (arXiv 2309.17400): extra noised copies of the clip, which the last step denoises again; the gradient
    is averaged over clip and copies. Each copy costs another decode, critic pass and backward. 0 is off."""
    negative_prompt: str = ""
    """Text of the unconditional branch; used with guidance above 1. ``auto``: as the model's publishers have it, for
    others none."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.graded_steps > self.steps:
            yield (
                "graded_steps",
                f"{self.graded_steps} graded steps do not fit in sampler.steps = {self.steps}; lower it",
            )
        if self.timesteps and len(self.timesteps) != self.steps:
            levels = f"lists {len(self.timesteps)} noise levels, and sampler.steps is {self.steps}"
            yield "timesteps", f"{levels}; make them agree, or set [] for the grid of sampler.shift"
        if any(level <= after for level, after in zip(self.timesteps, self.timesteps[1:], strict=False)):
            yield "timesteps", f"{self.timesteps} must fall from step to step"
        if self.graded == "last" and self.graded_steps != 1:
            message = (
                f'graded = "last" is one step, graded_steps = {self.graded_steps}; set it to 1, or graded = "tail"'
            )
            yield "graded_steps", message
        if isinstance(self.graded, list):
            if len(set(self.graded)) != len(self.graded) or any(k >= self.steps for k in self.graded):
                yield "graded", f"{self.graded} must hold different step numbers from 0 to {self.steps - 1}"
            elif (count := len(self.graded)) != self.graded_steps:
                message = f"graded lists {count} steps, graded_steps says {self.graded_steps}; make them agree"
                yield "graded_steps", message
        if self.lv_samples and self.graded != "last":
            yield "lv_samples", 'DRaFT-LV works on the last step only; set graded = "last" and graded_steps = 1'


class Weights(Node):
    """Each aspect's weight in the critic's reward. Its share is its weight over the sum, however many questions it
    asks. With all three 0 there is no critic, and nothing of it is loaded: only ``rewards``."""

    TA: Weight = 1.0
    """Text-video alignment."""
    Phy: Weight = 1.0
    """Physical fidelity."""
    VQ: Weight = 1.0
    """Visual quality."""

    @property
    def asked(self) -> bool:
        """Whether the critic is asked at all."""
        return self.TA + self.Phy + self.VQ > 0

    def problems(self) -> Iterator[tuple[str, str]]:
        for name, weight in self:
            if 0 < weight < 1e-6:
                yield name, f"{weight} is too small to count; set 0, or at least 1e-6"


class Critic(Node):
    """The frozen vision-language model that judges the clips, and what it is asked."""

    id: Name = "Qwen/Qwen2.5-VL-7B-Instruct"
    """A transformers folder or a Hugging Face id of a Qwen2.5-VL, Qwen3-VL or SmolVLM2 (the smallest one:
    ``HuggingFaceTB/SmolVLM2-500M-Video-Instruct``), ``toyworld``, or ``toyworld-reader``, which also understands
    ``phrases`` and captions. The model's size sets the memory of the critic's stage."""
    quant: Literal["none", "nf4"] = "nf4"
    """Storage format of the critic. ``nf4``: the language layers in 4 bit (bitsandbytes), vision tower and lm_head in
    ``dtype``. ``none``: everything in ``dtype``, which takes more than twice the memory."""
    mode: Literal["yesno", "dense", "both", "vanilla"] = "both"
    """What is asked: yes/no questions of all three aspects (``yesno``), explanations scored token by token (``dense``),
    ``both``, or one global yes/no question (``vanilla``, the baseline that collapses). One pass answers all questions,
    so more of them cost little."""
    questions: Name = "critic"
    """Who writes the questions: ``critic`` (the critic itself, or ``writer``, once before training; cached),
    ``phrases`` (quotes the prompt's own clauses; no model), or a JSON file in the format of ``lowmem-drf questions
    --json``. Questions in a prompt file take precedence. ToyWorld has its own ``grammar`` in place of ``critic``."""
    writer: str = ""
    """The model that writes the questions, if not the critic: a folder or a Hugging Face id, loaded as the critic is,
    and freed before anything else is loaded."""
    check: bool = True
    """Let the critic answer every question from the prompt's text first, and leave out those that it does not answer as
    wanted: two passes a prompt, once; cached. ToyWorld's default critic cannot read prompts."""
    reference: Literal["auto", "prompt"] = "auto"
    """Source of the reference answers to dense questions. ``auto``: what the critic says about the prompt's
    ``reference_video``, if there is one. ``prompt``: always made from the prompt."""
    token_weights: Literal["contrast", "uniform"] = "contrast"
    """Weights of the tokens of a dense answer. ``contrast``: a token counts as much as seeing the clip raises its
    probability, so words that the critic would say anyway count little; computed once, before training. ``uniform``:
    all tokens count alike."""
    normalize: bool = False
    """Divide each question's reward by its running standard deviation, so that questions whose reward varies most do
    not dominate. It costs nothing."""
    frames: Positive | Annotated[str, Field(pattern=r"^fps:\d{1,4}(\.\d{1,9})?$")] = 8
    """How many frames of the clip the critic sees: a number, or a rate per second such as ``"fps:2"``. Memory and time
    of the critic grow with them; the VAE backward visits the chunks that hold them."""
    frame_sampling: Literal["uniform", "random_phase", "motion"] = "uniform"
    """Which frames the critic sees: evenly spaced with both ends (``uniform``), an even grid with a new random phase in
    each update (``random_phase``), or more where the clip moves (``motion``)."""
    reward: Literal["yes_logprob", "yes_margin"] = "yes_logprob"
    """Reward of a yes/no question: the log-probability of the wanted answer (``yes_logprob``), or its log-odds against
    the other answer (``yes_margin``). Dense questions always use log-probabilities."""
    hinge: Literal["off"] | Annotated[float, Field(ge=-1e6, le=1e6)] = "off"
    """Cap on each question's reward: a question above it is pushed no further. ``off``: no cap."""
    weights: Weights = Weights()

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.questions == "templates":
            yield (
                "questions",
                '"templates" is gone: use "phrases", which quotes the prompt (any language, no model), or "critic"',
            )


class Reward(Node):
    """A scalar reward: a number for each clip, besides what the critic answers. Every key is ``rewards.<name>.<key>``,
    under a name of yours; the reward of an update is the critic's plus ``weight`` times the value of each of them."""

    id: str = ""
    """A CLIP in transformers' layout, as a folder or a Hugging Face id: ``openai/clip-vit-large-patch14``, or
    ``yuvalkirstain/PickScore_v1``, which was trained on what people prefer. The value is the model's own logit of frame
    and prompt, a cosine times about 100, and the mean over the frames that the critic sees. Or ``module:function`` for
    one of yours: ``function(device, dtype)`` returns a callable of (frames (B, T, 3, H, W) in [0, 1], prompts) that
    gives B values, higher is better, differentiable in the frames. Its memory is in no plan."""
    weight: Scale = 1.0
    """The value is multiplied by it. ``critic.normalize`` divides it by the value's spread too."""
    held_out: bool = False
    """Training does not use it: ``eval`` and the watch measure it, as part of the held-out reward."""


class Lora(Node):
    """The weights that are trained."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 32
    """Rank of the LoRA. Its weights, gradients, optimizer state and file grow in proportion."""
    alpha: Scale = 32.0
    """The LoRA's contribution is multiplied by ``alpha / rank``."""
    rslora: bool = False
    """Multiply by ``alpha / sqrt(rank)`` in its place (rsLoRA, arXiv 2312.03732), so that a higher rank does not learn
    more slowly. LoRA files are written with the ``alpha`` that gives the same, so every program takes them as usual."""
    targets: list[Name] = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    """Linear layers that get a LoRA, by the end of their names. Fewer layers take less memory and time."""
    rank_pattern: list[Name] = []
    """Other ranks for some of them, from 1 to 1024: ``["attn2.to_v=8", "blocks.[0-3].attn1.*=64"]``. What stands before
    ``=`` is a regular expression for the end of a name, from one of its dots on, as peft's; of two that fit, the first
    counts. ``alpha`` is that of all, so layers of a lower rank learn faster."""
    init: str = ""
    """A LoRA file of any tool to begin with; ``train --init-lora`` sets it, and takes rank, alpha and targets from the
    file. With another rank it is cut by singular values, or filled up. Empty: begin with a LoRA that changes
    nothing."""

    @property
    def scaled_alpha(self) -> float:
        """The alpha with which ``alpha / rank`` is the LoRA's scale."""
        return self.alpha * math.sqrt(self.rank) if self.rslora else self.alpha

    @property
    def ranks(self) -> dict[str, int]:
        """``rank_pattern`` as peft has it."""
        return {pattern: int(rank) for pattern, _, rank in (text.rpartition("=") for text in self.rank_pattern)}

    @property
    def adapter(self) -> dict[str, Any]:
        """The arguments of ``models.lora.adapter.add_lora``."""
        return {"rank": self.rank, "alpha": self.scaled_alpha, "targets": self.targets, "ranks": self.ranks}

    def problems(self) -> Iterator[tuple[str, str]]:
        if not self.targets:
            yield "targets", "is empty: nothing would be trained; name some, or leave it out"
        for text in self.rank_pattern:
            pattern, _, rank = text.rpartition("=")
            try:
                re.compile(pattern)
            except re.error as error:
                yield "rank_pattern", f"{pattern!r} is no regular expression: {error}"
            if not pattern or not re.fullmatch("[0-9]{1,4}", rank) or not 1 <= int(rank) <= 1024:
                yield "rank_pattern", f'{text!r} should be a pattern and a rank from 1 to 1024, like "attn2.to_v=8"'
        if self.rslora and self.rank_pattern:
            yield "rslora", "scales by one rank for all layers; leave it out, or leave rank_pattern out"


class Optim(Node):
    """The optimizer, on the gradient of a whole update."""

    name: Literal["adamw", "adamw8bit", "paged_adamw8bit", "lion", "prodigy"] = "adamw"
    """``adamw`` keeps Adam's moments in fp32. ``adamw8bit`` keeps them in 8 bit (bitsandbytes): a quarter of the
    memory, rounded. ``paged_adamw8bit`` also moves them to the host when the card is full. ``lion`` (``pip install
    lion-pytorch``) has one moment and takes steps of equal size, so a third to a tenth of AdamW's ``lr``. ``prodigy``
    (``pip install prodigyopt``) finds its own rate, which ``lr`` multiplies: set it to 1."""
    lr: Annotated[float, Field(ge=1e-12, le=1)] = 1e-4
    """Learning rate after the warm-up."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """AdamW's decoupled weight decay."""
    betas: list[Annotated[float, Field(ge=0, le=0.999999)]] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    """Decay rates of Adam's first and second moment."""
    eps: Annotated[float, Field(ge=1e-16, le=1)] = 1e-8
    """Added to the denominator of Adam's update."""
    grad_clip: Annotated[float, Field(ge=1e-9, le=1e18)] = 1.0
    """A gradient whose norm is larger is scaled down to this norm."""
    warmup_steps: NonNegative = 0
    """Updates over which the learning rate rises linearly to ``lr``."""
    schedule: Literal["constant", "cosine", "linear", "cosine_with_restarts", "polynomial"] = "constant"
    """Learning rate after the warm-up: constant, or down to 0 at the last update along a half cosine or a line, along
    ``cycles`` half cosines, each from the full rate, or along a line to the power ``power``."""
    cycles: Thousand = 3
    """Of ``schedule = "cosine_with_restarts"``."""
    power: Annotated[float, Field(ge=0.01, le=100)] = 2.0
    """Of ``schedule = "polynomial"``."""
    anchor: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """Weight of the mean squared difference between the tuned and the base's velocity, at the latents that enter one of
    the graded steps, drawn anew in each update: keeps what no question asks about as the base makes it. Costs a
    rollout step and a graded step more (at the first graded step no second one); 0: none of them."""
    anchor_every: Positive = 1
    """The anchor's term is part of every n-th update alone, with n times the weight: an n-th of its cost."""
    stop: Literal["never", "alarm"] = "never"
    """``alarm``: the run ends where the watch finds that clips get worse while the reward rises (``log.watch_every``).
    ``train --resume`` goes on."""
    max_skipped: Positive = 5
    """An update with a reward or gradient that is NaN or infinite is skipped. After this many in a row the run saves
    and stops."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.name == "prodigy" and self.lr < 0.01:
            yield "lr", f"{self.lr:g} is a factor of the rate that prodigy finds by itself; set it to 1"


class Memory(Node):
    """How the update fits the card. Only ``vae_backward`` and the two dtypes change the gradient by more than
    rounding."""

    vae_backward: Annotated[str, Field(pattern=r"^(exact|window:\d{1,4})$")] = "exact"
    """``exact``: cache gradients flow back to the first frame; the gradient is that of one graph with our clamp of the
    pixels (docs/memory.md). ``window:n`` (ChopGrad) stops them after n chunks: fewer chunks to recompute where kept
    frames lie far apart, and an approximate gradient."""
    vae_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Number format of the decode whose frames the critic sees. ``fp16`` takes half the memory and time of it, and
    rounds as finely as TF32, in which cards compute fp32 convolutions. ``bf16`` does too, but the Wan VAE's frames show
    banding."""
    vae_grad_dtype: Literal["fp32", "bf16"] = "fp32"
    """Number format of the VAE backward. ``bf16`` halves its activations and the stored caches; the gradient has a
    cosine of 0.9999 with that in fp32."""
    vae_strips: Thousand = 1
    """The VAE backward recomputes a chunk in this many strips of rows. More strips take less memory; rows at the
    borders are computed twice."""
    vae_cache_every: Thousand = 1
    """The decode stores the caches that enter one chunk in this many. From them the VAE backward decodes as many chunks
    again, without gradient, and keeps what their backward reads. Beyond 3, or ``record_decode`` if that is more, it
    decodes some of them once more."""
    record_decode: Annotated[int, Field(ge=0, le=1000)] = 0
    """Of so many chunks, the last of a clip, the decode stores what the VAE backward reads, which then does not decode
    them again. It costs host memory for each: at 832x480 about 2.2 GiB with a gradient in bf16. A chunk is 4 frames."""
    vae_caches: Literal["card", "host"] = "card"
    """Where the running caches of the decode wait between two uses. ``host`` frees memory on the card and costs copies
    over PCIe."""
    checkpoint: bool | Literal["host"] = True
    """``true``: a transformer block keeps only its input and is recomputed in its backward. ``"host"``: the inputs wait
    on the host too, for copies over PCIe. ``false``: blocks keep all activations: fastest, most memory."""
    token_slices: Thousand = 1
    """Slices of tokens in which a transformer block computes everything but its self-attention. More slices take less
    memory; a little is computed twice."""
    keep_attention: Literal["none", "card", "host"] = "none"
    """Under ``checkpoint``: where blocks keep the result of their self-attention, so that no graded step computes it
    twice. It costs memory on the card, or on the host and copies."""
    record_rollout: bool = False
    """The rollout stores what the backward of the graded steps needs, and they run no forward of their own. It costs
    host memory for every graded step."""
    park: list[Parkable] = []
    """Models offloaded to the host between their stages. It costs host memory and a copy over PCIe per stage."""
    stream: list[Streamable] = []
    """Models whose layers stay on the host and come to the card one after another as they are needed. It costs host
    memory; the copies mostly hide behind the computation."""
    text_device: Literal["card", "stream", "host"] = "card"
    """Where the text encoder runs, once for all prompts: on the card; on the card with its layers copied in one by one
    (``stream``: the same embeddings, under a second more per prompt); or on the CPU (``host``: minutes, no memory on
    the card)."""
    vram_gib: NonNegativeFloat = 0.0
    """Memory on the card that the whole process may use, in GiB: ``train`` plans for no more. ``train --vram`` sets it.
    0: all that is free."""
    fit: Literal["auto", "as_given"] = "auto"
    """What ``train``, ``plan`` and ``bench`` do where the plan does not fit the card. ``auto``: set as much as it takes
    of what leaves the gradient the same, up to rounding (docs/memory.md), and say so. ``as_given``: set nothing. What
    still does not fit is refused, with advice."""
    on_oom: Literal["stop", "adapt"] = "stop"
    """What ``train`` does when memory runs out after all. Both save the last finished update and say what happened.
    ``stop`` then says which settings take less; ``adapt`` starts anew with the next of them that changes no gradient,
    and stops when there is none left."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.checkpoint is not False:
            return
        for name, on in (("keep_attention", self.keep_attention != "none"), ("record_rollout", self.record_rollout)):
            if on:
                yield name, "has no effect with memory.checkpoint = false; set checkpoint = true or leave it out"
        if self.stream:
            yield "stream", "with memory.checkpoint = false layers keep their weights too; set checkpoint = true"


class Zero(Node):
    """DeepSpeed's ZeRO (arXiv 1910.02054). Used where ``engine`` is not ``single``."""

    offload: Literal["cpu", "none"] = "cpu"
    """Where the optimizer's state waits, and with ``zero3`` the partitioned weights: in host memory, or on the
    cards."""
    pin_memory: bool = True
    """Page-locked host memory: copies run beside computation, and the system cannot swap it out."""
    critic: bool = False
    """``zero3``: the critic's weights are partitioned too. It is then asked by all processes together."""
    rollout: Literal["auto", "gathered", "partitioned"] = "auto"
    """``zero3``: in the rollout the whole transformer stays on each card (``gathered``: its weights are sent once), or
    is gathered block by block in every step (``partitioned``). ``auto``: gathered if the plan fits the card."""


class Kernels(Node):
    """Which implementation computes an operation. Results agree up to rounding, except in 8 bit."""

    ops: Literal["auto", "fused", "naive"] = "auto"
    """Norms, modulation, rotary embedding and gates of the transformer, norm and SiLU of the VAE: Triton kernels
    (``fused``, less memory and time) or diffusers' code (``naive``). ``auto``: ``fused`` on a CUDA card."""
    attention: Literal["auto", "triton", "cudnn", "sdpa", "xformers", "flash"] = "auto"
    """Attention of the transformer; ``triton`` covers the critic too. ``auto``: the fastest on this card, timed at the
    start, and ``triton`` for the critic. The run keeps its choice in ``kernels.json``, and takes it again on resume."""
    rollout_attention: Literal["same", "int8", "auto"] = "same"
    """Attention among the tokens where there is no gradient (rollout, samples), but for what
    ``memory.record_rollout`` records. ``int8`` is faster and inexact. ``same``: as ``attention``. ``auto``: ``int8``
    only where it is 1.1 times as fast on this card, timed at the start with ``attention``, and kept with it in
    ``kernels.json``; else, on a CPU, and with ``deterministic`` ``same``."""
    graded_attention: Literal["same", "int8", "auto"] = "same"
    """Attention among the tokens in the forward of graded steps, and in the passes of the rollout that
    ``memory.record_rollout`` records for them. ``int8`` is faster and inexact; the backward stays that of
    ``attention``, from the results of this forward, and the gradient is approximate. ``same``: as ``attention``.
    ``auto``: as for ``rollout_attention``; forward and backward are compared together."""
    deterministic: bool = False
    """The same run gives the same bits on the same card, as far as PyTorch can; operations of which it cannot say so
    are named in a warning. Takes ``attention = "triton"``, whose backward then has seven products instead of five. On a
    CPU every run is like that."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.graded_attention == "int8" and self.attention == "xformers":
            cure = 'set kernels.attention = "triton", "sdpa" or "auto"'
            yield "graded_attention", f'"int8" does not go with the backward of xformers; {cure}'


class Log(Node):
    """What a run writes, and how often."""

    checkpoint_every: Positive = 25
    """Save a checkpoint every this many updates."""
    keep: Positive = 3
    """Checkpoints to keep; older ones are deleted."""
    sample_every: NonNegative = 50
    """Write sample clips every this many updates, and at the end. 0: never. Each clip costs a rollout and a decode."""
    sample_prompts: Thousand | Name | Annotated[list[Name], Field(min_length=1, max_length=1000)] = 4
    """What sample clips show: so many of the training prompts, the first ones (in ToyWorld held-out ones); or a prompt
    file; or a list of prompts."""
    sample_seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of their noise, the same for all of them and at every update."""
    sample_width: NonNegative = 0
    """Their width. 0: ``video.width``. Larger clips than those of training take time and memory that no plan counts."""
    sample_height: NonNegative = 0
    """Their height. 0: ``video.height``."""
    sample_frames: NonNegative = 0
    """Their frames, as of ``video.frames``. 0: that number."""
    sample_steps: Annotated[int, Field(ge=0, le=1000)] = 0
    """Their denoising steps, on the grid of ``sampler.shift``. 0: as in training."""
    sample_first: bool | Literal["auto"] = "auto"
    """Also write them before the first update, of the base model. ``auto``: where the plan says that it takes less than
    a minute, and where nothing is planned, on a CPU."""
    watch_every: NonNegative = 50
    """Look at clips of fixed prompts and seeds every this many updates, and at the end: questions that training does
    not ask, and measures that need no critic, against what the base's clips differ by. A rising reward with two of them
    outside is said at once, and the best update without that is kept (``--best``). 0: never."""
    watch_prompts: Thousand = 4
    """Prompts of a look, two clips each. Each costs a rollout and a decode without gradient."""
    eval_prompts: Annotated[int, Field(ge=0, le=10_000)] = 8
    """Number of prompts in the table after training. 0: no table. Each costs a clip of the base and one of the tuned
    model per seed."""
    eval_seeds: Thousand = 2
    """Clips per prompt in that table, each from its own noise."""
    eval_batch: Thousand = 1
    """Clips made at once where there is no gradient (samples, evaluation). Memory grows with it."""
    trackers: list[Literal["wandb", "trackio"]] = []
    """Where metrics and sample clips go besides the run's folder, which always has ``metrics.jsonl`` and TensorBoard's
    file: ``wandb`` (Weights & Biases), ``trackio``. The package must be installed."""
    project: Name = "lowmem-drf"
    """The trackers' project."""

    def problems(self, n: int = 4, side: int = 8) -> Iterator[tuple[str, str]]:
        sizes = {"width": self.sample_width, "height": self.sample_height, "frames": self.sample_frames}
        given = {name: value for name, value in sizes.items() if value}
        unset = {"width": side, "height": side, "frames": 1}
        for name, message in Video(**(unset | given)).problems(n, side):
            yield f"sample_{name}", message


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
        yield from self._engine_problems()

    @property
    def trained_rewards(self) -> dict[str, Reward]:
        """Those that an update asks."""
        return {name: reward for name, reward in self.rewards.items() if not reward.held_out}

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
