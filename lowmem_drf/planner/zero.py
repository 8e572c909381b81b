"""What a plan puts in the place of DeepSpeed, which cannot run on tensors without values.

``PlannedZero3`` counts partitioned weights: the part that each process keeps, room on the card for what is gathered at
a time, and what the gathers move. The room is for the block that computes and the next one; with several processes for
one more, as DeepSpeed frees the buffer of a gather only when all tensors in it were used. All else is the plan of one
card. Prefetch buckets and tensors that stay whole are left out: a plan that imitated them, checked block by block
against DeepSpeed 0.19.8, gave peaks within 10% of these (docs/decisions.md).

``PlannedTrainer`` counts the training state of the LoRA, after deepspeed 0.19.8 (``runtime/zero/stage3.py``,
``stage_1_and_2.py``). The averaging of gradients counts in the stage ``update``; a run averages before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_drf.distributed.zero import REDUCE_BUCKET
from lowmem_drf.planner.cards import GIB, Card
from lowmem_drf.planner.ledger import Ledger
from lowmem_drf.planner.stages import StagePlan
from lowmem_drf.schema import Config


class PlannedZero3:
    """A model's weights under ZeRO-3.

    Args:
        model: its LoRA, if any, is on it. None of its weights counts on the card any more.
        blocks: the submodules that are gathered whole. All others are gathered one by one.
        stages: the stages that call the model.
        gathered: the model stays gathered through a rollout.
        once: the share of an update's rollout that is planned; the rest of the plan scales copies up by its inverse.
    """

    def __init__(
        self, config: Config, ledger: Ledger, card: Card, model: nn.Module, blocks: Sequence[nn.Module],
        stages: Sequence[str], gathered: bool = False, once: float = 1.0,
    ) -> None:  # fmt: skip
        self._ledger, self._rate, self._stages, self._gathered, self._once = (
            ledger,
            card.link * 1e9,
            stages,
            gathered,
            once,
        )
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
        self._room = max(first + second for first, second in pairwise([0, *sizes])) + (
            max(sizes) if self._ranks > 1 else 0
        )
        self._passing = 0  # bytes of weights that the passes of the present stage gather
        with ledger.off_the_clock("partitioned weights"):
            self._parts = torch.empty(sum(self._part(one) for one in seen if not one.requires_grad), dtype=torch.uint8)
        if self._offloaded:
            ledger.on_host(self._parts)
        for one in seen:
            ledger.leave_out(one)

    def called(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, a pass of the model, counted: a forward gathers all weights, its backward those of the blocks
        again."""

        def call(*inputs: Any) -> Any:
            self._passing += self._whole + (self._blocks if torch.is_grad_enabled() else 0)
            return function(*inputs)

        return call

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Around the work of a stage: in the block the card has room for what is gathered."""
        self._passing, room = 0, self._whole if self._stays(name) else self._room * (name in self._stages)
        with self._ledger.off_the_clock("gathered weights"):
            held = torch.empty(room, dtype=torch.uint8)
        yield
        del held

    def with_gathers(self, name: str, stage: StagePlan) -> StagePlan:
        """The stage's figures with its gathers, which run beside computation and share the link with the other copies.

        A process copies its part from the host and gets the others' through the host, as consumer cards have no
        peer access; it sends as much as it gets (a ring, as NCCL does it)."""
        moved = self._whole * self._once if self._stays(name) else float(self._passing)
        if name not in self._stages or not moved:
            return stage
        own, others = moved / self._ranks * self._offloaded, moved / self._ranks * (self._ranks - 1)
        stalled = max(0.0, stage.copy_s - stage.stall_s + (own + others) / self._rate - (stage.s - stage.stall_s))
        return replace(
            stage, s=stage.s + stalled, stall_s=stage.stall_s + stalled, copy_s=stage.copy_s + (own + 2 * others) / self._rate,
            moved_gib=stage.moved_gib + (own + 2 * others) / GIB, between_gib=stage.between_gib + 2 * others / GIB,
        )  # fmt: skip

    def _stays(self, name: str) -> bool:
        return self._gathered and name == "rollout"

    def _part(self, tensor: Tensor) -> int:
        """Bytes of a process's part. Pinned, each part takes a power of two in PyTorch's allocator."""
        nbytes = -(-tensor.numel() // self._ranks) * tensor.element_size()
        return 2 ** (nbytes - 1).bit_length() if self._pinned else nbytes


class PlannedTrainer:
    """A ``training.trainer.Trainer`` that has the bytes of the LoRA's training state, and whose step moves what
    DeepSpeed's would."""

    def __init__(self, config: Config, ledger: Ledger, lora: Mapping[str, Tensor]) -> None:
        self._ledger, self._lora, self._ranks = ledger, list(lora.values()), config.processes
        self._part = sum(-(-tensor.numel() // self._ranks) for tensor in self._lora)
        self._offloaded, self._gathers = config.zero.offload != "none", config.engine != "zero3"
        largest = max(tensor.numel() for tensor in self._lora) if self._gathers and self._offloaded else 0
        # On the host: AdamW's weights, gradients and moments, the weights again as the card gets them, and a buffer:
        # for
        # all gradients in stage 3, else for the largest, there and on the card. On the card no second copy of weights.
        state = self._part * (5 if self._gathers else 6) + largest if self._offloaded else 4 * self._part
        with ledger.off_the_clock("the LoRA's training state"):
            self._bucket, self._state = torch.empty(REDUCE_BUCKET + largest), torch.empty(state)
        if self._offloaded:
            ledger.on_host(self._state)

    def accumulate(self) -> AbstractContextManager[None]:
        return nullcontext()

    def step(self, lr: float) -> float:
        """Returns 0: there is no gradient."""
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

    whole = accumulate

    def pack(self) -> dict[str, Tensor]:
        raise ValueError("a plan writes no checkpoint")

    def unpack(self, packed: Mapping[str, Tensor]) -> None:
        raise ValueError("a plan reads no checkpoint")
