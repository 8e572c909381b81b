"""Weight streaming: layers are stored packed on the host and copied to the card one at a time, when a forward or
backward reaches them.

The weights are frozen, so the host keeps one copy and nothing is copied back. The tensors of a layer form one piece:
one copy, one allocation. When a layer is entered, its piece is on the card or on its way, and the next layer's copy
starts, in the direction of the pass: up in a forward, down in a backward that recomputes. The card holds two layers,
and copies overlap with computation.

Recycled buffers have caused silently wrong gradients elsewhere, when a backward reads overwritten memory (bitsandbytes
#2034). Here every fetch makes new tensors in new memory, and nothing writes into them. Autograd keeps what a backward
needs; the rest is freed. This needs no bookkeeping, and is right for any order of passes: many forwards, interleaved
graphs, recomputation that stops half-way.

Code inside a layer follows two rules. It keeps weights for a backward only through autograd (``save_for_backward``); as
an attribute or in a closure, the weights of all layers would stay alive under checkpointing. And a backward that calls
into the layer (``activations.in_slices``) gets its tensors through ``Layer.bound``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_drf.memory.host import ALIGN, HostStore

Place = tuple[dict[str, Any], str, bool, torch.dtype, torch.Size, int]
"""A tensor of a layer: the module's dictionary, its key, whether it is a parameter, dtype, shape, and offset in the
piece."""


class Layer:
    """The frozen tensors of one module. Outside passes the module has empty tensors of the same dtype on ``device``."""

    def __init__(self, module: nn.Module, device: torch.device, store: HostStore) -> None:
        self._places: list[Place] = []
        pieces: list[Tensor] = []
        start = 0
        for owner, key, tensor in _frozen(module):
            flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
            filling = -len(flat) % ALIGN
            pieces += [flat, flat.new_zeros(filling)] if filling else [flat]
            is_parameter = isinstance(tensor, nn.Parameter)
            self._places.append((owner, key, is_parameter, tensor.dtype, tensor.shape, start))
            start += len(flat) + filling
        self._waiting = store.put(torch.cat([piece.to(pieces[0].device) for piece in pieces]))
        store.settle()
        for owner, key, is_parameter, dtype, _, _ in self._places:  # after the copy: the module held the only one
            owner[key] = _as(torch.empty(0, dtype=dtype, device=device), is_parameter)
        self.nbytes = self._waiting.nbytes
        self._here: Tensor | None = None

    def prefetch(self) -> None:
        if self._here is None:
            self._waiting.prefetch()

    def fetch(self) -> None:
        """Brings the weights to the card, until ``drop``."""
        if self._here is None:
            self._here = self._waiting.get()

    def drop(self) -> None:
        """Releases the weights on the card."""
        self._here = None
        self._waiting.forget()

    def tensors(self) -> list[Tensor]:
        """The last argument of ``bound`` functions: the piece on the card."""
        assert self._here is not None, "a layer's weights are there while it is entered"
        return [self._here]

    def bound(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """(*arguments, piece) -> ``function(*arguments)`` with the piece's weights in the module, for calls outside a
        pass of the layer."""

        def call(*arguments: Any) -> Any:
            *rest, piece = arguments
            with self.installed(piece):
                return function(*rest)

        return call

    @contextmanager
    def installed(self, piece: Tensor | None = None) -> Iterator[None]:
        """Gives the module its weights within the block, as views of the piece."""
        (whole,) = self.tensors() if piece is None else (piece,)
        before = [owner[key] for owner, key, *_ in self._places]
        for owner, key, is_parameter, dtype, shape, start in self._places:
            nbytes = shape.numel() * dtype.itemsize
            owner[key] = _as(whole[start : start + nbytes].view(dtype).view(shape), is_parameter)
        try:
            yield
        finally:
            for (owner, key, *_), tensor in zip(self._places, before, strict=True):
                owner[key] = tensor


class Resident:
    """A ``Layer`` that is not streamed."""

    def tensors(self) -> list[Tensor]:
        return []

    def bound(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function


class Streamed:
    """Layers that run one after another: the blocks of a model.

    Args:
        modules: in the order of a forward. A LoRA may be added later; trainable tensors stay on the card.
        device: the card.
    """

    def __init__(self, modules: Sequence[nn.Module], device: torch.device, store: HostStore) -> None:
        self.layers = [Layer(module, device, store) for module in modules]
        self._current = 0

    @property
    def nbytes(self) -> int:
        """Bytes on the host."""
        return sum(layer.nbytes for layer in self.layers)

    def forward(self, place: int, forward: Callable[..., Any]) -> StreamedForward:
        """Wraps a module's ``forward``: its weights are on the card during the call."""
        return StreamedForward(self, place, forward)

    def drop(self) -> None:
        """Releases all layers on the card, except tensors that a graph keeps."""
        for layer in self.layers:
            layer.drop()

    @contextmanager
    def entered(self, place: int) -> Iterator[None]:
        following = self._following(place)
        for other, layer in enumerate(self.layers):
            if other not in (place, following):
                layer.drop()
        self._current = place
        self.layers[place].fetch()
        if following is not None:
            self.layers[following].prefetch()
        with self.layers[place].installed():
            yield

    def _following(self, place: int) -> int | None:
        """A guess at the next layer."""
        last = len(self.layers) - 1
        rising = place > self._current or (place == 0 and self._current != 1)
        if rising and place < last:
            return place + 1
        if place == last:  # with gradient the backward follows and starts here; without, the next forward
            return (place - 1 if torch.is_grad_enabled() else 0) if last else None
        return place - 1 if place else None  # after a backward the next forward starts at layer 0


class StreamedForward:
    """``forward`` of a module of ``Streamed``, and ``forward.unread`` if it exists."""

    def __init__(self, streamed: Streamed, place: int, forward: Any) -> None:
        self._streamed, self._place = streamed, place
        self.forward = forward

    def __call__(self, *inputs: Any, **arguments: Any) -> Any:
        with self._streamed.entered(self._place):
            return self.forward(*inputs, **arguments)

    def unread(self, *inputs: Any, **arguments: Any) -> Any:
        with self._streamed.entered(self._place):
            return self.forward.unread(*inputs, **arguments)


class HostEmbedding(nn.Module):
    """Replaces an ``nn.Embedding``: looks up rows in host memory and sends them to ``device``, that of ``store``."""

    def __init__(self, embedding: Any, device: torch.device, store: HostStore) -> None:
        super().__init__()
        self.num_embeddings, self.device, self._store = embedding.num_embeddings, device, store
        self._table = store.keep(embedding.weight)

    def forward(self, ids_BL: Tensor) -> Tensor:
        """(B, L, D), no gradient."""
        return self._store.send(nn.functional.embedding(ids_BL.cpu(), self._table))


def _frozen(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    for part in module.modules():
        for owner in (part._parameters, part._buffers):
            for key, tensor in owner.items():
                if tensor is not None and not tensor.requires_grad:
                    yield owner, key, tensor


def _as(tensor: Tensor, is_parameter: bool) -> Tensor:
    return nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
