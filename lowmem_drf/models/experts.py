"""Generators with two transformers (Wan2.2-T2V-A14B): one expert for high noise, one for low. A LoRA trains one of
them.

As in ``WanPipeline`` of diffusers 0.42.1, subfolder ``transformer`` denoises at timesteps of at least
``boundary_ratio`` times 1000, and ``transformer_2`` below; the ratio is in ``model_index.json``. That pipeline accepts
a guidance scale for each (Wan's own configuration: 4 and 3); here, as there with one scale, ``sampler.guidance`` holds
for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from lowmem_drf.errors import BadInputError
from lowmem_drf.method.schedule import TRAIN_TIMESTEPS, choose_graded, flow_sigmas, timestep_of
from lowmem_drf.models.weights.files import SECOND

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem_drf.models.generators import GeneratorConfig
    from lowmem_drf.schema import Config
    from lowmem_drf.types import Velocity

Expert = Literal["high", "low"]


@dataclass(frozen=True)
class OtherExpert:
    """The frozen transformer next to the trained one."""

    transformer: Any
    boundary: float
    """``boundary_ratio``."""


def expert_at(sigma: float, boundary: float) -> Expert:
    """The expert that denoises at this sigma."""
    return "high" if timestep_of(sigma) >= boundary * TRAIN_TIMESTEPS else "low"


def subfolders_of(generator: GeneratorConfig, expert: Expert) -> tuple[str, str | None]:
    """The subfolders (and fields of ``GeneratorConfig``) of the trained transformer and of the other one, if there is
    one."""
    if generator.boundary is None:
        return "transformer", None
    return (SECOND, "transformer") if expert == "low" else ("transformer", SECOND)


def make_transformers(
    generator: GeneratorConfig, config: Config, make: Callable[[str], Any]
) -> tuple[Any, OtherExpert | None]:
    """The trained transformer, and the other one, if there is one. ``make`` builds one from the name of its
    subfolder."""
    trained, frozen = subfolders_of(generator, config.model.expert)
    transformer = make(trained)
    return transformer, OtherExpert(make(frozen), generator.boundary) if frozen and generator.boundary else None


def two_experts(
    trained: Velocity,
    frozen: Velocity,
    expert: Expert,
    boundary: float,
    turn: Callable[[Literal["transformer", "expert"]], None],
) -> Velocity:
    """Both as one velocity, differentiable at the trained expert's steps.

    Args:
        expert: which of the two is trained.
        turn: called before each pass with ``"transformer"`` for the trained one or ``"expert"``; it may wake one and
            park the other.

    The velocity raises ValueError if the frozen one is called with gradient; ``require_expert`` excludes such graded
    steps.
    """

    def velocity(x_BCFhw: Tensor, sigma: float, cond: Any) -> Tensor:
        if expert_at(sigma, boundary) == expert:
            turn("transformer")
            return trained(x_BCFhw, sigma, cond)
        if torch.is_grad_enabled():
            raise ValueError(
                f"a step at sigma {sigma} is not that of the trained expert ({expert}), so it carries no gradient"
            )
        turn("expert")
        return frozen(x_BCFhw, sigma, cond)

    return velocity


def boundary_after(sigmas: Sequence[float], steps: int) -> float:
    """A boundary that gives a sampler's first ``steps`` steps to the high-noise expert and the others to the low-noise
    one."""
    return timestep_of(sigmas[steps - 1]) / TRAIN_TIMESTEPS if steps else 1.0


def require_expert(config: Config, generator: GeneratorConfig) -> None:
    """Checks the settings against the generator's transformers, before anything is loaded.

    Raises:
        BadInputError: ``model.expert`` with one transformer; with two: a graded step of the other expert, randomly
            chosen steps, a file for one transformer, or ZeRO-3.
    """
    model, sampler = config.model, config.sampler
    if generator.boundary is None:
        if model.expert != "low":
            raise BadInputError(
                f'model.expert = "{model.expert}": {model.id} has one transformer, and it is trained. '
                "Leave model.expert out."
            )
        return
    if config.engine == "zero3":
        raise BadInputError(
            f'engine = "zero3" partitions one transformer, and {model.id} has two. '
            'engine = "zero1" with memory.stream = ["transformer"] streams both.'
        )
    for key, value in (("transformer", model.transformer), ("base_lora", model.base_lora)):
        if value:
            raise BadInputError(
                f"model.{key} is a file for one transformer, and {model.id} has two. Give a folder that holds both."
            )
    if sampler.graded == "random":
        raise BadInputError(
            f'sampler.graded = "random": {model.id} has two transformers and one is trained, so graded steps must be '
            'its own. Set sampler.graded to "tail" or to a list of steps.'
        )
    sigmas = flow_sigmas(sampler.steps, sampler.shift, sampler.timesteps).tolist()[:-1]
    turns = [expert_at(sigma, generator.boundary) for sigma in sigmas]
    graded = choose_graded(sampler.graded, sampler.steps, sampler.graded_steps)
    if all(turns[step] == model.expert for step in graded):
        return
    raise BadInputError(
        f"sampler.steps = {sampler.steps} and sampler.shift = {sampler.shift:g}: the high-noise transformer of "
        f"{model.id} denoises {_steps(turns, 'high')}, the low-noise one {_steps(turns, 'low')}. "
        f'Graded are {", ".join(map(str, graded))}, and model.expert = "{model.expert}" is to be trained.\n'
        + _cure(turns, graded, model.expert)
    )


def _steps(turns: Sequence[Expert], expert: Expert) -> str:
    """An expert's steps, which are consecutive, in words."""
    own = [step for step, turn in enumerate(turns) if turn == expert]
    return "no step" if not own else f"step {own[0]}" if len(own) == 1 else f"steps {own[0]} to {own[-1]}"


def _cure(turns: Sequence[Expert], graded: Sequence[int], expert: Expert) -> str:
    own = [step for step, turn in enumerate(turns) if turn == expert][-len(graded) :]
    ways = []
    if own:
        steps = f" -s sampler.graded_steps={len(own)}" if len(own) != len(graded) else ""
        ways.append(f"-s 'sampler.graded={own}'{steps}")
    if all(turns[step] != expert for step in graded):
        ways.append(f"-s model.expert={'high' if expert == 'low' else 'low'}")
    return f"Set {', or '.join(ways)}." if ways else "Set another sampler.shift, or more sampler.steps."
