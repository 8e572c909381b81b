"""Input checks and layouts that several kernels share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lowmem_drf.kernels.tiles import INTERPRETED

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def require_card(op: str, x: Tensor) -> None:
    """Raises ValueError where ``op`` cannot be launched. Launchers call it, and not public functions: fake tensors on
    the CPU, which stand for a card's, never reach a launcher."""
    if x.device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"{op}: tensors on {x.device}; Triton needs a CUDA card. "
            f"Use {op}_naive, or set TRITON_INTERPRET=1 before Triton is imported"
        )


def aligned(x: Tensor) -> Tensor:
    """``x`` as kernels read it 16 bytes at a time: the last dimension contiguous, at an address that 16 divides, with
    strides that 16 divides. Copied if it is not and a copy is (rows of a multiple of 16 channels): Triton would read it
    element by element."""
    odd = x.data_ptr() % 16 or any(stride % 16 for stride in x.stride()[:-1])
    wanted = x.stride(-1) != 1 or (odd and x.shape[-1] % 16 == 0)
    return x.clone(memory_format=torch.contiguous_format) if wanted else x


def row_stride(x: Tensor) -> int:
    """Stride of the batch; 0 if one row serves the whole batch."""
    return x.stride(0) if len(x) > 1 else 0


TOKENS_OF_A_SUM = 64
"""Tokens of a program that also adds up over tokens: it writes one partial sum of fp32 a channel."""


def tokens_of_a_program(padded: int, sums: bool, at_once: int) -> int:
    """Tokens that a program of a row operation takes in turn; what it reads once serves all of them.

    Args:
        padded: channels of a row, padded to a power of two. 4 tokens of Wan-1.3B and 16 of Wan-14B, where the padded
            row is long and few programs run at the same time.
        sums: it adds up over tokens.
        at_once: values that the largest tile takes at a time.
    """
    return max(TOKENS_OF_A_SUM if sums else max(4, padded // 512), at_once // padded)


def sum_rows(partial_PD: Tensor, shape: torch.Size) -> Tensor:
    """Adds up partial sums to one row per sequence, or to one row for all: ``shape`` is (B, D) or (1, D)."""
    return partial_PD.view(shape[0], -1, shape[1]).sum(1)


def check_rows(op: str, sequences: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> None:
    """Sequences (B, L, D) of one dtype, ``x`` among them, and fp32 rows (B, D) or (1, D).

    Raises:
        TypeError: another dtype.
        ValueError: shapes or devices that do not match.
    """
    x = sequences["x"]
    if x.dtype not in DTYPES:
        known = "bfloat16, float16 and float32"
        raise TypeError(f"{op}: x is {x.dtype}; the kernel takes {known}. For others there is {op}_naive")
    for name, tensor in (*sequences.items(), *rows.items()):
        if tensor.dtype != (wanted := x.dtype if name in sequences else torch.float32):
            raise TypeError(f"{op}: {name} is {tensor.dtype}; it must be {wanted}")
        if tensor.device != x.device or x.device.type == "meta":
            devices = f"{name} is on {tensor.device} and x on {x.device}"
            raise ValueError(f"{op}: {devices}; all must be on one device that holds values")
    if x.dim() != 3:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; it must be (B, L, D)")
    for name, tensor in sequences.items():
        if tensor.shape != x.shape:
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; it must be that of x, {tuple(x.shape)}")
    for name, tensor in rows.items():
        if tensor.dim() != 2 or tensor.shape[0] not in (1, x.shape[0]) or tensor.shape[1] != x.shape[2]:
            wanted = f"for x {tuple(x.shape)} it must be (B, D) or (1, D)"
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; {wanted}")
    if len({tensor.shape for tensor in rows.values()}) > 1:
        shapes = [tuple(tensor.shape) for tensor in rows.values()]
        raise ValueError(f"{op}: {' and '.join(rows)} have shapes {shapes}; they must agree")


def check_attention(
    tensors: Mapping[str, Tensor], scale: float | None,
    dtypes: Sequence[torch.dtype], head_dims: Sequence[int], otherwise: str,
) -> float:  # fmt: skip
    """Checks the inputs of an attention and returns the scale to use.

    Args:
        tensors: q, k, v, and others that must be on their device.
        otherwise: what to call for inputs that the kernel does not take.

    Raises:
        TypeError: a dtype outside ``dtypes``, or several dtypes.
        ValueError: shapes or devices that do not match; a scale that is not positive.
    """
    q, k, v = (tensors[name] for name in "qkv")
    if len({x.dtype for x in (q, k, v)}) > 1 or q.dtype not in dtypes:
        got = ", ".join(f"{name} {x.dtype}" for name, x in tensors.items())
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"q, k and v must have one dtype of {known}; got {got}. For others take {otherwise}.")
    if len({x.device for x in tensors.values()}) > 1 or q.device.type not in ("cuda", "cpu"):
        got = ", ".join(f"{name} on {x.device}" for name, x in tensors.items())
        raise ValueError(f"All tensors must be on one CUDA card; got {got}.")
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
    empty = 0 in (*q.shape, *k.shape)
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[::3] != k.shape[::3] or empty:
        raise ValueError(f"q must be (B, L, H, d), k and v (B, M, G, d), none of them empty; got {shapes}.")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"The heads of q must be a multiple of those of k; got {shapes}.")
    if q.shape[3] not in head_dims:
        raise ValueError(f"The head dimension must be one of {head_dims}; got {shapes}. For others take {otherwise}.")
    if scale is not None and scale <= 0:
        raise ValueError(f"scale must be positive, got {scale}.")
    return q.shape[3] ** -0.5 if scale is None else float(scale)
