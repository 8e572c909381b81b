"""Running the step's own code on fake tensors (``torch._subclasses.fake_tensor``): shapes and dtypes without values, at
true size on any machine.

Python code asks tensors for values: which frames, how many tokens, is this finite? ``Fakes`` keeps small tensors that
are made from nothing, and all that is computed from such alone, real: sigmas, ids, grids, positions, windows and masks
have their values. What has met a fake tensor is fake, and answers for its value with 1, so that every check for finite
values passes.

A step does the same few thousand operations over and over. What an operator made of arguments of these shapes is
remembered (``_Result``) and made again without asking ``FakeTensorMode``, whose own cache takes ten times as long and
knows neither custom operators nor real tensors among fake ones.
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
"""Elements: what is made from nothing (``zeros``, ``arange``) is fake above this size."""

_aten = torch.ops.aten
DEVICE_OF = torch.ops.prim.device.default
"""A question that C++ code asks of fake tensors, and by far the most frequent call."""

_ITEM = _aten._local_scalar_dense.default
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
_UNPREDICTABLE = {torch.Tag.inplace_view, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Fakes(TorchDispatchMode):
    """To be entered in place of ``mode``, a ``FakeTensorMode(allow_non_fake_inputs=True)``: it enters that too. (Fake
    tensors would bring it along, at several times the cost of an operator.)"""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode
        self._results: dict[Hashable, _Result | None] = {}
        self._large: dict[Hashable, bool] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # nothing is compiled under this mode: PyTorch's guard against that takes longer than most operators here
        return False

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
                args = _with_places(args)
                tensors = tensors_of(args, kwargs)
        elif tensors or not self._is_large(func, args, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        return self._fake(func, args, kwargs, tensors)

    def _is_large(self, func: Any, args: Any, kwargs: Any) -> bool:
        if any(isinstance(value, torch.Generator) for value in (*args, *kwargs.values())):
            return False  # drawn on the CPU in the real run too
        key = key_of(func, args, kwargs)
        if key not in self._large:
            made = func(*args, **kwargs)
            self._large[key] = any(tensor.numel() > REAL_LIMIT for tensor in tensors_of((made,)))
        return self._large[key]

    def _fake(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """``func(*args, **kwargs)`` with fake results."""
        key = key_of(func, args, kwargs)
        known = self._results.get(key)
        if known is not None:
            return known.again(tensors)
        with disable_fake_tensor_cache(self.mode):
            out = func(*args, **kwargs)
        if key not in self._results:
            self._results[key] = _Result.of(out, tensors) if _predictable(func, tensors) else None
        return out


@dataclass(frozen=True, slots=True)
class _Made:
    """A fake tensor that an operator made."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    offset: int
    base: int | None
    """The place among the operator's tensors of the one whose storage it shares. None: its storage is its own."""
    attributes: dict[str, Any]
    """As the constructor of ``FakeTensor`` set them."""

    def again(self, tensors: Sequence[Tensor]) -> Tensor:
        """As that constructor makes it, in a fifth of the time."""
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
    """What an operator returns whenever its arguments look the same."""

    parts: tuple[_Made | int | None, ...]
    """A number is the place of the tensor among its own: what in-place operators return."""
    container: type | None
    """``list`` or ``tuple``; None: the only part itself."""

    @classmethod
    def of(cls, out: Any, tensors: Sequence[Tensor]) -> _Result | None:
        """None where this could not make it again."""
        container = type(out) if isinstance(out, list | tuple) else None
        places = {id(tensor): place for place, tensor in enumerate(tensors)}
        bases = {tensor.untyped_storage()._cdata: place for place, tensor in enumerate(tensors)}
        shared = len(bases) < len(tensors)
        parts: list[_Made | int | None] = []
        for one in out if container else (out,):
            if one is None or id(one) in places:
                parts.append(None if one is None else places[id(one)])
                continue
            if not isinstance(one, FakeTensor) or one.is_complex() or one.constant is not None:
                return None
            storage = one.untyped_storage()
            base = bases.get(storage._cdata)
            if base is None:
                bases[storage._cdata] = -1  # a second result in it is not made again
                if storage.nbytes() != _bytes_of(one):
                    return None
            elif base < 0 or shared:
                return None
            parts.append(
                _Made(one.shape, one.stride(), one.dtype, one.device, int(one.storage_offset()), base, dict(vars(one)))
            )
        return cls(tuple(parts), container)

    def again(self, tensors: Sequence[Tensor]) -> Any:
        with torch._C._DisableTorchDispatch():
            made = [
                part.again(tensors) if isinstance(part, _Made) else part if part is None else tensors[part]
                for part in self.parts
            ]
        return self.container(made) if self.container else made[0]


def _bytes_of(tensor: Tensor) -> int:
    """Of the smallest storage that holds it from its beginning on."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size() if tensor.numel() else 0


def _predictable(func: Any, tensors: Iterable[Tensor]) -> bool:
    """Whether all about its results but their values follows from the shapes and dtypes of its arguments, and these
    keep theirs."""
    arguments = func._schema.arguments
    if any(argument.is_out for argument in arguments) or (func not in _INDEXING and _UNPREDICTABLE & set(func.tags)):
        return False
    # a view of a real tensor, or work in place on one: FakeTensorMode makes it another, fake one first
    return all(isinstance(tensor, FakeTensor) for tensor in tensors) or not any(
        argument.alias_info for argument in arguments
    )


def key_of(func: Any, args: Iterable[Any], kwargs: Mapping[str, Any]) -> Hashable:
    """All that the shapes and dtypes of an operator's results can depend on."""
    return func, torch.get_default_dtype(), _looks(args), tuple(kwargs), _looks(kwargs.values())


def _looks(values: Iterable[Any]) -> tuple[Hashable, ...]:
    """The types belong to it: 1 and 1.0 and True are equal and promote differently."""
    return tuple(
        (value.shape, value.stride(), value.storage_offset(), value.dtype, value.device, type(value) is FakeTensor)
        if isinstance(value, Tensor)
        else _looks(value)
        if isinstance(value, list | tuple)
        else (type(value), value)
        for value in values
    )


def tensors_of(args: Iterable[Any], kwargs: Mapping[str, Any] | None = None) -> list[Tensor]:
    """The tensors among an operator's arguments or results, those in lists included. A pytree would do, at several
    times the cost of the operator."""
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


def _with_places(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A real mask among the indices of a fake tensor as the places it marks: their number is the result's shape."""
    x, indices, *rest = args
    places: list[Any] = []
    for index in indices:
        marks = isinstance(index, Tensor) and index.dtype is torch.bool and not isinstance(index, FakeTensor)
        with unset_fake_temporarily():
            places += index.nonzero().unbind(1) if marks else [index]
    return (x, places, *rest)
