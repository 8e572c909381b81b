"""What is generated, and how: the clips, the model, its denoising."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from lowmem_drf.schema.node import Name, Node, NonNegative, Positive, Scale, Thousand


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
