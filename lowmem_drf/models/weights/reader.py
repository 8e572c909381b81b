"""Reads safetensors files tensor by tensor: each is changed, packed and moved before the next one is read.

So the host holds one tensor at a time, in allocated memory. safetensors would map the file: on some systems that counts
as the process's memory, and the tensors would change with the file.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lowmem_drf.models.weights.files import listed_weights, read_header
from lowmem_drf.models.weights.filling import Value, fill_as_loaded
from lowmem_drf.models.weights.finite import refuse_weights
from lowmem_drf.models.weights.packed_linear import PackedLinear
from lowmem_drf.models.weights.sources import refuse_missing
from lowmem_drf.terminal import working
from lowmem_drf.texts import one_line

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""safetensors' names of full precision. All others hold quantised weights (``fp8_files.py``)."""
FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
INTEGERS = {"I8": torch.int8, "U8": torch.uint8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}

Shapes = Mapping[str, tuple[int, ...]]
Change = Callable[[Tensor], Tensor]
"""A parameter, in fp32 or fp64 -> the tensor to add to it, in its shape and dtype and on its device."""
Changes = Callable[[Shapes], Mapping[str, Change]]
"""Shapes of a model's parameters by name -> changes of some of them by name."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Location of a tensor."""

    file: Path
    start: int
    """Byte offset in the file."""
    dtype: str
    """As safetensors names it."""
    shape: tuple[int, ...]


class Tensors(Protocol):
    """Files whose tensors are read one by one in full precision, however they are stored."""

    entries: dict[str, Entry]

    def read(self, name: str) -> Tensor: ...


class TensorFiles:
    """The tensors of safetensors files. Raises ValueError or OSError for a damaged or missing file."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, str] = {}
        """What a program wrote into the header."""
        for file in files:
            header, start = read_header(file)
            for name, entry in header.items():
                if name == "__metadata__":
                    self.metadata |= {key: value for key, value in entry.items() if isinstance(value, str)}
                else:
                    offset = start + entry["data_offsets"][0]
                    self.entries[name] = Entry(file, offset, entry["dtype"], tuple(entry["shape"]))

    def read(self, name: str, dtypes: Mapping[str, torch.dtype] = DTYPES) -> Tensor:
        """On the CPU, in the file's dtype. Raises ValueError for a dtype not in ``dtypes``, or a truncated file."""
        entry = self.entries[name]
        if entry.dtype not in dtypes:
            raise ValueError(
                f"its weights are quantised already ({one_line(name, 80)} is {entry.dtype}); "
                "give the model in 16 or 32 bit"
            )
        made = torch.empty(entry.shape, dtype=dtypes[entry.dtype])
        with entry.file.open("rb", buffering=0) as stream:
            stream.seek(entry.start)
            flat: Any = made.view(-1).view(torch.uint8).numpy()
            left = memoryview(flat)
            while left:
                count = stream.readinto(left)
                if not count:
                    raise ValueError(f"{entry.file} is cut off")
                left = left[count:]
        return made


def files_in(folder: Path) -> list[Path]:
    """A model's weight files, sorted. Raises ValueError or OSError if there are none, BadInputError for a damaged
    index."""
    if not (files := listed_weights(folder)):
        raise ValueError(f"there are no safetensors files in {folder}")
    return files


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes by parameter name; of packed weights, the unpacked shapes."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} | {
        f"{name}.weight": module.shape for name, module in model.named_modules() if isinstance(module, PackedLinear)
    }


def require_complete(files: TensorFiles, model: Any) -> None:
    """Raises ValueError unless there is a tensor of the right shape for every parameter; warns of unused tensors."""
    shapes, entries = parameter_shapes(model), files.entries
    refuse_missing(shapes.keys() - entries.keys())
    if other := [name for name, shape in shapes.items() if entries[name].shape != shape]:
        described, held = (list(shape) for shape in (shapes[other[0]], entries[other[0]].shape))
        raise ValueError(f"its config.json describes {other[0]} as {described}, and its weights have it as {held}")
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    if unused := sorted(name for name in entries.keys() - shapes.keys() if not any(part in name for part in ignored)):
        where = entries[unused[0]].file.parent
        warnings.warn(
            f"{len(unused)} tensors of {where} are not used (the first: {one_line(unused[0], 80)})", stacklevel=2
        )


def fill_from_files(
    model: Any,
    files: Tensors,
    names: Mapping[str, str],
    dtype: torch.dtype,
    device: str | torch.device,
    home: str | torch.device | None = None,
    changes: Changes | None = None,
    blocks: int | None = None,
    taken: Callable[[nn.Parameter], None] | None = None,
    stack: str = "blocks",
) -> Any:
    """Fills a model that is on ``meta``; frozen, in eval mode. Dtypes are those that ``from_pretrained`` would give.

    Args:
        names: parameter name -> name in the files.
        device: where weights are changed and packed.
        home: final device. Default: ``device``.
        changes: added in fp32 (fp64 in an fp64 model), before rounding and packing.
        blocks: read only the first N blocks. The others get shapes but no memory, which is enough to take a LoRA.
        taken: called with every filled parameter before the next one is read (``filling.fill``).
        stack: name of the model's list of blocks.

    Raises BadInputError: a tensor holds NaN or infinity.
    """
    device, home = torch.device(device), torch.device(device if home is None else home)
    changed = changes(parameter_shapes(model)) if changes else {}
    packed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, PackedLinear)}

    def value_of(wanted: torch.dtype) -> Value:
        exact = torch.promote_types(wanted, torch.float32)

        def value(name: str, shape: Sequence[int]) -> Tensor:
            if blocks is not None and name.startswith(f"{stack}.") and int(name.split(".")[1]) >= blocks:
                return torch.zeros((), dtype=wanted, device=home).expand(tuple(shape))
            read, change = files.read(names[name]), changed.get(name)
            if change is None:
                made = read.to(device) if name in packed else read.to(home, wanted)
            else:
                total = read.to(device, exact)
                total = total + change(total)
                made = total if name in packed else total.to(home, wanted)
                del total
            refuse_weights({name: made}, files.entries[names[name]].file)
            advance(1)
            return made

        return value

    with working("reading the transformer", len(parameter_shapes(model))) as advance:
        return fill_as_loaded(model, dtype, value_of, home, taken)
