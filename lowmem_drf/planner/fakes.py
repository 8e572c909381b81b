"""Runs the step's own code on fake tensors (``torch._subclasses.fake_tensor``): shapes and dtypes without values, at
true size on any machine.

Python code reads values from tensors: which frames, how many tokens, is this finite? ``Fakes`` keeps small tensors real
if they are created without inputs or computed from real ones only: sigmas, ids, grids, positions, windows and masks
have their values. Everything computed from a fake tensor is fake; reading its value returns 1, so checks for finite
values pass.

A step repeats the same few thousand operations many times. ``_Result`` caches an operator's result by the shapes of its
arguments, and rebuilds it without ``FakeTensorMode``. The mode's own cache takes ten times as long and supports neither
custom operators nor real tensors among fake ones.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, disable_fake_tensor_cache, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

REAL_LIMIT = 1 << 24
"""Elements: larger tensors created without inputs (``zeros``, ``arange``) are fake."""

_aten = torch.ops.aten
DEVICE_OF = torch.ops.prim.device.default
"""C++ code asks fake tensors for their device: by far the most frequent call."""

UNKNOWN = object()

_ITEM = _aten._local_scalar_dense.default
_PLAIN = {int, bool, float, type(None), torch.dtype}
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
_UNPREDICTABLE = {torch.Tag.inplace_view, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Fakes(TorchDispatchMode):
    """Enter this in place of ``mode``, a ``FakeTensorMode(allow_non_fake_inputs=True)``. It enters ``mode`` too: fake
    tensors would do so for each operator, at several times the operator's cost."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode
        self._results: dict[Hashable, _Result | None] = {}
        self._large: dict[Hashable, bool] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here; PyTorch's guard against it takes longer than most operators

    def __enter__(self) -> Fakes:
        self.mode.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.mode.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE_OF:
            return args[0].device
        kwargs = kwargs or {}
        tensors = tensors_of(args, kwargs)
        if any(isinstance(tensor, FakeTensor) for tensor in tensors):
            if func is _ITEM:
                return _stand_in(args[0].dtype)
            if func in _INDEXING:
                args = _with_positions(args)
                tensors = tensors_of(args, kwargs)
        elif tensors or not self._is_large(func, args, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        return self._fake(func, args, kwargs, tensors)

    def known(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result, if it is cached: what a call would return, without the way through PyTorch's dispatcher. Else
        ``UNKNOWN``."""
        if (known := self._results.get(key_of(func, args, kwargs))) is None or func in _INDEXING:
            return UNKNOWN
        return known.rebuild(tensors_of(args, kwargs))

    def _is_large(self, func: Any, args: Any, kwargs: Any) -> bool:
        if any(isinstance(value, torch.Generator) for value in (*args, *kwargs.values())):
            return False  # the real run draws on the CPU too
        key = key_of(func, args, kwargs)
        if key not in self._large:
            made = func(*args, **kwargs)
            self._large[key] = any(tensor.numel() > REAL_LIMIT for tensor in tensors_of((made,)))
        return self._large[key]

    def _fake(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """``func(*args, **kwargs)`` with fake results."""
        key = key_of(func, args, kwargs)
        if (known := self._results.get(key)) is not None:
            return known.rebuild(tensors)
        with disable_fake_tensor_cache(self.mode):
            out = func(*args, **kwargs)
        if key not in self._results:
            self._results[key] = _Result.of(out, tensors) if _predictable(func, tensors) else None
        return out


@dataclass(frozen=True, slots=True)
class _Made:
    """A fake tensor that an operator returned."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    offset: int
    base: int | None
    """Index of the operator's tensor that shares its storage; None if it has its own."""
    attributes: dict[str, Any]
    """Set by the constructor of ``FakeTensor``."""

    def rebuild(self, tensors: Sequence[Tensor]) -> Tensor:
        """Does what the constructor does, in a fifth of the time."""
        meta = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        if self.base is not None:
            meta.set_(tensors[self.base].untyped_storage(), self.offset, self.shape, self.stride)
        fake: Tensor = Tensor._make_subclass(
            FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=self.device
        )
        fake.__dict__.update(self.attributes)
        return fake


@dataclass(frozen=True, slots=True)
class _Result:
    """An operator's result for arguments of the same shapes and dtypes."""

    parts: tuple[_Made | int | None, ...]
    """A number is the index of an argument: in-place operators return one."""
    container: type | None
    """``list`` or ``tuple``; None: a single tensor."""

    @classmethod
    def of(cls, out: Any, tensors: Sequence[Tensor]) -> _Result | None:
        """None if it cannot be rebuilt."""
        container = type(out) if isinstance(out, list | tuple) else None
        indices = {id(tensor): index for index, tensor in enumerate(tensors)}
        bases = {tensor.untyped_storage()._cdata: index for index, tensor in enumerate(tensors)}
        shared = len(bases) < len(tensors)
        parts: list[_Made | int | None] = []
        for one in out if container else (out,):
            if one is None or id(one) in indices:
                parts.append(None if one is None else indices[id(one)])
                continue
            if not isinstance(one, FakeTensor) or one.is_complex() or one.constant is not None:
                return None
            storage = one.untyped_storage()
            base = bases.get(storage._cdata)
            if base is None:
                bases[storage._cdata] = -1  # a second result in this storage is not rebuilt
                if storage.nbytes() != _bytes_of(one):
                    return None
            elif base < 0 or shared:
                return None
            parts.append(
                _Made(one.shape, one.stride(), one.dtype, one.device, int(one.storage_offset()), base, dict(vars(one)))
            )
        return cls(tuple(parts), container)

    def rebuild(self, tensors: Sequence[Tensor]) -> Any:
        with torch._C._DisableTorchDispatch():
            made = [tensors[part] if isinstance(part, int) else part and part.rebuild(tensors) for part in self.parts]
        return self.container(made) if self.container else made[0]


def _bytes_of(tensor: Tensor) -> int:
    """Size of the smallest storage that holds the tensor at offset 0."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size() if tensor.numel() else 0


def _predictable(func: Any, tensors: Iterable[Tensor]) -> bool:
    """True if shapes and dtypes of the arguments determine those of the results, and the arguments keep theirs."""
    arguments = func._schema.arguments
    if any(argument.is_out for argument in arguments) or (func not in _INDEXING and _UNPREDICTABLE & set(func.tags)):
        return False
    # FakeTensorMode first converts a real tensor that is viewed or changed in place
    return all(isinstance(one, FakeTensor) for one in tensors) or not any(one.alias_info for one in arguments)


def key_of(func: Any, args: Iterable[Any], kwargs: Mapping[str, Any]) -> Hashable:
    """Everything that the shapes and dtypes of an operator's results can depend on. Operators are never freed, and
    their own hash is slow."""
    if not kwargs:
        return id(func), torch.get_default_dtype(), _looks(args)
    return id(func), torch.get_default_dtype(), _looks(args), tuple(kwargs), _looks(kwargs.values())


def _looks(values: Iterable[Any]) -> tuple[Hashable, ...]:
    """Includes the types: 1, 1.0 and True are equal but promote differently."""
    looks: list[Hashable] = []
    for value in values:
        kind = type(value)
        if kind in _PLAIN:
            looks.append((kind, value))
        elif isinstance(value, Tensor):
            place = value.storage_offset(), value.device, kind is FakeTensor
            looks.append((value.shape, value.stride(), value.dtype, place))
        elif kind is list or kind is tuple:
            looks.append(_looks(value))
        else:
            looks.append((kind, value))
    return tuple(looks)


def tensors_of(args: Iterable[Any], kwargs: Mapping[str, Any] | None = None) -> list[Tensor]:
    """The tensors among an operator's arguments or results, also in lists. A pytree would cost several times as much
    as the operator."""
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


def _with_positions(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Replaces real masks among the indices of a fake tensor by positions: their number is the result's shape."""
    x, indices, *rest = args
    positions: list[Any] = []
    for index in indices:
        is_mask = isinstance(index, Tensor) and index.dtype is torch.bool and not isinstance(index, FakeTensor)
        with unset_fake_temporarily():
            positions += index.nonzero().unbind(1) if is_mask else [index]
    return (x, positions, *rest)
