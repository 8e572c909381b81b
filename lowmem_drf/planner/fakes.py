"""Runs the step's own code on fake tensors (``torch._subclasses.fake_tensor``): shapes and dtypes without values, at
true size on any machine.

Python code reads values from tensors: which frames, how many tokens, is this finite? ``Fakes`` keeps small tensors real
if they are created without inputs or computed from real ones only: sigmas, ids, grids, positions, windows and masks
have their values. Everything computed from a fake tensor is fake; reading its value returns 1, so checks for finite
values pass.

A step repeats the same few thousand operations many times. ``_Result`` caches an operator's result by the shapes of its
arguments, and rebuilds it without ``FakeTensorMode``. The mode's own cache takes ten times as long and supports neither
custom operators nor real tensors among fake ones. Results that are not cached yet come from PyTorch's own kernels for
tensors without values where these are all that the mode would ask (``DIRECT``).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    disable_fake_tensor_cache,
    in_kernel_invocation_manager,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode

REAL_LIMIT = 1 << 24
"""Elements: larger tensors created without inputs (``zeros``, ``arange``) are fake."""
READ_LIMIT = 1 << 16
"""Elements of floating tensors: no code reads a value of larger ones, so they are fake too."""

_aten = torch.ops.aten
DEVICE_OF = torch.ops.prim.device.default
"""C++ code asks fake tensors for their device: by far the most frequent call."""

_ITEM = _aten._local_scalar_dense.default
_PLAIN = {int, bool, float, type(None), torch.dtype}
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
DIRECT = {
    *(_aten.slice.Tensor, _aten.select.int, _aten.split.Tensor, _aten._unsafe_view.default),
    *(_aten.transpose.int, _aten.t.default, _aten.permute.default, _aten.expand.default, _aten.unsqueeze.default),
    *(_aten.detach.default, _aten.alias.default, _aten.clone.default, _aten.cat.default, _aten.copy_.default),
    *(_aten.new_zeros.default, _aten.new_empty.default, _aten.zeros_like.default, _aten._to_copy.default),
    *(_aten.add.Tensor, _aten.add_.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.mul_.Tensor, _aten.div.Tensor),
    *(_aten.mm.default, _aten.addmm.default, _aten.addmm_.default, _aten.bmm.default, _aten.slice_backward.default),
    *(_aten.pow.Tensor_Scalar, _aten.clamp.default, _aten.mean.default, _aten.mean.dim, _aten.sum.dim_IntList),
    *(_aten.silu.default, _aten._log_softmax.default, _aten._log_softmax_backward_data.default),
}
"""Operators whose kernel for tensors without values says all about their results. ``FakeTensorMode`` reaches the same
answer by a much longer way, or by a decomposition in Python."""
_COPIES = {_aten.clone.default, _aten._to_copy.default}
_UNPREDICTABLE = {torch.Tag.inplace_view, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Fakes(TorchDispatchMode):
    """Enter this in place of ``mode``, a ``FakeTensorMode(allow_non_fake_inputs=True)``. It enters ``mode`` too: fake
    tensors would do so for each operator, at several times the operator's cost."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode
        self._results: dict[Hashable, _Result | None] = {}
        self._large: dict[Hashable, bool] = {}
        self.kept: dict[Hashable, Any] = {}
        """What plans with these fakes found, for later ones."""

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
        elif not (_may_be_large(func, tensors) and self._is_large(func, args, kwargs)):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        return self._fake(func, args, kwargs, tensors)

    def known(self, key: Hashable) -> _Result | None:
        """What a call with this ``key`` returns, without the way through PyTorch's dispatcher, if it is cached."""
        return self._results.get(key)

    def _is_large(self, func: Any, args: Any, kwargs: Any) -> bool:
        if any(isinstance(value, torch.Generator) for value in (*args, *kwargs.values())):
            return False  # the real run draws on the CPU too
        key, _ = key_of(func, args, kwargs)
        if key not in self._large:
            made = func(*args, **kwargs)
            self._large[key] = any(_too_large(tensor) for tensor in tensors_of((made,)))
        return self._large[key]

    def _fake(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """``func(*args, **kwargs)`` with fake results."""
        key, _ = key_of(func, args, kwargs)
        if (known := self._results.get(key)) is not None:
            return known.rebuild(tensors)[0]
        if func in DIRECT and all(type(tensor) is FakeTensor for tensor in tensors):
            out = self.direct(func, args, kwargs)
        else:
            with disable_fake_tensor_cache(self.mode):
                out = func(*args, **kwargs)
        if key not in self._results:
            # written to, not made to fit: the arguments look as before
            same = key_of(func, args, kwargs)[0] == key
            self._results[key] = _Result.of(out, tensors) if same and _predictable(func, tensors) else None
        return out

    def direct(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of an operator of ``DIRECT`` for fake tensors."""
        if kwargs.get("device") is not None:
            kwargs = kwargs | {"device": torch.device("meta")}
        with in_kernel_invocation_manager(self.mode):
            out = func(*args, **kwargs)
        device = next(iter(tensors_of(args))).device

        def fake(one: Any) -> Any:
            return one if isinstance(one, FakeTensor) else FakeTensor(self.mode, one, device)

        return [fake(one) for one in out] if isinstance(out, list) else fake(out)


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

    def rebuild(self, tensors: Sequence[Tensor]) -> tuple[Any, list[Any]]:
        """The result for these arguments, and the tensors in it."""
        with torch._C._DisableTorchDispatch():
            made = [tensors[part] if isinstance(part, int) else part and part.rebuild(tensors) for part in self.parts]
        there = [one for one in made if one is not None]  # bitsandbytes' operators return nothing
        return (made[0] if self.container is None else self.container(made)), there


def _too_large(tensor: Tensor) -> bool:
    return tensor.numel() > (READ_LIMIT if tensor.is_floating_point() else REAL_LIMIT)


def _may_be_large(func: Any, tensors: Sequence[Tensor]) -> bool:
    """Whether the result of an operator on real tensors may be too large to be real. Views stay real, and what is
    written to, and copies of buffers, which take the buffer's place."""
    if func in _COPIES or any(one.alias_info for one in func._schema.arguments):
        return False
    return not tensors or any(tensor.numel() > READ_LIMIT for tensor in tensors)


def _bytes_of(tensor: Tensor) -> int:
    """Size of the smallest storage that holds the tensor at offset 0."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size() if tensor.numel() else 0


def _predictable(func: Any, tensors: Iterable[Tensor]) -> bool:
    """True if shapes and dtypes of the arguments determine those of the results."""
    if func not in _INDEXING and _UNPREDICTABLE & set(func.tags):
        return False
    # FakeTensorMode first converts a real tensor that is viewed or changed in place
    written = any(one.alias_info for one in func._schema.arguments)
    return not written or all(isinstance(one, FakeTensor) for one in tensors)


def key_of(func: Any, args: Iterable[Any], kwargs: Mapping[str, Any]) -> tuple[Hashable, list[Tensor]]:
    """Everything that the shapes and dtypes of an operator's results can depend on, and the tensors among its
    arguments. Operators are never freed, and their own hash is slow."""
    tensors: list[Tensor] = []
    looks = _looks(args, tensors)
    if not kwargs:
        return (id(func), torch.get_default_dtype(), looks), tensors
    return (id(func), torch.get_default_dtype(), looks, tuple(kwargs), _looks(kwargs.values(), tensors)), tensors


def _looks(values: Iterable[Any], tensors: list[Tensor]) -> tuple[Hashable, ...]:
    """Includes the types: 1, 1.0 and True are equal but promote differently. Appends to ``tensors``."""
    looks: list[Hashable] = []
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            tensors.append(value)
            looks.append((value.shape, value.stride(), value.dtype, value.storage_offset(), value.fake_device))
        elif kind in _PLAIN:
            looks.append((kind, value))
        elif kind is list or kind is tuple:
            looks.append(_looks(value, tensors))
        elif isinstance(value, Tensor):
            tensors.append(value)
            looks.append((value.shape, value.stride(), value.dtype, (value.storage_offset(), value.device)))
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
