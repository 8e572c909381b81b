"""The noise levels of generators that were trained by discrete diffusion, in the terms of flow matching.

Such a model sees x = alpha x_0 + s eps, alpha^2 + s^2 = 1, at integer timesteps. With y = x / (alpha + s) and
sigma = s / (alpha + s) that is y = (1 - sigma) x_0 + sigma eps: flow matching. A step of DDIM without noise (arXiv
2010.02502, eq. 12) is then exactly an Euler step of y along eps - x_0.
"""

from __future__ import annotations

from functools import cache
from math import sqrt

TRAINING_TIMESTEPS = 1000
"""Of the training."""
_BETAS = (0.00085, 0.012)
"""``beta_start`` and ``beta_end`` of ``CogVideoXDDIMScheduler`` in diffusers, whose betas are ``scaled_linear``."""


@cache
def diffusion_sigmas(snr_shift: float) -> tuple[float, ...]:
    """Sigma of each training timestep, rising, the last one 1. As ``CogVideoXDDIMScheduler`` of diffusers 0.42.1 with
    ``rescale_betas_zero_snr`` and ``snr_shift_scale`` = ``snr_shift``."""
    low, high = map(sqrt, _BETAS)
    product, alphas = 1.0, []
    for timestep in range(TRAINING_TIMESTEPS):
        product *= 1 - (low + (high - low) * timestep / (TRAINING_TIMESTEPS - 1)) ** 2
        alphas.append(sqrt(product / (snr_shift + (1 - snr_shift) * product)))
    first, last = alphas[0], alphas[-1]
    alphas = [(alpha - last) * first / (first - last) for alpha in alphas]
    return tuple(s / (alpha + s) for alpha in alphas for s in [sqrt(1 - alpha * alpha)])


def ddim_levels(snr_shift: float, steps: int) -> list[float]:
    """1000 sigma of each step of the same scheduler with ``timestep_spacing = "trailing"``, falling: a default of
    ``sampler.timesteps``. Where ``steps`` does not divide 1000, diffusers takes a step to another level than the one
    from which it takes the next; here they are one."""
    sigmas = diffusion_sigmas(snr_shift)
    return [1000 * sigmas[round(TRAINING_TIMESTEPS - TRAINING_TIMESTEPS / steps * step) - 1] for step in range(steps)]
