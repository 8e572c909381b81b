"""Counts the bytes that operations allocate, on any device and also under fake tensors."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocated(TorchDispatchMode):
    """Tracks the bytes of storages that are allocated while the mode is on and not yet freed. ``dtype``: of tensors in
    this dtype alone."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0
        self._dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)):
            storage = tensor.untyped_storage()
            if id(storage) in self.alive or id(storage) in known or self._dtype not in (None, tensor.dtype):
                continue
            self.alive[id(storage)] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, id(storage))
        self.peak = max(self.peak, sum(self.alive.values()))
        return made
