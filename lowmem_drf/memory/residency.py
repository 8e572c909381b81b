"""Whose weights are on the card, and when: park and wake.

Frozen weights never change, so the host keeps one copy of them for good: parking drops the card's, waking copies it
back, nothing is ever copied down. Tensors are woken one by one, each with card memory of its own: in one large block, a
small tensor that lands in it while it is free keeps the allocator from ever giving it out whole again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lowmem_drf.errors import LowmemError
from lowmem_drf.memory.host import Held, HostStore

NEEDS: Mapping[str, frozenset[str]] = {
    "text": frozenset(),
    "rollout": frozenset({"transformer"}),
    "decode": frozenset({"vae"}),
    "critic": frozenset({"critic"}),
    "vae_backward": frozenset({"vae"}),
    "denoise_backward": frozenset({"transformer"}),
    "update": frozenset(),
}
"""The models that a stage calls."""


class Droppable(Protocol):
    """Weights that come to the card as they are needed: ``streaming.Streamed``, ``zero.ZeroEngine``."""

    def drop(self) -> None:
        """None of them is on the card any more, but for what a graph keeps."""
        ...


class Parked:
    """A module whose frozen weights (parameters that need no gradient, buffers) live on the host, and on ``device``
    while it is awake. Trainable ones are moved to ``device`` and stay there.

    It begins parked, wherever its weights were: a module loaded in host memory is on the card for the first time when
    it is woken. Parameters remain the same objects, with dtype and ``device`` as when awake; only their shapes are
    empty. Awake they are contiguous.
    """

    def __init__(self, name: str, module: nn.Module, device: torch.device, store: HostStore) -> None:
        self._name, self._module = name, module
        for parameter in module.parameters():
            if parameter.requires_grad and parameter.device.type != device.type:
                parameter.data = parameter.data.to(device)
        # tied weights have one storage, and must have one again when they are woken
        groups: dict[Any, list[Tensor]] = {}
        for tensor in _frozen(module):
            groups.setdefault(
                (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()), []
            ).append(tensor)
        self._waiting: list[tuple[Held, list[Tensor], Tensor]] = []
        for tensors in groups.values():
            held, nothing = store.put(tensors[0]), tensors[0].detach().new_empty(0, device=device)
            self._waiting.append((held, tensors, nothing))
            _point(tensors, nothing)  # one by one: host memory never holds the weights twice
        store.settle()
        self.nbytes = sum(held.nbytes for held, _, _ in self._waiting)
        """On the card while awake, trainable ones left out."""
        self._guards = self._guard()

    @property
    def awake(self) -> bool:
        return not self._guards

    def park(self) -> None:
        """Frees the card's copy. No graph that will run backward may need it any more."""
        if self.awake:
            for _, tensors, nothing in self._waiting:
                _point(tensors, nothing)
            self._guards = self._guard()

    def wake(self) -> None:
        """Copies the weights to the card."""
        if not self.awake:
            for held, tensors, _ in self._waiting:
                _point(tensors, held.get())
            for guard in self._guards:
                guard.remove()
            self._guards = []

    def _guard(self) -> list[RemovableHandle]:
        # every part: models are entered anywhere, and parts without weights of their own look into those of their
        # children
        return [part.register_forward_pre_hook(self._refuse) for part in self._module.modules()]

    def _refuse(self, module: nn.Module, inputs: Any) -> None:
        raise LowmemError(
            f"{self._name} was called while its weights wait on the host (memory.park): it is awake only in its own stages. "
            f"Take it out of memory.park, or report this, since the program should have woken it."
        )


class Residency:
    """Parks and wakes models around the stages of a step.

    Args: modules: the models by name: ``critic``, ``vae``, ``transformer``, ``expert``. parked: the names of those
        whose weights wait on the host outside their stages. The others are left alone, on the card. streamed: by name
        the layers whose weights come one at a time. None is on the card outside the model's stages. needs: the models
        that are awake in each stage from its beginning. inner: entered inside each stage once the models it does not
        need are gone, before those it needs come: a peak meter, which so counts the weights of no other stage, and the
        time that waking takes.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        parked: Collection[str],
        device: torch.device,
        store: HostStore,
        inner: Callable[[str], AbstractContextManager[Any]],
        streamed: Mapping[str, Droppable] | None = None,
        needs: Mapping[str, Collection[str]] = NEEDS,
    ) -> None:
        unknown = set(parked) - set(modules)
        if unknown:
            raise ValueError(f"to be parked, but not among the modules: {sorted(unknown)}")
        self._models = {name: Parked(name, modules[name], device, store) for name in parked}
        self._streamed: Mapping[str, Droppable] = streamed or {}
        self._needs = needs
        self._inner = inner

    def add(self, name: str, layers: Droppable) -> None:
        """More weights of a model that come as they are needed. They are not on the card outside the model's stages."""
        self._streamed = {**self._streamed, name: layers}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """``Parts.stage``: in the block the models that the stage needs are awake, and no other one of those parked."""
        needed = self._needs[name]
        self._park_but(needed)
        with self._inner(name):
            self._wake(needed)
            yield

    def need_for(self, stage: str) -> None:
        """Outside a step: as at the beginning of a stage."""
        self.need(*self._needs[stage])

    def need(self, *names: str) -> None:
        """Outside a step (samples, checks), and where two models share a stage: from here to the next stage these are
        awake, and no other one of those parked."""
        self._park_but(names)
        self._wake(names)

    def _park_but(self, names: Collection[str]) -> None:
        for name, layers in self._streamed.items():
            if name not in names:
                layers.drop()
        for name, model in self._models.items():
            if name not in names:
                model.park()

    def _wake(self, names: Collection[str]) -> None:
        for name, model in self._models.items():
            if name in names:
                model.wake()


def bring(module: nn.Module, device: torch.device) -> None:
    """Moves to ``device`` what lies elsewhere. By tensors: ``to`` of diffusers' and transformers' models refuses some
    that were quantised."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type != device.type:
            tensor.data = tensor.data.to(device)


def _point(tensors: Sequence[Tensor], data: Tensor) -> None:
    for tensor in tensors:
        tensor.data = data


def _frozen(module: nn.Module) -> Iterator[Tensor]:
    """Each tensor object once, in the order of the module."""
    seen: set[int] = set()
    for tensor in (*module.parameters(), *module.buffers()):
        if not tensor.requires_grad and id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor
