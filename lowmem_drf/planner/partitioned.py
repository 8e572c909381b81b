"""Weights partitioned by ZeRO-3, as far as a plan can tell: DeepSpeed cannot run on tensors without values, so this
stands where it is in a run.

After deepspeed 0.19.8, ``runtime/zero``: ``parameter_offload.py`` and ``partitioned_param_coordinator.py`` (which
tensors are gathered: ``gathering``), ``partition_parameters.py`` (how):

- Of every tensor a process keeps an equal part, padded: on the host, each part pinned by itself (PyTorch rounds that up
  to a power of two), or on the card.
- Tensors that are gathered together are gathered into one buffer of their padded bytes, the own parts being copied to
  the card before. When it is waited for, each becomes a tensor of its own (``AllGatherCoalescedHandle``), and the
  buffer is free when all of them were waited for: for a moment the card holds them twice. A single tensor needs no
  second copy, and one process copies from the host with no buffer.
- The LoRA's tensors are partitioned like all others, and gathered with their blocks. Their gradients are not.
- Tensors of no more than ``stage3_param_persistence_threshold`` numbers stay on the card, whole.

What comes from other processes goes over the card's own link, both ways: consumer cards have no peer access. Every
process sends what it gets (a ring, as NCCL does it). All processes are taken to be on one machine, each card with its
link for itself.

Left out: that the CPU starts gathers before the card has finished with the blocks before. Nothing in DeepSpeed waits
for the computation there; ``activations.Pace`` does, in the transformer, and leaves it a block ahead. Left out too:
what the copies into separate tensors take of the card's time, and that gathers have a stream of their own, whose memory
the allocator keeps apart. A block that keeps everything for its backward keeps its weights here, and does not in
DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowmem_drf.memory.activations import Called, Pace
from lowmem_drf.memory.streaming import Resident
from lowmem_drf.planner.gathering import Flight, Gathering, Rules, Weight
from lowmem_drf.planner.ledger import Ledger

DISK_BYTES_PER_S = 7e9
"""What a fast NVMe disk reads in a second: the data sheets of PCIe 4.0 ones (Samsung 990 PRO: 7,450 MB/s) less a
little. The processes share it."""

SWAP_BUFFERS_NUMEL = 5 * 100_000_000
"""Of ``offload_param`` on a disk: ``buffer_count`` x ``buffer_size`` (``offload_config.py``)."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """How the weights are split."""

    ranks: int
    offload: Literal["cpu", "nvme", "none"]
    pinned: bool
    rules: Rules
    gathered: bool = False
    """Without gradient what was gathered stays until ``drop``."""


class _Tensor(Weight):
    """A partitioned tensor, its place in its module, and its copy on the card while it is gathered."""

    __slots__ = ("copy", "dtype", "key", "owner", "part_bytes", "shape", "trainable")

    def __init__(self, owner: dict[str, Any], key: str, tensor: Tensor, ranks: int) -> None:
        super().__init__(tensor.numel())
        self.owner, self.key, self.dtype, self.shape, self.trainable = (
            owner,
            key,
            tensor.dtype,
            tensor.shape,
            tensor.requires_grad,
        )
        self.part_bytes = -(-tensor.numel() // ranks) * tensor.element_size()
        self.copy: Tensor | None = None

    def make(self) -> None:
        self.copy = torch.empty(self.shape, dtype=self.dtype)

    def install(self) -> None:
        """In the module is the copy. A trainable tensor is the optimizer's, and remains what it is."""
        if not self.trainable and self.copy is not None:
            self.owner[self.key] = nn.Parameter(self.copy, requires_grad=False)

    def take_out(self) -> None:
        self.copy = None
        if not self.trainable:
            self.owner[self.key] = nn.Parameter(torch.empty(0, dtype=self.dtype), requires_grad=False)


class Partitioned:
    """A model under ZeRO-3 in a plan. It has what ``streaming.Streamed`` has for who calls the blocks and for who drops
    the weights.

    Under an active ``Ledger`` only.

    Args: model: whose forward a pass is. A LoRA is on it already. blocks: its leaf modules, which are gathered whole,
        in the order in which they are entered. All other modules are gathered one by one.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], sharing: Sharing) -> None:
        ledger = Ledger.active()
        if ledger is None:
            raise ValueError("the stand-in for ZeRO-3 only counts, and there is no ledger")
        self._ledger, self._sharing = ledger, sharing
        inside = {id(part) for block in blocks for part in block.modules()}
        leaves = {id(block) for block in blocks}
        entered = [part for part in model.modules() if id(part) in leaves or id(part) not in inside]
        self._weights = [self._take(part, id(part) in leaves) for part in entered]
        places = {id(part): place for place, part in enumerate(entered)}
        self._places = [places[id(block)] for block in blocks]
        self.layers = [Resident()] * len(blocks)
        first, last = self._places[0], self._places[-1]
        self._behind = [0, *range(len(entered) - 1, last, -1)]
        backward = [place for place in range(last, first - 1, -1) for _ in range(1 + (place in self._places))]
        course = [place for place in (*range(len(entered)), *self._behind, *backward) if self._weights[place]]
        self.gathering = Gathering(self._weights, course, sharing.rules, self)
        self._open: int | None = None
        self._arrivals: dict[int, float] = {}
        self._buffers: dict[int, Tensor] = {}
        self._disk_until = 0.0
        self._book()
        for part in entered:
            place = places[id(part)] if self._weights[places[id(part)]] else None
            part.register_forward_pre_hook(self._begin(place) if part is model else self._entering(place))
            if place is not None:
                part.register_forward_hook(self._leaving(place))

    def forward(self, place: int, forward: Callable[..., Any]) -> Called:
        """A block's ``forward``, with its weights on the card wherever it is computed again."""
        return _GatheredForward(self, self._places[place], forward)

    def called(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` of a model whose own forward nobody calls: each call is a pass."""
        begin = self._begin(0 if self._weights[0] else None)

        def call(*inputs: Any) -> Any:
            begin()
            return function(*inputs)

        return call

    def drop(self) -> None:
        """Nothing is gathered any more, but for what a graph keeps."""
        self._close()
        self.gathering.drop()

    def enter_again(self, place: int) -> None:
        """A block is computed again in a backward. It is left when the next one is."""
        if self._open is None:
            # the last one is left when the backward is over
            torch.autograd.Variable._execution_engine.queue_callback(self._close)
            for other in self._behind:
                self._enter(other if self._weights[other] else None)
                self.gathering.leave(other)
        self._close()
        self._enter(place)  # for its backward
        self._enter(place)  # for the forward in it
        self._open = place

    def start(self, flight: Flight) -> None:
        """``Carrier``."""
        sharing, ledger, weights = self._sharing, self._ledger, _of(flight)
        parts = sum(weight.part_bytes for weight in weights)
        now = arrival = ledger.seconds
        with ledger.off_the_clock("gathered"):
            if sharing.ranks == 1:
                for weight in weights:
                    weight.make()
            else:
                own = torch.empty(parts if sharing.offload != "none" else 0, dtype=torch.uint8)
                self._buffers[id(flight)] = torch.empty(parts * sharing.ranks, dtype=torch.uint8)
                del own
        if sharing.offload != "none":
            read = 0.0
            if sharing.offload == "nvme":
                read = self._disk_until = max(now, self._disk_until) + parts * sharing.ranks / DISK_BYTES_PER_S
            arrival = ledger.link.fetch(now, parts, read)
        if sharing.ranks > 1:
            arrival = ledger.link.exchange(now, parts * (sharing.ranks - 1), arrival)
        self._arrivals[id(flight)] = arrival

    def arrive(self, flight: Flight) -> None:
        """``Carrier``."""
        self._ledger.wait(self._arrivals.pop(id(flight)))
        if self._sharing.ranks == 1:
            return
        weights = _of(flight)
        with self._ledger.off_the_clock("gathered"):
            if len(weights) == 1:
                (weight,) = weights
                weight.copy = (
                    self._buffers[id(flight)][: weight.numel * weight.dtype.itemsize]
                    .view(weight.dtype)
                    .view(weight.shape)
                )
            else:
                for weight in weights:
                    weight.make()

    def land(self, flight: Flight) -> None:
        """``Carrier``."""
        self._buffers.pop(id(flight), None)

    def free(self, weight: Weight) -> None:
        """``Carrier``."""
        assert isinstance(weight, _Tensor)
        with self._ledger.off_the_clock():
            weight.take_out()

    def _take(self, part: nn.Module, whole: bool) -> list[_Tensor]:
        """The module's tensors that are partitioned, out of it."""
        taken = []
        for holder in part.modules() if whole else (part,):
            for key, tensor in holder._parameters.items():
                if tensor is not None and tensor.numel() > self._sharing.rules.stays:
                    taken.append(_Tensor(holder._parameters, key, tensor, self._sharing.ranks))
                    if tensor.requires_grad:
                        self._ledger.leave_out(tensor)
                    else:
                        taken[-1].take_out()
        return taken

    def _book(self) -> None:
        """This process's parts of the frozen weights. Those of the LoRA are the optimizer's."""
        sharing, frozen = (
            self._sharing,
            [weight for weights in self._weights for weight in weights if not weight.trainable],
        )
        nbytes = [
            2 ** (weight.part_bytes - 1).bit_length() if sharing.pinned else weight.part_bytes for weight in frozen
        ]
        if sharing.offload == "none":
            nbytes = [weight.part_bytes for weight in frozen]
        elif sharing.offload == "nvme":
            nbytes = [SWAP_BUFFERS_NUMEL * max((weight.dtype.itemsize for weight in frozen), default=0)]
        with self._ledger.off_the_clock("partitioned weights"):
            self._parts = torch.empty(sum(nbytes), dtype=torch.uint8)
        if sharing.offload != "none":
            self._ledger.on_host(self._parts)

    def _enter(self, place: int | None) -> None:
        self.gathering.enter(place)
        for weight in () if place is None else self._weights[place]:
            weight.install()

    def _close(self) -> None:
        if self._open is not None:
            self.gathering.leave(self._open)
            self._open = None

    def _begin(self, place: int | None) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._close()
            self.gathering.begin()
            if self._sharing.gathered and not torch.is_grad_enabled():
                self.gathering.hold()
            self._enter(place)

        return hook

    def _entering(self, place: int | None) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if not in_backward():
                self._enter(place)

        return hook

    def _leaving(self, place: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if not in_backward():
                self.gathering.leave(place)

        return hook


class _GatheredForward(Called):
    """A block's ``forward`` under ``Partitioned``. Hooks on the block see only who calls it, and checkpointing may be
    within its ``forward``."""

    def __init__(self, partitioned: Partitioned, place: int, forward: Callable[..., Any]) -> None:
        super().__init__(forward, Pace())
        self._partitioned, self._place = partitioned, place

    def __call__(self, *inputs: Any, **arguments: Any) -> Any:
        if in_backward():
            self._partitioned.enter_again(self._place)
        return self.forward(*inputs, **arguments)


def in_backward() -> bool:
    """As DeepSpeed tells a recompute from a forward."""
    return bool(torch._C._current_graph_task_id() != -1)


def _of(flight: Flight) -> list[_Tensor]:
    return [weight for weight in flight.weights if isinstance(weight, _Tensor)]
