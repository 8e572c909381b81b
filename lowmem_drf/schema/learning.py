"""What is learned from what: the critic and other rewards, the LoRA, the optimizer."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from lowmem_drf.schema.node import Name, Node, NonNegative, Positive, Scale, Thousand, Weight


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
    ``both``, or one global yes/no question (``vanilla``, the paper's baseline). One pass answers all questions,
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
    scale: Scale = 1.0
    """Strength of the trained LoRA wherever it is used: sample clips, evaluations, the watch, LoRA files. Training is
    at 1. Above 1 goes on in the direction that training went (ExPO, arXiv 2404.16792): for a run whose anchor has
    shrunk the change. Without an anchor it spoils clips (docs/evidence.md). A checkpoint on the way has a part of
    it, from 1 at the first update to all of it at the last: more makes the noise of a high learning rate larger too."""
    max_sigma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The trained LoRA is used in denoising steps up to this noise level (1: pure noise, so in all): in sample clips,
    evaluations and the watch. Training is in all steps. In the steps before, which decide where things are, the model
    is its base, and clips of a prompt stay more various (docs/evidence.md). It costs nothing and can be tried on any
    trained LoRA: ``sample -s lora.max_sigma=0.7`` leaves it out of the first two of rCM's four steps (``rtx4090``),
    0.9 out of the first two of ``toy-fast``. Other programs use a LoRA file in all steps unless told otherwise
    (docs/lora.md)."""
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
        """The alpha with which training multiplies B A by ``alpha / rank``."""
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
    anchor_huber: Literal["off"] | Annotated[float, Field(ge=1e-6, le=1e6)] = "off"
    """A difference of the velocity (whose own size is 1 to 2) beyond which an element is pulled back no harder the
    farther it is (pseudo-Huber): the few large changes that a question asks for are held back less than the many small
    ones that nothing asks for. ``off``: the square."""
    anchor_every: Positive = 1
    """The anchor's term is part of every n-th update alone, with n times the weight: an n-th of its cost."""
    stop: Literal["never", "alarm"] = "never"
    """``alarm``: the run ends where the watch finds that clips get worse while the reward rises, or worse than the
    base's (``log.watch_every``). ``train --resume`` goes on."""
    max_skipped: Positive = 5
    """An update with a reward or gradient that is NaN or infinite is skipped. After this many in a row the run saves
    and stops."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.name == "prodigy" and self.lr < 0.01:
            yield "lr", f"{self.lr:g} is a factor of the rate that prodigy finds by itself; set it to 1"
