"""Attention back ends of the Wan transformer: our kernel, and those of diffusers' attention dispatcher (PyTorch's SDPA,
xformers, flash-attn)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from lowmem_drf.errors import BadInputError
from lowmem_drf.ops import Attention, AttentionName, sdpa_backward, sdpa_forward, triton_attention, why_no_triton

DISPATCHED: dict[AttentionName, str] = {"sdpa": "native", "xformers": "xformers", "flash": "flash"}
"""Names of ``kernels.attention`` -> of diffusers' ``AttentionBackendName``."""

CURES: dict[AttentionName, str] = {
    "xformers": 'pip install "lowmem-drf[xformers]", or -s kernels.attention=sdpa',
    "flash": "pip install flash-attn --no-build-isolation, or -s kernels.attention=sdpa",
}

TRIALS = 3


def attention_named(name: AttentionName) -> Attention:
    """A back end other than ``auto``, whether or not it can run here."""
    if name == "triton":
        return triton_attention()
    pair = (sdpa_forward, sdpa_backward) if name == "sdpa" else None
    return Attention(name, partial(_dispatched, DISPATCHED[name]), pair)


def choose_attention(
    name: AttentionName, device: torch.device, shape: Sequence[int], dtype: torch.dtype, keep_attention: bool = False
) -> tuple[Attention, str]:
    """The back end of a run, and the reason for the choice.

    ``auto`` on a CUDA card runs one such attention with every available back end, forward and backward, a few times,
    and takes the fastest.

    Args:
        shape: (B, L, H, d) of the self-attention.
        keep_attention: its results are kept for the backward, so the back end must return its log-sum-exp.

    Raises:
        BadInputError: the requested back end cannot run; says why, and the cure.
    """
    if name == "auto":
        return _fastest(device, shape, dtype, keep_attention)
    reason = why_not(name, device) or (_no_lse(name) if keep_attention else None)
    if reason:
        raise BadInputError(f"kernels.attention = {name!r} cannot run: {reason}")
    return attention_named(name), "as asked"


def why_not(name: AttentionName, device: torch.device) -> str | None:
    """The reason why a back end cannot run on ``device``, with the cure; ``None`` if it can."""
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
    return "memory.keep_attention needs an attention's log-sum-exp. Cure: -s kernels.attention=triton or sdpa"


def _fastest(
    device: torch.device, shape: Sequence[int], dtype: torch.dtype, keep_attention: bool
) -> tuple[Attention, str]:
    if device.type != "cuda":
        return attention_named("sdpa"), "the CPU's own"
    candidates: tuple[AttentionName, ...] = ("triton", "sdpa", "xformers", "flash")
    able = [name for name in candidates if not (why_not(name, device) or (keep_attention and _no_lse(name)))]
    seconds = {name: _seconds(attention_named(name).call, device, shape, dtype) for name in able}
    order = sorted(able, key=lambda name: seconds[name])
    times = ", ".join(f"{name} {1000 * seconds[name]:.1f} ms" for name in order)
    return attention_named(order[0]), f"the fastest here: {times}"


def _seconds(
    call: Callable[[Tensor, Tensor, Tensor], Tensor], device: torch.device, shape: Sequence[int], dtype: torch.dtype
) -> float:
    """Of one forward and backward: the best of a few runs, after a warm-up."""
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
