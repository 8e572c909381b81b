"""Graded steps without a forward: the rollout's forward of the same step left on the host what its backward needs.

A record of one transformer pass holds the input of each block, the output of the last one, and the results of the
blocks' self-attentions (``kept_attention``). The graded step recomputes each block once, with gradient, and nothing
else. Its values are those of a forward of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowmem_drf.memory.host import Held, HostStore
from lowmem_drf.memory.kept_attention import KeptAttention


class Record:
    """One pass over the blocks, in host memory.

    ``attentions``: whether the results of the blocks' self-attentions are kept too.
    """

    def __init__(self, store: HostStore, attentions: bool) -> None:
        self._store, self._attentions = store, attentions
        self._inputs: list[Held] = []
        self._kept_attentions: list[KeptAttention | None] = []
        self._output: Held | None = None

    @property
    def nbytes(self) -> int:
        """Bytes not taken yet."""
        held = (*self._inputs, self._output, *self._kept_attentions)
        return sum(one.nbytes for one in held if one is not None)

    def enter(self, hidden: Tensor) -> KeptAttention | None:
        """Stores the next block's input; returns where to write its attentions."""
        self._inputs.append(self._store.put(hidden))
        self._kept_attentions.append(KeptAttention(self._store) if self._attentions else None)
        return self._kept_attentions[-1]

    def leave(self, hidden: Tensor) -> None:
        """Stores the output of the last block."""
        self._output = self._store.put(hidden)

    def output(self) -> Tensor:
        assert self._output is not None
        return self._output.get()

    def copy(self) -> Record:
        """The same record, to be taken by itself: the host's memory is held once, until both are used up."""
        other = Record(self._store, self._attentions)
        other._inputs, other._output = list(self._inputs), self._output
        other._kept_attentions = [kept and kept.copy() for kept in self._kept_attentions]
        return other

    def take(self, place: int) -> tuple[Tensor, KeptAttention | None]:
        """A block's input and its kept attentions. Blocks are taken from last to first; the preceding one is
        prefetched."""
        self._store.settle()
        hidden, kept_attention = self._inputs.pop(), self._kept_attentions.pop()
        assert len(self._inputs) == place, "blocks are taken from the last to the first"
        arrived = hidden.get()
        if kept_attention is not None:
            kept_attention.prefetch()
        if self._inputs:
            self._inputs[-1].prefetch()
        return arrived, kept_attention


class Recorder:
    """A ``types.Recorder``: decides which passes of the rollout are recorded, and which record a graded step takes."""

    def __init__(self, store: HostStore, attentions: bool) -> None:
        self._store, self._attentions = store, attentions
        self._records: dict[tuple[int, int], Record] = {}
        self._wanted: tuple[int, tuple[int, ...]] | None = None
        self.recording: Record | None = None
        """Blocks that run without gradient write into it."""
        self.replaying: Record | None = None
        """Blocks that run with gradient read from it."""
        self.step_bytes = 0
        """Bytes of the records of the last recorded step."""

    @contextmanager
    def record(self, step: int, conditions: Sequence[Any]) -> Iterator[None]:
        self._wanted = step, tuple(map(id, conditions))
        try:
            yield
        finally:
            self._wanted = None
        self.step_bytes = sum(record.nbytes for (of, _), record in self._records.items() if of == step)

    @contextmanager
    def replay(self, step: int, condition: Any, again: bool = False) -> Iterator[None]:
        key = step, id(condition)
        record = self._records.get(key) if again else self._records.pop(key, None)
        self.replaying = record.copy() if record and again else record
        try:
            yield
        finally:
            self.replaying = None

    @contextmanager
    def during(self, condition: Any) -> Iterator[None]:
        """Wraps one pass of the transformer."""
        if self._wanted is not None and id(condition) in self._wanted[1] and not torch.is_grad_enabled():
            self.recording = self._records[self._wanted[0], id(condition)] = Record(self._store, self._attentions)
        try:
            yield
        finally:
            self.recording = None


class RecordedForward:
    """A block's ``forward`` that writes into the recorder's ``recording``, if there is one and gradient is off."""

    def __init__(self, forward: Any, is_last: bool, recorder: Recorder) -> None:
        self.forward = forward
        self._is_last, self._recorder = is_last, recorder

    def unread(self, *inputs: Any, **arguments: Any) -> Any:
        return self.forward.unread(*inputs, **arguments)

    def __call__(self, hidden: Tensor, *rest: Any, **arguments: Any) -> Tensor:
        record = self._recorder.recording
        if record is None or torch.is_grad_enabled():
            return self.forward(hidden, *rest, **arguments)
        out = self.forward(hidden, *rest, kept_attention=record.enter(hidden), recorded=True)
        if self._is_last:
            record.leave(out)
        return out


def replayed(record: Record, block: Any, place: int, is_last: bool, hidden: Tensor, rest: Sequence[Any]) -> Tensor:
    """``block(hidden, *rest)`` from its record. Only the last block's result has values; the others are there for the
    gradient.

    ``rest``: tensors, and tuples of tensors.
    """
    flat = [tensor for value in rest for tensor in (value if isinstance(value, tuple) else (value,))]
    lengths = [len(value) if isinstance(value, tuple) else None for value in rest]

    def run(hidden: Tensor, kept_attention: KeptAttention | None, flat: Sequence[Tensor]) -> Tensor:
        values = iter(flat)
        again = [next(values) if length is None else tuple(next(values) for _ in range(length)) for length in lengths]
        result: Tensor = block.forward.unread(hidden, *again, kept_attention=kept_attention)
        return result

    parameters = [parameter for parameter in block.parameters() if parameter.requires_grad]
    out: Tensor = _FromRecord.apply(run, record, place, is_last, len(flat), hidden, *flat, *parameters)
    return out


class _FromRecord(torch.autograd.Function):
    """Only the last block's output is read; the others have a shape and no values."""

    @staticmethod
    def forward(
        ctx: Any, run: Any, record: Record, place: int, is_last: bool, count: int, hidden: Tensor, *tensors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*tensors[:count])
        ctx.run, ctx.record, ctx.place, ctx.parameters = run, record, place, tensors[count:]
        return record.output() if is_last else hidden.new_empty(()).expand_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        hidden, kept_attention = ctx.record.take(ctx.place)
        if kept_attention is not None:
            kept_attention.rewind()
        given = zip((hidden, *ctx.saved_tensors), ctx.needs_input_grad[5:], strict=False)
        leaves = [tensor.detach().requires_grad_(need) for tensor, need in given]
        with torch.enable_grad():
            out = ctx.run(leaves[0], kept_attention, leaves[1:])
        inputs = [*leaves, *ctx.parameters]
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        gradients = iter(torch.autograd.grad(out, wanted, d_out, allow_unused=True))
        return (*[None] * 5, *(next(gradients) if tensor.requires_grad else None for tensor in inputs))
