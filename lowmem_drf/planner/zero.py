"""Stand-ins for DeepSpeed in a plan: it cannot run on tensors without values.

``PlannedZero3`` counts partitioned weights: each process's part, space on the card for gathered weights, and the
traffic of the gathers. The space holds the block that computes and the next one; with several processes one more,
because DeepSpeed frees a gather's buffer only after all tensors in it were used. The rest is the plan of one card.
Prefetch buckets and tensors that stay whole are not modelled: a plan that did, checked block by block against DeepSpeed
0.19.8, gave peaks within 10% of these (docs/decisions.md).

``PlannedTrainer`` counts the training state of the LoRA, after DeepSpeed 0.19.8 (``runtime/zero/stage3.py``,
``stage_1_and_2.py``). It counts the averaging of gradients in the stage ``update``; a run averages before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowmem_drf.assembly.assemble import Models
from lowmem_drf.distributed.zero import REDUCE_BUCKET
from lowmem_drf.models.generators import blocks_of
from lowmem_drf.models.lora.adapter import named_lora
from lowmem_drf.planner.cards import GIB, Card
from lowmem_drf.planner.ledger import Ledger
from lowmem_drf.planner.stages import StagePlan
from lowmem_drf.schema import Config
from lowmem_drf.training.trainer import SingleTrainer, Trainer
from lowmem_drf.types import Parts

if TYPE_CHECKING:
    from lowmem_drf.planner.stand_ins import PlanMeter


class PlannedZero3:
    """A model's weights under ZeRO-3. None of them counts on the card any more.

    Args:
        model: with its LoRA, if any.
        blocks: submodules that are gathered whole. All others are gathered one by one.
        stages: the stages that call the model.
        gathered: the model stays gathered during the rollout.
        planned_share: the share of the rollout's steps that is planned; traffic is scaled up by its inverse later.
    """

    def __init__(
        self, config: Config, ledger: Ledger, card: Card, model: nn.Module, blocks: Sequence[nn.Module],
        stages: Sequence[str], gathered: bool = False, planned_share: float = 1.0,
    ) -> None:  # fmt: skip
        self._ledger, self._rate, self._stages = ledger, card.link * 1e9, stages
        self._gathered, self._planned_share = gathered, planned_share
        self._ranks, self._offloaded = config.processes, config.zero.offload != "none"
        self._pinned = self._offloaded and config.zero.pin_memory
        leaves = {id(block) for block in blocks}
        inside = {id(part) for block in blocks for part in block.modules()} - leaves
        seen: set[Tensor] = set()
        sizes: list[int] = []  # bytes that are gathered together, in the order of use
        for part in (part for part in model.modules() if id(part) not in inside):
            unit = [one for one in part.parameters(recurse=id(part) in leaves) if one not in seen]
            sizes.append(sum(one.nbytes for one in unit))
            seen.update(unit)
        self._whole, self._blocks = sum(sizes), sum(one.nbytes for block in blocks for one in block.parameters())
        two = max(first + second for first, second in pairwise([0, *sizes]))
        self._space = two + (max(sizes) if self._ranks > 1 else 0)
        self._passing = 0  # bytes of weights that the passes of this stage gather
        with ledger.off_the_clock("partitioned weights"):
            self._parts = torch.empty(sum(self._part(one) for one in seen if not one.requires_grad), dtype=torch.uint8)
        if self._offloaded:
            ledger.on_host(self._parts)
        for one in seen:
            ledger.leave_out(one)

    def called(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Counts ``function``, a pass of the model. A forward gathers all weights, its backward the blocks' again."""

        def call(*inputs: Any) -> Any:
            self._passing += self._whole + (self._blocks if torch.is_grad_enabled() else 0)
            return function(*inputs)

        return call

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Reserves space on the card for gathered weights while the stage runs."""
        self._passing, space = 0, self._whole if self._stays(name) else self._space * (name in self._stages)
        with self._ledger.off_the_clock("gathered weights"):
            held = torch.empty(space, dtype=torch.uint8)
        yield
        del held

    def with_gathers(self, name: str, stage: StagePlan) -> StagePlan:
        """Adds the stage's gathers. They overlap with computation and share the link with the other copies.

        A process copies its part from the host and gets the others' through the host, because consumer cards have no
        peer access. It sends as much as it receives (a ring, as in NCCL).
        """
        moved = self._whole * self._planned_share if self._stays(name) else float(self._passing)
        if name not in self._stages or not moved:
            return stage
        own, others = moved / self._ranks * self._offloaded, moved / self._ranks * (self._ranks - 1)
        stalled = max(0.0, stage.copy_s - stage.stall_s + (own + others) / self._rate - (stage.s - stage.stall_s))
        return replace(
            stage,
            s=stage.s + stalled,
            stall_s=stage.stall_s + stalled,
            copy_s=stage.copy_s + (own + 2 * others) / self._rate,
            moved_gib=stage.moved_gib + (own + 2 * others) / GIB,
            between_gib=stage.between_gib + 2 * others / GIB,
        )

    def _stays(self, name: str) -> bool:
        return self._gathered and name == "rollout"

    def _part(self, tensor: Tensor) -> int:
        """Bytes of a process's part. PyTorch's allocator rounds each pinned part up to a power of two."""
        nbytes = -(-tensor.numel() // self._ranks) * tensor.element_size()
        return 2 ** (nbytes - 1).bit_length() if self._pinned else nbytes


class PlannedTrainer:
    """A ``training.trainer.Trainer`` with DeepSpeed's bytes of training state and the traffic of its steps."""

    def __init__(self, config: Config, ledger: Ledger, lora: Mapping[str, Tensor]) -> None:
        self._ledger, self._lora, self._ranks = ledger, list(lora.values()), config.processes
        self._part = sum(-(-tensor.numel() // self._ranks) for tensor in self._lora)
        self._offloaded, self._gathers = config.zero.offload != "none", config.engine != "zero3"
        largest = max(tensor.numel() for tensor in self._lora) if self._gathers and self._offloaded else 0
        # On the host: AdamW's weights, gradients and moments, a copy of the weights for the card, and a gradient buffer
        # (stage 3: for all; stages 1 and 2: for the largest, also on the card). On the card: no second copy of weights.
        state = self._part * (5 if self._gathers else 6) + largest if self._offloaded else 4 * self._part
        with ledger.off_the_clock("the LoRA's training state"):
            self._bucket, self._state = torch.empty(REDUCE_BUCKET + largest), torch.empty(state)
        if self._offloaded:
            ledger.on_host(self._state)

    def accumulate(self) -> AbstractContextManager[None]:
        return nullcontext()

    def step(self, lr: float) -> float:
        """Returns 0, because there is no gradient."""
        ledger, others = self._ledger, self._part * 4 * (self._ranks - 1)
        with ledger.off_the_clock("gradients by process"):
            sorted_ = torch.empty(min(REDUCE_BUCKET, sum(tensor.numel() for tensor in self._lora)))
        ledger.wait(ledger.link.exchange(ledger.seconds, others, 0.0))
        del sorted_
        for tensor in self._lora:
            tensor.grad = None
        if self._offloaded:
            written, _ = ledger.link.send(ledger.seconds, self._part * 4)
            ledger.wait(ledger.link.fetch(ledger.seconds, self._part * 4 if self._gathers else 0, written))
        ledger.wait(ledger.link.exchange(ledger.seconds, others if self._gathers else 0, 0.0))
        return 0.0

    def finite(self) -> bool:
        return True

    whole = accumulate

    def pack(self) -> dict[str, Tensor]:
        raise ValueError("a plan writes no checkpoint")

    def unpack(self, packed: Mapping[str, Tensor]) -> None:
        raise ValueError("a plan reads no checkpoint")


def partitioned(
    config: Config, short: Config, card: Card, ledger: Ledger, models: Models, parts: Parts, meter: PlanMeter
) -> Parts:
    """The parts of a step with weights partitioned as ZeRO-3 does it."""
    if config.engine != "zero3":
        return parts
    transformer, stages = models.transformer, ("rollout", "denoise_backward")
    gathered, planned_share = config.zero.rollout == "gathered", short.sampler.steps / config.sampler.steps
    trained = PlannedZero3(config, ledger, card, transformer, blocks_of(transformer), stages, gathered, planned_share)
    meter.partitioned = [trained]
    parts = replace(parts, velocity=trained.called(parts.velocity))
    if not config.zero.critic:
        return parts
    critic = PlannedZero3(config, ledger, card, models.asked_critic.model, models.asked_critic.leaves, ("critic",))
    meter.partitioned.append(critic)
    return replace(parts, critic=critic.called(parts.critic))


def planned_trainer(config: Config, ledger: Ledger, models: Models) -> Trainer:
    """A trainer that already holds its optimizer state."""
    lora = named_lora(models.transformer)
    if config.engine != "single":
        return PlannedTrainer(config, ledger, lora)
    trainer = SingleTrainer(config, lora)
    trainer.fill()
    for moment in trainer.paged():
        ledger.on_host(moment)
    return trainer
