"""The words of lowmem-drf as types, and the legend of shape letters.

Shape letters, used as name suffixes at the joints (``frames_BTCHW``):

    B  clips of an update           T  pixel frames            H W  pixels, height and width
    C  channels                     F  latent frames           h w  latent height and width
    N  denoising steps              K  graded steps            V    vocabulary of the critic
    L  tokens of a text             A  tokens of an answer

Pixel frames are in [0, 1] wherever a name ends in ``_BTCHW`` or ``_TCHW``; the VAE's own range [-1, 1] does not leave
``models/wan/decoder.py``. Latents are the transformer's (normalised by the VAE's mean and standard deviation).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Aspect = Literal["TA", "Phy", "VQ"]
"""TA: text-video alignment. Phy: physical fidelity. VQ: visual quality."""

Kind = Literal["yesno", "dense"]


@dataclass(frozen=True, slots=True)
class Question:
    """One thing asked about a clip."""

    aspect: Aspect
    text: str
    answer: str
    """The answer wanted: ``"yes"`` or ``"no"`` for ``yesno``, the reference explanation for ``dense``."""
    kind: Kind = "yesno"
    weight: float = 1.0
    name: str = ""
    """Short key for metrics (``color``, ``jump``). Empty: the aspect stands for it."""
    token_weights: tuple[float, ...] = ()
    """``dense``: the weight of each token of the answer in its reward, as the critic's tokenizer cuts it. Empty: all
    alike."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line of a prompt file."""

    id: str
    text: str
    questions: tuple[Question, ...] = ()
    """Questions given by the user. Empty: they are made from ``text``."""
    reference_video: str | None = None


@dataclass(frozen=True, slots=True)
class Clip:
    """A finished clip with what it was made from."""

    frames_TCHW: Tensor  # float, [0, 1]
    prompt: str
    seed: int
    fps: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What the critic says to one question about one clip."""

    logits_AV: Tensor
    """fp32 logits at the positions that predict the wanted answer's tokens. ``yesno``: A = 1."""
    target_A: Tensor
    """int64 token ids of the wanted answer. For ``yesno``: of its first casing; all casings are in ``yes`` and
    ``no``."""
    yes: tuple[int, ...] = ()
    no: tuple[int, ...] = ()


class Decoder(Protocol):
    """A causal video VAE decoder, whole and in chunks. A chunk is one latent frame and the pixel frames it makes."""

    temporal_factor: int
    """Pixel frames per latent frame (4 for Wan). The first latent frame makes one pixel frame."""

    def decode(self, latents_BCFhw: Tensor) -> Tensor:
        """All frames at once, as the model library does it. Returns (B, T, C, H, W) in [0, 1]. Differentiable."""
        ...

    def start(self, batch: int) -> tuple[Any, ...]:
        """The caches that enter the first chunk: a tuple of tensors and ``None``."""
        ...

    def chunk(self, latents_BC1hw: Tensor, caches: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...]]:
        """Latent frame + entering caches -> (frames (B, t, C, H, W) in [0, 1], caches handed on). Pure and
        differentiable in both; the frames are bitwise those of ``decode``."""
        ...

    def advance(self, latents_BC1hw: Tensor, caches: tuple[Any, ...]) -> tuple[Any, ...]:
        """The caches that ``chunk`` hands on, computed again for ``chunk_backward``, in its number format."""
        ...

    def store(self, caches: tuple[Any, ...]) -> tuple[Any, ...]:
        """Caches as ``chunk`` handed them on -> as they wait for ``chunk_backward``: anything that it and ``chunk``
        take as entering caches."""
        ...

    def chunk_backward(
        self,
        latents_BC1hw: Tensor,
        caches: tuple[Any, ...],
        local: Sequence[int],
        d_made_BtCHW: Tensor,
        d_handed: tuple[Any, ...],
        hands_back: bool,
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """The pull-back of one chunk.

        Args: caches: that entered it, stored. local: the frames of the chunk that have a gradient, as positions in it.
            May be empty. d_made_BtCHW: their gradients, in this order. d_handed: what the next chunk's
            ``chunk_backward`` returned as gradients at the caches, which may be overwritten. Empty: zero. hands_back:
            whether gradients at ``caches`` are wanted.

        Returns: The gradient at the latents (B, C, 1, h, w), and those at the caches in any form that
            ``chunk_backward`` takes as ``d_handed`` (empty if not wanted).
        """
        ...


Velocity = Callable[["Tensor", float, Any], "Tensor"]
"""(latents x_BCFhw, sigma in (0, 1], condition) -> velocity dx/dsigma, the same shape. The LoRA is on."""

Critic = Callable[["Tensor", "Sequence[Sequence[Question]]"], "list[list[Answer]]"]
"""(frames_BTCHW in [0, 1], questions of each clip) -> an answer per clip and question. Differentiable in the frames."""


class Recorder(Protocol):
    """Lets a graded step use what the rollout's own pass at that step computed. See ``memory.recorded_rollout``."""

    def record(self, step: int, conditions: Sequence[Any]) -> AbstractContextManager[None]:
        """Around one step of the rollout: its passes of the velocity with these very conditions are recorded."""
        ...

    def replay(self, step: int, condition: Any) -> AbstractContextManager[None]:
        """Around one graded pass of the velocity: it is taken from the record, if there is one, which is used up by its
        backward."""
        ...


class _NoRecorder:
    def record(self, step: int, conditions: Sequence[Any]) -> AbstractContextManager[None]:
        return nullcontext()

    def replay(self, step: int, condition: Any) -> AbstractContextManager[None]:
        return nullcontext()


def _no_stage(name: str) -> AbstractContextManager[Any]:
    return nullcontext()


@dataclass(frozen=True)
class Parts:
    """The models of a step, as callables. ``method/`` knows nothing else of them."""

    velocity: Velocity
    decoder: Decoder
    critic: Critic
    lora: Sequence[Tensor]
    """The trainable tensors: their ``.grad`` is what a step adds to."""
    stage: Callable[[str], AbstractContextManager[Any]] = field(default=_no_stage)
    """Entered around each stage (``rollout``, ``decode``, ``critic``, ``vae_backward``, ``denoise_backward``):
    residency, peak meter, clock."""
    recorder: Recorder = field(default_factory=_NoRecorder)
    """By default every graded step runs its own forward."""


@dataclass(slots=True)
class StepStats:
    """What one step reports."""

    reward: float
    """Mean over clips of the weighted mean over questions."""
    reward_by_aspect: dict[str, float]
    reward_by_question: dict[str, float]
    """Keyed by ``Question.name``, mean over clips."""
    latents_BCFhw: Tensor
    """The rollout's end: for monitors (velocity norm, samples). No gradient."""
    frames_BTCHW: Tensor
    """The frames the critic saw. No gradient."""
