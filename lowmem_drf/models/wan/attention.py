"""Attention back ends of the Wan transformer: our kernel, and those that diffusers' attention dispatcher offers
(PyTorch's SDPA, xformers, flash-attn)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from lowmem_drf.errors import BadInputError
from lowmem_drf.ops import Attention, AttentionName, sdpa_backward, sdpa_forward, triton_attention, why_no_triton

DISPATCHED: dict[AttentionName, str] = {"sdpa": "native", "xformers": "xformers", "flash": "flash"}
"""Names of ``kernels.attention`` -> of ``diffusers.models.attention_dispatch.AttentionBackendName``."""

CURES: dict[AttentionName, str] = {
    "xformers": 'pip install "lowmem-drf[xformers]", or -s kernels.attention=sdpa',
    "flash": "pip install flash-attn --no-build-isolation, or -s kernels.attention=sdpa",
}

TRIALS = 3


def attention_named(name: AttentionName) -> Attention:
    """A back end, whether it can run here or not. Not ``auto``."""
    if name == "triton":
        return triton_attention()
    return Attention(
        name, partial(_dispatched, DISPATCHED[name]), (sdpa_forward, sdpa_backward) if name == "sdpa" else None
    )


def choose_attention(
    name: AttentionName, device: torch.device, shape: Sequence[int], dtype: torch.dtype, keep_attention: bool = False
) -> tuple[Attention, str]:
    """The back end of a run, and why it was taken.

    Args: shape: (B, L, H, d) of the self-attention. With ``auto`` on a CUDA card every back end that can run does one
        such attention, forward and backward, a few times; the fastest is taken. keep_attention: its results will be kept for the
        backward, so it must have a log-sum-exp to give.

    Raises:
        BadInputError: what was asked for cannot run; says why, and what to do.
    """
    if name == "auto":
        return _fastest(device, shape, dtype, keep_attention)
    reason = why_not(name, device) or (_no_lse(name) if keep_attention else None)
    if reason:
        raise BadInputError(f"kernels.attention = {name!r} cannot run: {reason}")
    return attention_named(name), "as asked"


def why_not(name: AttentionName, device: torch.device) -> str | None:
    """What keeps a back end from running on ``device``, with the cure; ``None``: nothing."""
    if name == "triton":
        return why_no_triton(device)
    if name == "sdpa":
        return None
    from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements

    try:
        _check_attention_backend_requirements(AttentionBackendName(DISPATCHED[name]))
    except (RuntimeError, ImportError) as error:
        return f"{error} Cure: {CURES[name]}"
    return None if device.type == "cuda" else "it needs a CUDA card. Cure: -s kernels.attention=sdpa"


def _no_lse(name: AttentionName) -> str | None:
    if name in ("triton", "sdpa"):
        return None
    return (
        "memory.keep_attention needs a back end that gives its log-sum-exp. Cure: -s kernels.attention=triton or sdpa"
    )


def _fastest(
    device: torch.device, shape: Sequence[int], dtype: torch.dtype, keep_attention: bool
) -> tuple[Attention, str]:
    if device.type != "cuda":
        return attention_named("sdpa"), "the CPU's own"
    candidates: list[AttentionName] = ["triton", "sdpa", "xformers", "flash"]
    able = [
        attention_named(name)
        for name in candidates
        if not why_not(name, device) and not (keep_attention and _no_lse(name))
    ]
    seconds = {one.name: _seconds(one.call, device, shape, dtype) for one in able}
    best = min(able, key=lambda one: seconds[one.name])
    return best, "the fastest here: " + ", ".join(
        f"{name} {1000 * s:.1f} ms" for name, s in sorted(seconds.items(), key=lambda pair: pair[1])
    )


def _seconds(
    call: Callable[[Tensor, Tensor, Tensor], Tensor], device: torch.device, shape: Sequence[int], dtype: torch.dtype
) -> float:
    """Of a forward and a backward, the best of a few after one to warm up."""
    q, k, v = (torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in range(3))
    times = []
    for _ in range(TRIALS + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        out = call(q, k, v)
        torch.autograd.grad(out, (q, k, v), out)
        end.record()
        torch.cuda.synchronize(device)
        times.append(start.elapsed_time(end) / 1000)
    return min(times[1:])


def _dispatched(backend: str, q_BLHd: Tensor, k_BLHd: Tensor, v_BLHd: Tensor) -> Tensor:
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    return dispatch_attention_fn(q_BLHd, k_BLHd, v_BLHd, backend=AttentionBackendName(backend))
