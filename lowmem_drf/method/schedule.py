"""The sampler: sigmas, noise, guidance, the two updates and the choice of graded steps.

Flow matching: x_sigma = (1 - sigma) x_0 + sigma eps, velocity v = dx/dsigma = eps - x_0, sigma from 1 (noise) to 0
(clip). Step k of N goes from ``sigmas[k]`` to ``sigmas[k + 1]``: along the velocity (``euler``), or to the clip that
it predicts and from there back to ``sigmas[k + 1]`` with fresh noise (``renoise``, as generators of few steps are
distilled). Both are linear in x and v. There are no higher-order solvers: their updates depend on earlier velocities,
so the gradient of a graded step would not be one pass through one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from lowmem_drf.errors import BadInputError

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from lowmem_drf.types import Velocity

Update = Literal["euler", "renoise"]
GuidanceGrad = Literal["cond", "both"]
"""Gradient of a guided step: through the conditional pass alone, or through both passes."""


TRAIN_TIMESTEPS = 1000
"""Noise levels that flow-matching models are trained with; a timestep is sigma times this."""


def timestep_of(sigma: float) -> int:
    """The integer timestep of diffusers' UniPC for ``sigma`` in (0, 1]: it truncates 1000 sigma to an int64."""
    return int(sigma * TRAIN_TIMESTEPS)


def flow_sigmas(steps: int, shift: float, timesteps: Sequence[float] = ()) -> Tensor:
    """Noise levels of the sampler, fp64, shape (steps + 1,), falling to exactly 0.

    With ``timesteps`` these are the levels, and ``steps`` and ``shift`` are not used. Without, they begin at 1 - 1e-6
    and are the grid of diffusers 0.42's ``UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=shift)``, which
    Wan's pipelines ship. With ``solver_order=1`` and ``disable_corrector=list(range(steps))`` (Wan ships it with the
    corrector on) it makes the Euler update below, so ``WanPipeline`` reproduces our clips. Unlike in
    ``FlowMatchEulerDiscreteScheduler`` the last step is not nearly empty, so grading it alone (K = 1) trains something.

    Raises:
        BadInputError: fewer than one step, or a shift that is not positive.
    """
    if len(timesteps):
        return torch.tensor([*timesteps, 0], dtype=torch.float64) / TRAIN_TIMESTEPS
    if steps < 1:
        raise BadInputError(f"sampler.steps is {steps}: the sampler needs at least 1 step")
    if not shift > 0:
        raise BadInputError(f"sampler.shift is {shift}: it must be above 0 (1 is no shift; video models use 3 to 12)")
    unshifted = torch.linspace(1, 1e-3, steps + 1, dtype=torch.float64)[:-1]
    sigmas = shift * unshifted / (1 + (shift - 1) * unshifted)
    sigmas[0] -= 1e-6  # as in UniPC: the log-SNR is infinite at 1
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def euler_step(x_BCFhw: Tensor, velocity_BCFhw: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """x at ``sigma_next``. Linear: d x_next / d x = identity, d x_next / d velocity = sigma_next - sigma."""
    return x_BCFhw + (sigma_next - sigma) * velocity_BCFhw


def advance(
    update: Update,
    x_BCFhw: Tensor,
    velocity_BCFhw: Tensor,
    sigma: float,
    sigma_next: float,
    generators: Sequence[Generator] = (),
) -> Tensor:
    """x at ``sigma_next``. ``generators``: of the noise of ``renoise``, one per clip. The last step draws none."""
    if update == "euler" or sigma_next == 0:
        return euler_step(x_BCFhw, velocity_BCFhw, sigma, sigma_next)
    return renoise(x_BCFhw - sigma * velocity_BCFhw, sigma_next, generators)


def update_factors(update: Update, sigma: float, sigma_next: float) -> tuple[float, float]:
    """(d x_next / d x, d x_next / d velocity) of ``advance``; the noise does not matter to them."""
    if update == "euler":
        return 1.0, sigma_next - sigma
    return 1 - sigma_next, -(1 - sigma_next) * sigma


def draw_noise(shape_CFhw: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """Standard normal fp32 noise (B, C, F, h, w) on the CPU, one generator per clip.

    A clip's noise depends on its own seed only, not on its batch or the device.
    """
    return torch.stack([torch.randn(*shape_CFhw, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def renoise(x_0_BCFhw: Tensor, sigma: float, generators: Sequence[Generator]) -> Tensor:
    """(1 - sigma) x_0 + sigma eps.

    Each clip has its own CPU generator: global random state would break exact resume, and one generator for all would
    make a clip's noise depend on its batch. Raises ValueError where their numbers differ.
    """
    if len(generators) != len(x_0_BCFhw):
        raise ValueError(f"fresh noise needs generators, one per clip: {len(x_0_BCFhw)}, not {len(generators)}")
    eps = torch.stack([torch.randn(x_0_BCFhw.shape[1:], generator=generator) for generator in generators]).to(x_0_BCFhw)
    return (1 - sigma) * x_0_BCFhw + sigma * eps


def choose_graded(mode: str | Sequence[int], steps: int, k: int, generator: Generator | None = None) -> tuple[int, ...]:
    """The steps that carry gradient, ascending.

    Args:
        mode: ``"tail"``: the last ``k``. ``"last"``: the last one. ``"random"``: ``k`` different steps, drawn from
            ``generator`` in every call. Or a list of steps; negative ones count from the end. ``"last"`` and a list
            ignore ``k``.

    Raises:
        BadInputError: an unknown mode, ``k`` not in 1..steps, a listed step out of range.
    """
    if not isinstance(mode, str):
        bad = [i for i in mode if not -steps <= i < steps]
        if bad or not mode:
            raise BadInputError(f"sampler.graded is {list(mode)}: give one step or more, each in 0..{steps - 1}")
        return tuple(sorted({i % steps for i in mode}))
    if mode == "last":
        return (steps - 1,)
    if mode not in ("tail", "random"):
        raise BadInputError(f"sampler.graded is {mode!r}: it must be 'tail', 'last', 'random' or a list of steps")
    if not 1 <= k <= steps:
        raise BadInputError(f"sampler.graded_steps is {k}: it must be in 1..{steps} (sampler.steps is {steps})")
    if mode == "tail":
        return tuple(range(steps - k, steps))
    return tuple(sorted(torch.randperm(steps, generator=generator)[:k].tolist()))


def guided(
    velocity: Velocity, x_BCFhw: Tensor, sigma: float, cond: Any, uncond: Any, scale: float, grad: GuidanceGrad = "cond"
) -> Tensor:
    """Velocity under classifier-free guidance: v_u + scale (v_c - v_u). Scale 1 is no guidance and costs one pass.

    With ``grad="cond"`` v_u is a constant for both the weights and x.
    """
    if scale == 1:
        return velocity(x_BCFhw, sigma, cond)
    with torch.set_grad_enabled(torch.is_grad_enabled() and grad == "both"):
        v_uncond = velocity(x_BCFhw, sigma, uncond)
    return v_uncond + scale * (velocity(x_BCFhw, sigma, cond) - v_uncond)


def gradient_passes(cond: Any, uncond: Any, scale: float, grad: GuidanceGrad) -> tuple[tuple[Any, float], ...]:
    """The transformer passes that carry gradient in a ``guided`` step, each with its factor d v / d v_pass.

    Guidance is linear in its two passes, so a backward can take one after the other and skip a constant one.
    """
    if scale == 1 or grad == "cond":
        return ((cond, scale),)
    return (cond, scale), (uncond, 1 - scale)
