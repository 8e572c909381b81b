"""What the plan leaves out of an update because it only repeats, and how its figures are scaled up again."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lowmem_drf.method.schedule import flow_sigmas
from lowmem_drf.models.wan.experts import boundary_after
from lowmem_drf.planner.cards import GIB, Card
from lowmem_drf.planner.stages import ONCE, STAGES, SUMS, Plan, StagePlan
from lowmem_drf.schema import Config

if TYPE_CHECKING:
    from lowmem_drf.models.generators import GeneratorConfig


def shortened(config: Config, graded: int) -> Config:
    """The same update with so many steps graded at most, one ungraded one before them if there is any (after those of
    an expert for high noise), and one micro-batch."""
    sampler = config.sampler
    graded = min(graded, sampler.graded_steps)
    steps = graded + (sampler.steps > sampler.graded_steps)
    places: str | list[int] = "last" if graded == 1 else "tail"
    if config.model.expert == "high":
        places = list(range(graded))
    short = sampler.model_copy(update={"steps": steps, "graded_steps": graded, "graded": places})
    return one_micro_batch(config.model_copy(update={"sampler": short}))


def boundary_moved(generator: GeneratorConfig, short: Config) -> GeneratorConfig:
    """Of two experts: so that the steps graded in the shortened sampler are the trained one's, and the one before
    (after, with that for high noise) is not."""
    if generator.boundary is None:
        return generator
    sampler = short.sampler
    high = sampler.graded_steps if short.model.expert == "high" else sampler.steps - sampler.graded_steps
    return replace(generator, boundary=boundary_after(flow_sigmas(sampler.steps, sampler.shift).tolist(), high))


def one_micro_batch(config: Config) -> Config:
    """The configuration of an update of one micro-batch: it has the peak of every other."""
    return config.model_copy(update={"batch": config.micro_batch})


def of_one_process(config: Config) -> Config:
    """What one of the processes does of an update. How many they are stays in it."""
    batch = config.batch // config.processes
    return config.model_copy(update={"batch": batch, "micro_batch": min(config.micro_batch, batch)})


def with_records(
    config: Config, short: Config, stages: dict[str, StagePlan], step_bytes: int, card: Card
) -> dict[str, StagePlan]:
    """The host memory of the graded steps that ``shortened`` left out, and their copies, but none for a rollout's other
    steps, to which ``scaled`` would stretch them. What is waited for is stretched all the same: it is not known whose
    copies it was."""
    left_out = config.sampler.graded_steps - short.sampler.graded_steps
    more = {
        name: replace(stage, host_gib=stage.host_gib + left_out * step_bytes / GIB)
        for name, stage in stages.items()
        if name not in ONCE
    }
    if "rollout" in more:
        stage, repeats = more["rollout"], config.sampler.steps / short.sampler.steps
        copied = (config.sampler.graded_steps / repeats - short.sampler.graded_steps) * step_bytes
        more["rollout"] = replace(
            stage, copy_s=stage.copy_s + copied / (card.link * 1e9), moved_gib=stage.moved_gib + copied / GIB
        )
    return stages | more


def scaled(config: Config, short: Config, stages: dict[str, StagePlan], card: Card, vram_gib: float) -> Plan:
    """Undoes ``shortened`` in the seconds and the operations."""
    batches = -(-config.batch // config.micro_batch)
    sampler, done = config.sampler, short.sampler
    repeats = {"rollout": sampler.steps / done.steps, "denoise_backward": sampler.graded_steps / done.graded_steps}
    rows = {}
    for name in (name for name in STAGES if name in stages):
        factor = 1.0 if name in ONCE else batches * repeats.get(name, 1.0)
        rows[name] = replace(stages[name], **{key: getattr(stages[name], key) * factor for key in SUMS})
    rollout = config.zero.rollout if config.engine == "zero3" and config.zero.rollout != "auto" else None
    return Plan(
        card.name,
        vram_gib,
        rows,
        sum(stage.s for name, stage in rows.items() if name != "text"),
        processes=config.processes,
        rollout=rollout,
    )
