"""Weight streaming: layers that wait packed on the host and come to the card one at a time, as a forward or a backward
gets to them.

The weights are frozen, so the host keeps one copy for good and nothing is ever copied down. All of one layer's tensors
lie in one piece: one copy, one allocation. When a layer is entered its piece is on the card or on its way, and the next
one's copy is started, in the direction in which the layers are being entered: up in a forward, down in a backward that
recomputes them. So the card holds two layers, and the copies run beside the computation.

Recycled buffers have given silently wrong gradients elsewhere: a backward reads what was overwritten meanwhile
(bitsandbytes #2034). Here a layer that comes is new tensors in new memory, every time, and nobody writes into it. What
a backward needs of it autograd keeps, as it keeps anything; what nobody keeps is freed. There is no bookkeeping of who
may still need what, so any pattern of passes is right: many forwards, forwards and backwards of several graphs,
recompute that stops half-way.

Two rules for code inside a layer follow. A weight is kept for a backward through autograd (``save_for_backward``),
never as an attribute or in a closure: under checkpointing that would keep the weights of all layers. And a backward
that calls into the layer (``activations.in_slices``) is handed its tensors (``Layer.bound``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_drf.memory.host import ALIGN, HostStore

Place = tuple[dict[str, Any], str, bool, torch.dtype, torch.Size, int]
"""Where a tensor belongs (a module's dictionary, the key), whether it is a parameter, its dtype, shape, and where it
begins in its layer's piece."""


class Layer:
    """The frozen tensors of one module. In the module there are empty ones of the same dtype on ``device`` while it is
    not entered."""

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
        for owner, key, is_parameter, dtype, _, _ in self._places:  # only now: the module held the one copy there was
            owner[key] = _as(torch.empty(0, dtype=dtype, device=device), is_parameter)
        self.nbytes = self._waiting.nbytes
        self._here: Tensor | None = None

    def prefetch(self) -> None:
        if self._here is None:
            self._waiting.prefetch()

    def fetch(self) -> None:
        """Onto the card, until ``drop``."""
        if self._here is None:
            self._here = self._waiting.get()

    def drop(self) -> None:
        """Off the card, as far as nobody else holds it."""
        self._here = None
        self._waiting.forget()

    def tensors(self) -> list[Tensor]:
        """What ``bound`` functions take besides: the piece, on the card."""
        assert self._here is not None, "a layer's weights are there while it is entered"
        return [self._here]

    def bound(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """(*arguments, piece) -> ``function(*arguments)``, with the weights of this piece in the module: for who calls
        it when the layer is not entered."""

        def call(*arguments: Any) -> Any:
            *rest, piece = arguments
            with self.installed(piece):
                return function(*rest)

        return call

    @contextmanager
    def installed(self, piece: Tensor | None = None) -> Iterator[None]:
        """Within the block the module has its weights: new tensors, views of the piece."""
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
    """A ``Layer`` whose weights are where they are."""

    def tensors(self) -> list[Tensor]:
        return []

    def bound(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function


class Streamed:
    """Layers that are entered one after another: the blocks of a model.

    Args: modules: in the order in which a forward enters them. A LoRA may be put on them later; trainable tensors stay
        on the card. device: the card.
    """

    def __init__(self, modules: Sequence[nn.Module], device: torch.device, store: HostStore) -> None:
        self.layers = [Layer(module, device, store) for module in modules]
        self._current = 0

    @property
    def nbytes(self) -> int:
        """On the host."""
        return sum(layer.nbytes for layer in self.layers)

    def forward(self, place: int, forward: Callable[..., Any]) -> StreamedForward:
        """A module's ``forward``, with its weights on the card."""
        return StreamedForward(self, place, forward)

    def drop(self) -> None:
        """The card holds none of them, but for what a graph keeps."""
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
        """The one that will be entered next, as far as one can tell."""
        last = len(self.layers) - 1
        rising = place > self._current or (place == 0 and self._current != 1)
        if rising and place < last:
            return place + 1
        if place == last:  # with gradient the backward comes, which begins here; without, the next pass
            return (place - 1 if torch.is_grad_enabled() else 0) if last else None
        return place - 1 if place else None  # after a backward the next pass begins here


class StreamedForward:
    """``forward`` of a module of ``Streamed``; ``forward.unread`` too, where it has that."""

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
    """In the place of an ``nn.Embedding``: its table stays in host memory, where rows are looked up; the rows go to
    ``device``, that of ``store``."""

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
