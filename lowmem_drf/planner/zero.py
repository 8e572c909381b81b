"""What a plan puts in the place of DeepSpeed: weights partitioned, and the LoRA's training state split over the
processes.

The state of the LoRA, after deepspeed 0.19.8 (``runtime/zero/stage3.py``, ``stage_1_and_2.py``; torch's AdamW). A
process has of every tensor its part:

- on the host, where ``zero.offload`` is not ``none``: AdamW's weight, gradient and two moments, and the weight once
  more as the card gets it; with stage 3 a buffer for the averaged gradient, with 1 and 2 one for the largest gradient,
  there and on the card;
- else on the card: AdamW's weight, which with stage 3 is the only one, two moments, and the averaged gradient.

On the card are the LoRA's gradients besides, whole until they are averaged once an update, the bucket in which that
happens and what the bucket is sorted into by process; with stages 1 and 2 the LoRA's weights, whole.

Averaging is booked in the stage ``update``; a run does it before. Left out: what AdamW takes on the host's CPU, and a
second copy of the parts that PyTorch's pinned allocator may keep from loading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lowmem_drf.distributed.zero import REDUCE_BUCKET
from lowmem_drf.models.lora.optimizers import fill_states, make_optimizer
from lowmem_drf.planner.gathering import Rules
from lowmem_drf.planner.ledger import Ledger
from lowmem_drf.planner.partitioned import Partitioned, Sharing
from lowmem_drf.schema import Config

if TYPE_CHECKING:
    from torch.optim import Optimizer


def partitioned(config: Config, model: nn.Module, blocks: Sequence[nn.Module], trains: bool) -> Partitioned:
    """The stand-in for a model under ZeRO-3. ``trains``: it is the transformer, whose rollout may run under gathered
    weights."""
    zero = config.zero
    rules = Rules(
        zero.stage3_prefetch_bucket_size, zero.stage3_max_live_parameters, zero.stage3_param_persistence_threshold
    )
    return Partitioned(
        model,
        blocks,
        Sharing(config.processes, zero.offload, zero.pin_memory, rules, trains and zero.rollout == "gathered"),
    )


class PlannedTrainer:
    """A ``training.trainer.Trainer`` whose step only moves and counts bytes. Under an active ``Ledger``.

    Args:
        lora: the trainable tensors by name, where ``Partitioned`` has left them.
    """

    def __init__(self, config: Config, lora: Mapping[str, Tensor]) -> None:
        ledger = Ledger.active()
        if ledger is None:
            raise ValueError("the stand-in for DeepSpeed's optimizer only counts, and there is no ledger")
        self._ledger, self._lora, self._ranks = ledger, list(lora.values()), config.processes
        self._numel = sum(tensor.numel() for tensor in self._lora)
        self._part = sum(-(-tensor.numel() // self._ranks) for tensor in self._lora)
        self._offloaded, self._gathers = config.zero.offload != "none", config.engine != "zero3"
        self._optimizer: Optimizer | None = None
        largest = max(tensor.numel() for tensor in self._lora) if self._gathers and self._offloaded else 0
        with ledger.off_the_clock("the LoRA's training state"):
            self._bucket = torch.empty(REDUCE_BUCKET)
            self._largest = torch.empty(largest)
            if self._offloaded:
                self._state = torch.empty(self._part * (5 if self._gathers else 6) + largest)
                ledger.on_host(self._state)
            else:
                self._state = torch.empty(self._part)  # the gradient; the optimizer has the rest
                self._optimizer = make_optimizer(config.optim, [nn.Parameter(torch.empty(self._part))])
                fill_states(self._optimizer)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        yield

    def step(self, lr: float) -> float:
        """Returns 0: there is no gradient."""
        ledger, others = self._ledger, self._part * 4 * (self._ranks - 1)
        with ledger.off_the_clock("gradients by process"):
            sorted_ = torch.empty(min(REDUCE_BUCKET, self._numel))
        ledger.wait(ledger.link.exchange(ledger.seconds, others, 0.0))
        del sorted_
        for tensor in self._lora:
            tensor.grad = None
        if self._optimizer is None:
            written, _ = ledger.link.send(ledger.seconds, self._part * 4)
            ledger.wait(ledger.link.fetch(ledger.seconds, self._part * 4 if self._gathers else 0, written))
        else:
            for group in self._optimizer.param_groups:
                for tensor in group["params"]:
                    tensor.grad = torch.zeros_like(tensor)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        if self._gathers:
            ledger.wait(ledger.link.exchange(ledger.seconds, others, 0.0))
        return 0.0

    def whole(self) -> AbstractContextManager[None]:
        """Nothing to do: here no tensor of the LoRA is in parts."""
        return nullcontext()

    def pack(self) -> dict[str, Tensor]:
        """Nothing: a plan writes no checkpoint."""
        return {}

    def unpack(self, packed: Mapping[str, Tensor]) -> None:
        raise ValueError("a plan reads no checkpoint")
