"""A LoRA that is used at low noise alone (``lora.max_sigma``): at higher levels the model is its base.

The first denoising steps decide where things are, the later ones what they are. What the first decide stays as various
as the base's where the LoRA is off, as with guidance in a limited interval (arXiv 2404.07724).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowmem_drf.errors import BadInputError
from lowmem_drf.method.schedule import flow_sigmas
from lowmem_drf.models.lora.adapter import lora_scale

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem_drf.schema import Config
    from lowmem_drf.types import Velocity


def first_step(config: Config) -> int:
    """The first denoising step that the LoRA is used in; ``sampler.steps`` if there is none."""
    sampler = config.sampler
    sigmas = flow_sigmas(sampler.steps, sampler.shift, sampler.timesteps).tolist()[:-1]
    return sum(sigma > config.lora.max_sigma for sigma in sigmas)


def require_use(config: Config) -> None:
    """Raises BadInputError where no denoising step is at or below ``lora.max_sigma``."""
    sampler = config.sampler
    if first_step(config) < sampler.steps:
        return
    lowest = flow_sigmas(sampler.steps, sampler.shift, sampler.timesteps)[-2].item()
    raise BadInputError(
        f"lora.max_sigma = {config.lora.max_sigma:g}: the LoRA would be used in no denoising step (sampler.steps = "
        f"{sampler.steps}; the last one is at sigma {lowest:.3g}). Raise it, or take more sampler.steps."
    )


def up_to(max_sigma: float, velocity: Velocity, transformer: Any) -> Velocity:
    """``velocity`` with the transformer's LoRA at levels up to ``max_sigma``, and without it above. To be called
    without gradient."""
    if max_sigma >= 1:
        return velocity

    def limited(x_BCFhw: Tensor, sigma: float, cond: Any) -> Tensor:
        if sigma <= max_sigma:
            return velocity(x_BCFhw, sigma, cond)
        with lora_scale(transformer, 0.0):
            return velocity(x_BCFhw, sigma, cond)

    return limited
