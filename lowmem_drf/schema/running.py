"""How a run gets on with its machine, and what it writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from lowmem_drf.schema.generator import Video
from lowmem_drf.schema.node import Name, Node, NonNegative, Positive, Thousand

Parkable = Literal["critic", "vae", "transformer"]
Streamable = Literal["critic", "transformer"]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


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
    not ask, and measures that need no critic, each with a band from what the base's clips differ by. With a
    reward that has risen, or held-out answers worse than the base's, two of them outside in two looks in a row are an
    alarm, three at once. The best update before is kept (``--best``). 0: never."""
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
