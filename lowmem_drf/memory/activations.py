"""What a transformer's forward keeps for its backward: a policy per block, and slices of tokens inside a block.

A recomputed block keeps its input alone, on the card or on the host. Its other arguments (text embeddings, time, rotary
embedding) are shared by the blocks and kept once. Recompute is PyTorch's non-reentrant ``torch.utils.checkpoint``,
which stops as soon as all saved tensors are there. Random state is not replayed: nothing here draws numbers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from lowmem_drf.memory.host import Held, HostStore
from lowmem_drf.memory.kept_attention import KeptAttention
from lowmem_drf.memory.recorded_rollout import Recorder, replayed


class BlockPolicy:
    """A ``gradient_checkpointing_func`` of diffusers' models: called as (block, hidden states, the block's other
    arguments) for every block in order, under gradient.

    Each block keeps its input: on the card, or in ``store``, from
    where the next one that the backward needs is prefetched during the present one. With ``attentions`` blocks keep the
    result of their self-attention too, and the blocks' ``forward`` takes an argument ``kept_attention``
    (``KeptAttention``).

    A block whose ``forward`` has a method ``unread`` is recomputed by it: same saved tensors, but nobody reads its
    result.

    Args:
        store: for the inputs. ``None``: they stay on the card.
        attentions: where the results of the self-attentions are kept. ``None``: they are recomputed.
        attention_store: for ``attentions="host"``.
        recorder: has the forwards that the rollout already ran.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        store: HostStore | None,
        attentions: Literal["card", "host"] | None = None,
        attention_store: HostStore | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self._places = {id(block): place for place, block in enumerate(blocks)}
        self._store = store
        self._attentions, self._attention_store = attentions, attention_store
        self._newest: Callable[[], Held | None] = lambda: None
        self._newest_kept: Callable[[], KeptAttention | None] = lambda: None
        self._recorder = recorder

    def __call__(self, block: Any, hidden: Tensor, *rest: Any) -> Tensor:
        if self._recorder is not None and self._recorder.replaying is not None:
            place = self._places[id(block)]
            return replayed(self._recorder.replaying, block, place, place == len(self._places) - 1, hidden, rest)
        unread = getattr(block.forward, "unread", block)
        fetch, differentiable = self._put_aside(block, hidden), hidden.requires_grad
        kept_attention, before = self._new_kept(block)
        inputs = [hidden]  # so that the closure does not hold it after the forward

        def run(*rest: Any) -> Tensor:
            if inputs:
                return block(inputs.pop(), *rest, **kept_attention)
            for one in kept_attention.values():
                one.rewind()
            again = fetch().detach().requires_grad_(differentiable)
            if (following := before()) is not None:
                following.prefetch()
            return unread(again, *rest, **kept_attention)

        del hidden
        return checkpoint(run, *rest, use_reentrant=False, preserve_rng_state=False)

    def _new_kept(self, block: nn.Module) -> tuple[dict[str, KeptAttention], Callable[[], KeptAttention | None]]:
        """The block's ``kept_attention`` argument, and a reference to the preceding block's."""
        if self._attentions is None:
            return {}, lambda: None
        kept_attention = KeptAttention(self._attention_store if self._attentions == "host" else None)
        before = self._newest_kept if self._places[id(block)] else lambda: None
        self._newest_kept = weakref.ref(kept_attention)
        return {"kept_attention": kept_attention}, before

    def _put_aside(self, block: nn.Module, hidden: Tensor) -> Callable[[], Tensor]:
        """Stores the block's input; returns the function that fetches it for the recompute."""
        if self._store is None:
            kept = hidden.detach()
            return lambda: kept
        store = self._store
        held = store.put(hidden)
        before = self._newest if self._places[id(block)] else lambda: None
        self._newest = weakref.ref(held)

        def fetch() -> Tensor:
            store.settle()  # the forward is over: frees the card's copies of what it stored last
            arrived, following = held.get(), before()
            if following is not None:
                following.prefetch()
            return arrived

        return fetch


class HookedForward:
    """A block's ``forward`` if hooks on the block's call fetch its weights (ZeRO-3). It has no ``unread``: a recompute
    calls the block, and so runs the hooks.

    ``pace``: shared by all blocks.
    """

    def __init__(self, forward: Callable[..., Tensor], pace: Pace) -> None:
        self.forward, self._pace = forward, pace

    def __call__(self, hidden: Tensor, *inputs: Any, **arguments: Any) -> Tensor:
        self._pace.keep(hidden.device)
        return self.forward(hidden, *inputs, **arguments)


class Pace:
    """Keeps the CPU at most one block ahead of the card. DeepSpeed's gathers do not wait for the computation: those of
    all blocks would be issued before the first block is done, and their buffers, which become free only when the card
    has passed them, would fill it."""

    def __init__(self) -> None:
        self._before: torch.cuda.Event | None = None

    def keep(self, device: torch.device) -> None:
        """Called when a block begins. Returns once the work issued before the preceding block began is done. (A block's
        end would not do: a recompute stops half-way.)"""
        if device.type != "cuda":
            return
        before, self._before = self._before, torch.cuda.Event(blocking=True)
        self._before.record()
        if before is not None:
            before.synchronize()


def in_slices(
    function: Callable[..., tuple[Tensor, ...]],
    count: int,
    sliced: Sequence[Tensor],
    shared: Sequence[Tensor] = (),
    parameters: Iterable[Tensor] = (),
    unread: bool = False,
) -> tuple[Tensor, ...]:
    """``function(0, *sliced, *shared)`` in ``count`` slices along dimension 1, each recomputed by itself in the
    backward: only one slice's intermediate tensors are alive at a time.

    Args:
        function: acts on each index of dimension 1 independently; its first argument is the index at which a slice
            begins. All its results have that dimension, as long as the inputs'.
        sliced: (B, L, …), kept for the backward.
        shared: passed whole to every slice, and kept.
        parameters: trainable tensors inside ``function``; they get gradients as the inputs do.
        unread: nobody reads the results: the recompute of a checkpoint around this call, which only needs the saved
            tensors. Results are not computed; they must all have the shape of ``sliced[0]``.
    """
    step = -(-sliced[0].shape[1] // count)
    tensors = (*sliced, *shared, *parameters)
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
        return _run(function, step, sliced, shared)
    return _Sliced.apply(function, step, len(sliced), len(shared), unread, *tensors)


def _cut(tensors: Sequence[Tensor], start: int, step: int) -> list[Tensor]:
    return [tensor[:, start : start + step] for tensor in tensors]


@torch.no_grad()
def _run(
    function: Callable[..., tuple[Tensor, ...]], step: int, sliced: Sequence[Tensor], shared: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    results: tuple[Tensor, ...] = ()
    length = sliced[0].shape[1]
    for start in range(0, length, step):
        made = function(start, *_cut(sliced, start, step), *shared)
        results = results or tuple(part.new_empty(part.shape[0], length, *part.shape[2:]) for part in made)
        for result, part in zip(results, made, strict=True):
            result[:, start : start + step] = part
    return results


class _Sliced(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: Any, step: int, sliced: int, shared: int, unread: bool, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        inputs = tensors[: sliced + shared]
        ctx.save_for_backward(*inputs)
        ctx.function, ctx.step, ctx.sliced, ctx.parameters = function, step, sliced, tensors[sliced + shared :]
        if unread:
            return (tensors[0].new_empty(()).expand_as(tensors[0]),)
        return _run(function, step, inputs[:sliced], inputs[sliced:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[5:]
        inputs = ctx.saved_tensors
        sliced = inputs[: ctx.sliced]
        shared = _leaves(inputs[ctx.sliced :], needed[ctx.sliced :])
        d_sliced = [torch.zeros_like(tensor) if need else None for tensor, need in zip(sliced, needed, strict=False)]
        whole = [tensor for tensor in (*shared, *ctx.parameters) if tensor.requires_grad]
        d_whole: list[Tensor | None] = [None] * len(whole)
        for start in range(0, sliced[0].shape[1], ctx.step):
            parts = _leaves(_cut(sliced, start, ctx.step), needed)
            with torch.enable_grad():
                made = ctx.function(start, *parts, *shared)
            d_made = _cut(cotangents, start, ctx.step)
            pairs = [(out, d) for out, d in zip(made, d_made, strict=True) if out.requires_grad]
            outputs, d_outputs = zip(*pairs, strict=True)
            wanted = [part for part in parts if part.requires_grad]
            gradients = torch.autograd.grad(outputs, [*wanted, *whole], d_outputs, allow_unused=True)
            del made, outputs, pairs  # the slice's graph, before the next one is made
            for d, gradient in zip([d for d in d_sliced if d is not None], gradients, strict=False):
                if gradient is not None:
                    d[:, start : start + ctx.step] = gradient
            for i, gradient in enumerate(gradients[len(wanted) :]):
                d_whole[i] = _add(d_whole[i], gradient)
        totals = iter(d_whole)
        rest = [
            None if not tensor.requires_grad or (total := next(totals)) is None else total.to(tensor.dtype)
            for tensor in (*shared, *ctx.parameters)
        ]
        return (*[None] * 5, *d_sliced, *rest)


def _leaves(tensors: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    return [tensor.detach().requires_grad_(need) for tensor, need in zip(tensors, needed, strict=False)]


def _add(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    """Sums over slices are at least fp32: in bf16 each slice would round the whole sum again."""
    if more is None:
        return total
    more = more.to(torch.promote_types(more.dtype, torch.float32))
    return more if total is None else total.add_(more)
