"""Parking and waking of models: which weights are on the card, and when.

Frozen weights never change, so the host keeps one copy of them for good: parking drops the card's copy, waking makes
one, nothing is ever copied back. Each tensor gets its own block of card memory: in one large block, a small tensor
allocated there while it is free would keep the allocator from ever using it as a whole again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import MappingProxyType
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
    "critic": frozenset({"critic", "rewards"}),
    "vae_backward": frozenset({"vae"}),
    "denoise_backward": frozenset({"transformer"}),
    "update": frozenset(),
}
"""The models that each stage calls."""


class Droppable(Protocol):
    """Weights that come to the card on demand: ``streaming.Streamed``, ``zero.ZeroEngine``."""

    def drop(self) -> None:
        """Frees all of them on the card, except those that a graph holds."""
        ...


class Parked:
    """A module whose frozen weights (parameters without gradient, buffers) live on the host, and on ``device`` while it
    is awake. Trainable parameters are moved to ``device`` and stay there.

    It begins parked, wherever its weights were: a module loaded on the host reaches the card when it is first woken.
    Parameters remain the same objects, with their dtype and ``device``, and are empty while parked. Awake they are
    contiguous.
    """

    def __init__(self, name: str, module: nn.Module, device: torch.device, store: HostStore) -> None:
        self._name, self._module = name, module
        for parameter in module.parameters():
            if parameter.requires_grad and parameter.device.type != device.type:
                parameter.data = parameter.data.to(device)
        # tied weights share one storage, and must share one again when they are woken
        groups: dict[Any, list[Tensor]] = {}
        for tensor in _frozen(module):
            view = tensor.storage_offset(), tensor.shape, tensor.stride()
            groups.setdefault((tensor.untyped_storage()._cdata, *view), []).append(tensor)
        self._waiting: list[tuple[Held, list[Tensor], Tensor]] = []
        for tensors in groups.values():
            held, nothing = store.put(tensors[0]), tensors[0].detach().new_empty(0, device=device)
            self._waiting.append((held, tensors, nothing))
            _point(tensors, nothing)  # one by one: host memory never holds the weights twice
        store.settle()
        self.nbytes = sum(held.nbytes for held, _, _ in self._waiting)
        """Bytes on the card while awake, without trainable parameters."""
        self._guards = self._guard()

    @property
    def awake(self) -> bool:
        return not self._guards

    def park(self) -> None:
        """Frees the card's copy. No graph whose backward is still to run may need it."""
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
        # on every submodule: any may be called directly, and one without weights may read its children's
        return [part.register_forward_pre_hook(self._refuse) for part in self._module.modules()]

    def _refuse(self, module: nn.Module, inputs: Any) -> None:
        raise LowmemError(
            f"{self._name} was called while its weights wait on the host (memory.park): it is awake only in its own "
            "stages. Take it out of memory.park, or report this, since the program should have woken it."
        )


class Residency:
    """Parks and wakes models around the stages of a step.

    Args:
        modules: the models by name: ``critic``, ``rewards``, ``vae``, ``transformer``, ``expert``.
        parked: names of the models offloaded to the host between their stages. The others stay on the card.
        inner: context of each stage, entered after the other models are parked and before the stage's own are woken. A
            peak meter there counts no other stage's weights, and counts the time of waking.
        streamed: by name, weights that come layer by layer. They are dropped outside the model's stages.
        needs: the models that are awake in each stage from its beginning.
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
        if unknown := set(parked) - set(modules):
            raise ValueError(f"to be parked, but not among the modules: {sorted(unknown)}")
        self._models = {name: Parked(name, modules[name], device, store) for name in parked}
        self._streamed: Mapping[str, Droppable] = streamed or {}
        self._needs = needs
        self._inner = inner
        self.running = ""
        """The stage that runs."""

    def add(self, name: str, layers: Droppable) -> None:
        """Adds streamed weights of a model."""
        self._streamed = {**self._streamed, name: layers}

    @contextmanager
    def stage(self, name: str, spared: Mapping[str, Collection[str]] = MappingProxyType({})) -> Iterator[None]:
        """``Parts.stage``: inside it the models that the stage needs are awake, and all other parked models are
        asleep. ``spared``: by model, stages in which another takes its place."""
        needed = [model for model in self._needs[name] if name not in spared.get(model, ())]
        self._park_but(needed)
        with self._inner(name):
            self._wake(needed)
            self.running = name
            try:
                yield
            finally:
                self.running = ""

    def need_for(self, stage: str) -> None:
        """Outside a step: wakes and parks as at the beginning of a stage."""
        self.need(*self._needs[stage])

    def need(self, *names: str) -> None:
        """Wakes these models and parks all others, until the next stage: for samples and checks outside a step, and for
        two models that share a stage."""
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
    """Moves tensors on other devices to ``device``. By tensors, since ``to`` of diffusers' and transformers' models
    refuses some quantised models."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type != device.type:
            tensor.data = tensor.data.to(device)


def _point(tensors: Sequence[Tensor], data: Tensor) -> None:
    for tensor in tensors:
        tensor.data = data


def _frozen(module: nn.Module) -> Iterator[Tensor]:
    """Each tensor object once, in the module's order."""
    seen: set[int] = set()
    for tensor in (*module.parameters(), *module.buffers()):
        if not tensor.requires_grad and id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor
