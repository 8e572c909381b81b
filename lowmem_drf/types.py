"""Shared types, and the legend of shape letters.

Shape letters, used as name suffixes at interfaces (``frames_BTCHW``):

    B  clips of an update           T  pixel frames            H W  pixels, height and width
    C  channels                     F  latent frames           h w  latent height and width
    N  denoising steps              K  graded steps            V    vocabulary of the critic
    L  tokens of a text             A  tokens of an answer

Pixel frames are in [0, 1] where a name ends in ``_BTCHW`` or ``_TCHW``; the VAE's own range [-1, 1] does not leave
``models/wan/vae/decoder.py`` and ``models/wan/images.py``. Latents are the transformer's (normalised by the VAE's mean
and standard deviation).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Aspect = Literal["TA", "Phy", "VQ"]
"""TA: text-video alignment. Phy: physical fidelity. VQ: visual quality."""

Kind = Literal["yesno", "dense"]

OnUpdate = Callable[[Mapping[str, Any]], object]
"""Called after each update of a run with its line of ``metrics.jsonl``. If it returns ``False``, the run ends."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a clip."""

    aspect: str
    """An ``Aspect``; for ``scalar`` the name of the reward."""
    text: str
    """``scalar``: the prompt."""
    answer: str
    """The wanted answer: ``"yes"`` or ``"no"`` for ``yesno``, the reference explanation for ``dense``, empty for
    ``scalar``."""
    kind: Kind | Literal["scalar"] = "yesno"
    """``scalar`` is asked of another reward than the critic's: ``Scalar`` is its answer."""
    weight: float = 1.0
    name: str = ""
    """Short key for metrics (``color``, ``jump``). Empty: the aspect is the key."""
    token_weights: tuple[float, ...] = ()
    """``dense``: weight of each answer token in the reward, as the critic's tokenizer splits it. Empty: all equal."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line of a prompt file."""

    id: str
    text: str
    questions: tuple[Question, ...] = ()
    """The user's questions. Empty: they are made from ``text``."""
    reference_video: str | None = None
    image: str | None = field(default=None, repr=False)
    """File of the image with which the clip begins. Not in the ``repr``, which runs are resumed by
    (``prompts.fingerprint``)."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The critic's answer to one question about one clip."""

    logits_AV: Tensor
    """fp32 logits at the positions that predict the wanted answer's tokens; A = 1 for ``yesno``."""
    target_A: Tensor
    """int64 token ids of the wanted answer. ``yesno``: of its first casing; ``yes`` and ``no`` hold all casings."""
    yes: tuple[int, ...] = ()
    no: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Scalar:
    """The value of a scalar reward for one clip: the higher the better."""

    value: Tensor
    """(), fp32 or fp64."""


ScalarReward = Callable[["Tensor", "Sequence[str]"], "Tensor"]
"""(frames_BTCHW in [0, 1], the prompt of each clip) -> values (B,), fp32 or fp64. Differentiable in the frames."""


class Decoder(Protocol):
    """A video VAE decoder. A chunk is one latent frame and the pixel frames it makes, or a ``group`` of them, or the
    whole clip (``causal``).

    Entering caches in a list are given away: ``chunk`` and ``advance`` may empty it while they work. A trace is what a
    chunk's backward needs of its forward.
    """

    temporal_factor: int
    """Pixel frames per latent frame (4 for Wan). The first latent frame makes one pixel frame."""
    causal: bool
    """Whether frames depend on earlier latents alone. If not, the one chunk is the whole clip, and there are no caches:
    read F for 1 in the shapes below."""
    group: int
    """Latent frames of a chunk. Above 1, the first chunk has one more (``method/frames.py``)."""

    def decode(self, latents_BCFhw: Tensor) -> Tensor:
        """All frames at once, as the model library makes them: (B, T, C, H, W) in [0, 1]. Differentiable."""
        ...

    def start(self, batch: int) -> tuple[Any, ...]:
        """The caches that enter the first chunk: tensors and ``None``."""
        ...

    def chunk(self, latents_BC1hw: Tensor, caches: Sequence[Any]) -> tuple[Tensor, tuple[Any, ...]]:
        """Latent frame and entering caches -> frames (B, t, C, H, W) in [0, 1] and the caches handed on. Pure and
        differentiable in both; the frames are bitwise those of ``decode``."""
        ...

    def recorded_chunk(self, latents_BC1hw: Tensor, caches: Sequence[Any]) -> tuple[Tensor, tuple[Any, ...], Any]:
        """As ``chunk``, without gradient; and the chunk's trace, in host memory."""
        ...

    def advance(
        self, latents_BC1hw: Tensor, caches: Sequence[Any], keep: Literal["nothing", "trace", "last"]
    ) -> tuple[tuple[Any, ...], Any]:
        """The caches that ``chunk`` hands on, recomputed for ``chunk_backward``, in the dtype of the gradient; and the
        chunk's trace, in host memory.

        ``keep``: with ``"nothing"`` there is no trace. ``"last"``: the chunk's backward follows at once, the trace may
        be on the card, and the caches handed on are not needed.
        """
        ...

    def store(self, caches: tuple[Any, ...]) -> tuple[Any, ...]:
        """The form in which caches from ``chunk`` wait for ``advance``."""
        ...

    def chunk_backward(
        self,
        latents_BC1hw: Tensor,
        trace: Any,
        local: Sequence[int],
        d_made_BtCHW: Tensor,
        d_handed: tuple[Any, ...],
        hands_back: bool,
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Vector-Jacobian product of one chunk.

        Args:
            trace: of the chunk; used up.
            local: positions in the chunk of the frames that have a gradient. May be empty.
            d_made_BtCHW: gradients of these frames.
            d_handed: the cache gradients that the next chunk's ``chunk_backward`` returned; may be overwritten. Empty:
                zero.
            hands_back: whether gradients at the entering caches are wanted.

        Returns:
            The gradient at the latents (B, C, 1, h, w), and those at the caches, in any form that ``chunk_backward``
            takes as ``d_handed`` (empty if not wanted).
        """
        ...


Velocity = Callable[["Tensor", float, Any], "Tensor"]
"""(latents x_BCFhw, sigma in (0, 1], condition) -> velocity dx/dsigma, same shape, with the LoRA applied."""

Critic = Callable[["Tensor", "Sequence[Sequence[Question]]"], "Sequence[Sequence[Answer | Scalar]]"]
"""(frames_BTCHW in [0, 1], questions of each clip) -> an answer per clip and question. Differentiable in the frames."""


class Recorder(Protocol):
    """Lets graded steps reuse the rollout's passes. See ``memory.recorded_rollout``."""

    def record(self, step: int, conditions: Sequence[Any]) -> AbstractContextManager[None]:
        """Wraps a step of the rollout: velocity passes with these very condition objects are recorded."""
        ...

    def replay(self, step: int, condition: Any, again: bool = False) -> AbstractContextManager[None]:
        """Wraps a graded velocity pass: it is taken from its record, if there is one. Its backward uses the record up,
        unless it is to be replayed ``again``."""
        ...


class _NoRecorder:
    def record(self, step: int, conditions: Sequence[Any]) -> AbstractContextManager[None]:
        return nullcontext()

    def replay(self, step: int, condition: Any, again: bool = False) -> AbstractContextManager[None]:
        return nullcontext()


@dataclass(frozen=True)
class Parts:
    """The models of a step, as callables: all that ``method/`` knows of them."""

    velocity: Velocity
    decoder: Decoder
    critic: Critic
    lora: Sequence[Tensor]
    """The trainable tensors; a step adds to their ``.grad``."""
    stage: Callable[[str], AbstractContextManager[Any]] = nullcontext
    """Wraps each stage (``rollout``, ``decode``, ``critic``, ``vae_backward``, ``denoise_backward``): residency, peak
    meter, clock."""
    recorder: Recorder = field(default_factory=_NoRecorder)
    """By default every graded step runs its own forward."""
    compared: Decoder | None = None
    """A decoder whose gradient at the latents is only compared with that of ``decoder`` (``StepStats.compared``)."""
    same_frames: bool = False
    """``compared`` makes the frames that ``decoder`` makes."""
    base: Velocity | None = None
    """The velocity without the LoRA, which ``StepSpec.anchor`` needs. Called without gradient."""


@dataclass(frozen=True, slots=True)
class Compared:
    """Inner products of two gradients, that by ``Parts.decoder`` and that by ``Parts.compared``. They add up over parts
    of a batch."""

    own: float
    both: float
    other: float

    def __add__(self, more: Compared) -> Compared:
        return Compared(self.own + more.own, self.both + more.both, self.other + more.other)

    @property
    def cosine(self) -> float | None:
        """0 if a gradient is NaN or infinite, or the other one zero; ``None`` if both are: nothing was compared."""
        if self.own == self.other == 0:
            return None
        size = self.own * self.other
        return self.both / size**0.5 if 0 < size < float("inf") else 0.0


@dataclass(slots=True)
class StepStats:
    """Statistics of one step."""

    reward: float
    """Mean over clips of the weighted mean over questions."""
    reward_by_aspect: dict[str, float]
    reward_by_question: dict[str, float]
    """Keyed by ``Question.name``, mean over clips."""
    latents_BCFhw: Tensor
    """End of the rollout, for monitors (velocity norm, samples). No gradient."""
    frames_BTCHW: Tensor
    """The frames the critic saw. No gradient."""
    compared: Compared | None = None
    """With ``Parts.compared``."""
    departure: float | None = None
    """With ``StepSpec.anchor``: mean square of the tuned less the base's velocity, on the states of this step."""
