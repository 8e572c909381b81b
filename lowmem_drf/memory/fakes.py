"""Running the step's own code on fake tensors (``torch._subclasses.fake_tensor``): shapes and dtypes without values, at true size on any machine.

Python code asks tensors for values: which frames, how many tokens, is this finite? ``Fakes`` keeps small tensors that are made from nothing, and all
that is computed from such alone, real: sigmas, ids, grids, positions, windows and masks have their values. What has met a fake tensor is fake, and
answers for its value with 1, so that every check for finite values passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

REAL_LIMIT = 1 << 24
"""Elements: what is made from nothing (``zeros``, ``arange``) is fake above this size."""

_aten = torch.ops.aten
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}


class Fakes(TorchDispatchMode):
    """To be entered in place of ``mode``, a ``FakeTensorMode(allow_non_fake_inputs=True)``: it enters that too. (Fake tensors would bring it along, at
    several times the cost of an operator.)"""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode

    def __enter__(self) -> Fakes:
        self.mode.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.mode.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = tensors_of(args, kwargs)
        if any(isinstance(tensor, FakeTensor) for tensor in tensors):
            if func is _aten._local_scalar_dense.default:
                return _stand_in(args[0].dtype)
            return func(*_with_places(func, args), **kwargs)
        if not tensors and self._is_large(func, args, kwargs):
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            return func(*args, **kwargs)

    def _is_large(self, func: Any, args: Any, kwargs: Any) -> bool:
        if any(isinstance(value, torch.Generator) for value in (*args, *kwargs.values())):
            return False  # drawn on the CPU in the real run too
        made = func(*args, **kwargs)
        return any(tensor.numel() > REAL_LIMIT for tensor in tensors_of((made,)))


def tensors_of(args: Iterable[Any], kwargs: Mapping[str, Any] | None = None) -> list[Tensor]:
    """The tensors among an operator's arguments or results, those in lists included. A pytree would do, at several times the cost of the operator."""
    found = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [item for item in value if isinstance(item, Tensor)]
    return found


def _stand_in(dtype: torch.dtype) -> bool | int | float:
    if dtype is torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


def _with_places(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A real mask among the indices of a fake tensor as the places it marks: their number is the result's shape."""
    if func not in _INDEXING:
        return args
    x, indices, *rest = args
    places: list[Any] = []
    for index in indices:
        marks = isinstance(index, Tensor) and index.dtype is torch.bool and not isinstance(index, FakeTensor)
        with unset_fake_temporarily():
            places += index.nonzero().unbind(1) if marks else [index]
    return (x, places, *rest)
