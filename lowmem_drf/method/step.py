"""The relay: one step of Diffusion-DRF in memory that grows neither with the number K of graded steps nor with the
frames.

The graph from reward to LoRA is cut at the kept frames, at the latents, between decode chunks (at the VAE's causal
caches) and between graded steps. Each piece runs forward without gradient first, and is recomputed with gradient when
its cotangent is known: one piece is live at a time. By the chain rule the result is exact: it equals that of
``naive.naive_step``, the same step as one graph. (With guidance both leave out what ``guidance_grad`` leaves out, and
in both the decoder's clamp has the gradient of ``models/clamp.InwardClamp``.)

The caller looks at the LoRA's gradients, clips, runs the optimizer and moves models between devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from lowmem_drf.errors import BadInputError, NonFiniteError
from lowmem_drf.method.finite import Found, look_at, refuse
from lowmem_drf.method.frames import motion_frames
from lowmem_drf.method.reward import RewardSpec, mean_reward
from lowmem_drf.method.schedule import GuidanceGrad, Update, advance, gradient_passes, guided, renoise, update_factors
from lowmem_drf.method.vae_stream import ForBackward, decode, vae_backward
from lowmem_drf.types import Compared, StepStats

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from lowmem_drf.types import Critic, Parts, Question, Velocity


def drf_step(
    parts: Parts,
    spec: StepSpec,
    noise_BCFhw: Tensor,
    cond: Any,
    uncond: Any,
    questions: Sequence[Sequence[Question]],
    generators: Sequence[Generator] = (),
    share: float = 1.0,
    found: Found = refuse,
) -> StepStats:
    """Adds the gradient of -share * reward (mean over clips) to the ``.grad`` of ``parts.lora``.

    Args:
        noise_BCFhw: latents at the first noise level, on the transformer's device, fp32 (or fp64).
        cond, uncond: conditions for ``parts.velocity``; ``uncond`` is not used if ``spec.guidance`` is 1.
        questions: per clip.
        generators: CPU generators of the noise drawn in this step, one per clip; needed for ``renoise`` and with
            ``spec.lv_samples``.
        share: fraction that these clips are of a larger batch.
        found: called with a NonFiniteError for each NaN or infinity in latents, frames, reward, or their gradients. If
            it returns, the step goes on; drop the ``.grad``.

    Returns:
        Statistics of the sampled trajectory. DRaFT-LV's copies count in the gradient, not here.

    Raises:
        NonFiniteError: by default of ``found``. Gradients that earlier pieces added (later steps, other DRaFT-LV
            copies) stay, so drop the ``.grad``.
    """
    with parts.stage("rollout"):
        conditions = [one for one, _ in gradient_passes(cond, uncond, spec.guidance, spec.guidance_grad)]
        record = partial(parts.recorder.record, conditions=conditions)
        x_0, entering = rollout(
            parts.velocity, spec.sigmas, noise_BCFhw, cond, uncond, spec.guidance, spec.graded, record,
            update=spec.update, generators=generators,
        )  # fmt: skip
        trajectories = [(x_0, entering)] + [
            lv_copy(parts.velocity, spec, x_0, cond, uncond, generators) for _ in range(spec.lv_samples)
        ]
        for clean, _ in trajectories:
            look_at(clean, "latents at the end of the rollout", "rollout", found)
    all_stats: list[StepStats] = []
    for x_0, entering in trajectories:
        kept = spec.seen(x_0, parts.decoder.temporal_factor)
        with parts.stage("decode"):
            frames, left = decode(parts.decoder, x_0, kept, spec.vae_window, spec.vae_cache_every, spec.record_decode)
            look_at(frames, "decoded frames", "decode", found)
        with parts.stage("critic"):
            weight = share / len(trajectories)
            stats, d_frames = critic_backward(parts.critic, frames, questions, spec.reward, weight, found)
        with parts.stage("vae_backward"):
            d_x_0 = vae_backward(parts.decoder, x_0, left, d_frames, kept, spec.vae_window, found)
        if parts.compared is not None and not all_stats:
            stats.compared = _compared(parts, spec, x_0, kept, questions, weight, d_frames, d_x_0)
        with parts.stage("denoise_backward"):
            # the anchor is at the clip itself, not at DRaFT-LV's copies
            away = denoise_backward(parts, spec, entering, d_x_0, cond, uncond, found, 0.0 if all_stats else share)
            stats.departure = away if spec.anchor else None
        all_stats.append(replace(stats, latents_BCFhw=x_0))
    return all_stats[0]


@torch.no_grad()
def rollout(
    velocity: Velocity,
    sigmas: Tensor,
    noise_BCFhw: Tensor,
    cond: Any,
    uncond: Any,
    guidance: float = 1.0,
    keep: Collection[int] = (),
    record: Callable[[int], AbstractContextManager[Any]] = nullcontext,
    watch: Callable[[Tensor], object] | None = None,
    update: Update = "euler",
    generators: Sequence[Generator] = (),
) -> tuple[Tensor, dict[int, Tensor]]:
    """All denoising steps, without gradient; also the plain sampler. Each step in ``keep`` runs inside
    ``record(step)``; ``watch`` is called with the velocity of every step.

    Returns:
        The clean latents x_0, and the latents that enter each step in ``keep``.
    """
    levels = sigmas.tolist()
    x, entering = noise_BCFhw, {}
    for k, (sigma, sigma_next) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        if k in keep:
            entering[k] = x
        with record(k) if k in keep else nullcontext():
            v = guided(velocity, x, sigma, cond, uncond, guidance)
        if watch:
            watch(v)
        x = advance(update, x, v, sigma, sigma_next, generators)
    return x, entering


@torch.no_grad()
def lv_copy(
    velocity: Velocity, spec: StepSpec, x_0_BCFhw: Tensor, cond: Any, uncond: Any, generators: Sequence[Generator]
) -> tuple[Tensor, dict[int, Tensor]]:
    """A DRaFT-LV sample: x_0 noised back to the last step's sigma and denoised by that step. Returns as ``rollout``."""
    last = spec.steps - 1
    noised = renoise(x_0_BCFhw, spec.sigmas[last].item(), generators)
    return rollout(velocity, spec.sigmas[last:], noised, cond, uncond, spec.guidance)[0], {last: noised}


def critic_backward(
    critic: Critic,
    frames_BTCHW: Tensor,
    questions: Sequence[Sequence[Question]],
    spec: RewardSpec,
    share: float = 1.0,
    found: Found = refuse,
) -> tuple[StepStats, Tensor]:
    """One pass of the critic. Returns the statistics (without latents) and the gradient of -share * reward at the
    frames."""
    frames = frames_BTCHW.detach().requires_grad_()
    with torch.enable_grad():
        reward, by_aspect, by_question = mean_reward(critic(frames, questions), questions, spec)
    bad = [name for name, value in by_question.items() if not math.isfinite(value)]  # also of questions of weight 0
    if bad or not math.isfinite(reward.item()):
        found(NonFiniteError(f"the reward is {reward.item()} (questions: {_some(bad)})", "critic"))
    (d_frames,) = torch.autograd.grad(reward, frames, torch.full_like(reward, -share))
    look_at(d_frames, "gradients at the frames the critic saw", "critic", found)
    return StepStats(reward.item(), by_aspect, by_question, frames.new_empty(0), frames.detach()), d_frames


def _compared(
    parts: Parts,
    spec: StepSpec,
    x_0_BCFhw: Tensor,
    kept: Sequence[int],
    questions: Sequence[Sequence[Question]],
    share: float,
    d_frames_BTCHW: Tensor,
    d_x_0_BCFhw: Tensor,
) -> Compared:
    """Of the gradients at the latents. The critic sees the compared decoder's frames, as where that decoder is used:
    again, if they are others."""
    other, d_frames = parts.compared, d_frames_BTCHW
    assert other is not None
    if parts.same_frames:
        left = ForBackward(caches={0: other.store(tuple(other.start(len(x_0_BCFhw))))})
    else:
        with parts.stage("decode"):
            frames, left = decode(other, x_0_BCFhw, kept, spec.vae_window, spec.vae_cache_every, spec.record_decode)
        with parts.stage("critic"):
            _, d_frames = critic_backward(parts.critic, frames, questions, spec.reward, share, lambda error: None)
            del frames
    with parts.stage("vae_backward"):
        d_other = vae_backward(other, x_0_BCFhw, left, d_frames, kept, spec.vae_window, lambda error: None)
    own, others = d_x_0_BCFhw.flatten().double(), d_other.flatten().double()
    return Compared(own.dot(own).item(), own.dot(others).item(), others.dot(others).item())


def denoise_backward(
    parts: Parts,
    spec: StepSpec,
    entering: Mapping[int, Tensor],
    d_x_0_BCFhw: Tensor,
    cond: Any,
    uncond: Any,
    found: Found = refuse,
    share: float = 1.0,
) -> float:
    """The graded steps, last to first, one transformer pass at a time; adds to the ``.grad`` of ``parts.lora``.

    A step passes its cotangent on, and to the velocity, each with its factor of ``update_factors``. Ungraded steps only
    pass it on. The anchor's term has the factor ``share``; returns the mean squared difference that it found.
    """
    sigmas, d_x, away = spec.sigmas.tolist(), d_x_0_BCFhw, 0.0
    for k in reversed(range(spec.graded[0], spec.steps)):
        through, to_velocity = update_factors(spec.update, sigmas[k], sigmas[k + 1])
        if k not in spec.graded:
            d_x = through * d_x
            continue
        # nothing trainable precedes the first graded step
        x = entering[k].detach().requires_grad_(spec.chain == "full" and k != spec.graded[0])
        anchored = bool(spec.anchor and share and k in spec.anchored)
        if anchored and x.requires_grad:
            # a backward of its own: the anchor takes the step's input as a constant. Before the step's: that uses the
            # record up
            with torch.enable_grad(), parts.recorder.replay(k, cond, again=True):
                v = parts.velocity(x.detach(), sigmas[k], cond)
            pull, found_away = _pull(parts, spec, k, x, v, cond, share)
            v.backward(pull.to(v.dtype), inputs=list(parts.lora))
            away += found_away
        for condition, factor in gradient_passes(cond, uncond, spec.guidance, spec.guidance_grad):
            with torch.enable_grad(), parts.recorder.replay(k, condition):
                v = parts.velocity(x, sigmas[k], condition)
            d_v = factor * to_velocity * d_x
            if anchored and not x.requires_grad and condition is cond:
                pull, found_away = _pull(parts, spec, k, x, v, cond, share)
                d_v, away = d_v + pull, away + found_away
            v.backward(d_v.to(v.dtype), inputs=[*parts.lora, x] if x.requires_grad else list(parts.lora))
        d_x = through * d_x
        if x.grad is not None:
            d_x = d_x + x.grad
            look_at(d_x, f"gradients at the latents that enter step {k}", "denoise_backward", found)
    return away


def _pull(
    parts: Parts, spec: StepSpec, k: int, x_BCFhw: Tensor, v_BCFhw: Tensor, cond: Any, share: float
) -> tuple[Tensor, float]:
    """The anchor at step k, by a pass without the LoRA: the gradient of share * its term at the velocity, and the mean
    squared difference to the base's velocity, each as part of the mean over anchored steps."""
    assert parts.base is not None
    with torch.no_grad():
        base = parts.base(x_BCFhw.detach(), spec.sigmas[k].item(), cond)
    difference, count = v_BCFhw.detach().to(x_BCFhw.dtype) - base.to(x_BCFhw.dtype), len(spec.anchored)
    gradient = 2 * share * spec.anchor / count / difference.numel() * difference
    if (h := spec.anchor_huber) is not None:
        gradient *= h / (difference.pow(2) + h * h).sqrt()
    return gradient, difference.pow(2).mean().item() / count


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


Chain = Literal["full", "drtune"]


@dataclass(frozen=True)
class StepSpec:
    """Settings of a step. Raises BadInputError where they contradict each other."""

    sigmas: Tensor
    """(N + 1,), see ``schedule.flow_sigmas``."""
    graded: tuple[int, ...]
    """The K steps that carry gradient, ascending. The velocity of any other step is a constant."""
    kept: tuple[int, ...]
    """The pixel frames the critic sees, ascending."""
    follow_motion: bool = False
    """``frames.motion_frames`` chooses the frames, as many as in ``kept``."""
    update: Update = "euler"
    chain: Chain = "full"
    """``full``: the gradient passes through the transformer's input from graded step to graded step. ``drtune`` (arXiv
    2405.00760): it passes through the update's identity alone."""
    guidance: float = 1.0
    guidance_grad: GuidanceGrad = "cond"
    vae_window: int | None = None
    """See ``frames.backward_chunks``. ``None``: exact."""
    vae_cache_every: int = 1
    """Entering caches are stored for every n-th chunk of the VAE backward; the others are recomputed."""
    record_decode: int = 0
    """Of so many chunks of the VAE backward, the last ones, the decode stores what it needs: it then runs no forward of
    its own."""
    anchor: float = 0.0
    """Weight of the mean squared difference between the tuned and the base's velocity, for the same condition, at the
    latents that enter the ``anchored`` steps (a mean over them). These latents count as constants: it says what the
    model is to do there, not how to get away from there. 0: not computed."""
    anchor_huber: float | None = None
    """h, in units of the velocity: in place of the square d^2 of an element stands 2 h (sqrt(d^2 + h^2) - h), the same
    for small d and 2 h |d| for large ones (pseudo-Huber, as arXiv 2310.14189 has it for consistency models). ``None``:
    the square."""
    anchored: tuple[int, ...] = ()
    """Some of the graded steps."""
    lv_samples: int = 0
    """DRaFT-LV: n noised copies of the clip that the last step denoises again; the gradient is the mean over 1 + n.
    Needs the last step to be the only graded step."""
    reward: RewardSpec = field(default_factory=RewardSpec)

    def __post_init__(self) -> None:
        if not self.graded or list(self.graded) != sorted(set(self.graded) & set(range(self.steps))):
            raise BadInputError(
                f"the graded steps are {self.graded}: they must be ascending, in 0..{self.steps - 1}, and at least one"
            )
        if not self.kept or list(self.kept) != sorted(set(self.kept)) or self.kept[0] < 0:
            raise BadInputError(f"the kept frames are {self.kept}: they must be ascending and at least one")
        if self.update not in ("euler", "renoise"):
            raise BadInputError(f"sampler.update is {self.update!r}: it must be 'euler' or 'renoise'")
        if self.chain not in ("full", "drtune"):
            raise BadInputError(f"sampler.chain is {self.chain!r}: it must be 'full' or 'drtune'")
        if self.guidance_grad not in ("cond", "both"):
            raise BadInputError(f"the guidance gradient is {self.guidance_grad!r}: it must be 'cond' or 'both'")
        if self.vae_window is not None and self.vae_window < 0:
            raise BadInputError(f"the VAE window is {self.vae_window}: it must be 0 chunks or more")
        if self.vae_cache_every < 1:
            raise BadInputError(f"vae_cache_every is {self.vae_cache_every}: it must be 1 chunk or more")
        if self.anchor < 0 or (self.anchor and not set(self.graded) >= set(self.anchored) > set()):
            raise BadInputError(
                f"the anchor is {self.anchor} at steps {self.anchored}: it must be 0 or more, at some graded steps"
            )
        if self.anchor_huber is not None and self.anchor_huber <= 0:
            raise BadInputError(f"anchor_huber is {self.anchor_huber}: it must be more than 0, or None")
        if self.lv_samples < 0 or (self.lv_samples and self.graded != (self.steps - 1,)):
            raise BadInputError(f"lv_samples is {self.lv_samples}: it must be 0, or the last step the only graded step")

    @property
    def steps(self) -> int:
        """N."""
        return len(self.sigmas) - 1

    def seen(self, x_0_BCFhw: Tensor, temporal_factor: int) -> tuple[int, ...]:
        """The pixel frames of these clips that the critic sees."""
        if not self.follow_motion:
            return self.kept
        frames = (x_0_BCFhw.shape[2] - 1) * temporal_factor + 1
        return motion_frames(x_0_BCFhw.detach(), frames, len(self.kept), temporal_factor)
