"""Attention back ends of the transformer: our kernel, PyTorch's, cuDNN's, xformers' and flash-attn's. Each is a
pair (forward, backward) whose forward returns its log-sum-exp, so results can be kept (``memory/kept_attention.py``).

flash-attn has no wheels on PyPI: its pair follows the signatures of 2.7 and 2.8 and has never run.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lowmem_drf.ops import Attention, AttentionName, Pair, int8_forward, sdpa_attention, triton_attention, why_no_triton

NAMES: tuple[AttentionName, ...] = ("triton", "cudnn", "sdpa", "xformers", "flash")
"""All but ``auto``. Of equally fast ones the first is taken."""

BEHIND_INT8: tuple[AttentionName, ...] = ("triton", "cudnn", "sdpa", "flash")
"""Those whose backward can follow a forward in 8 bits: their log-sum-exp is known."""
LSE_ROWS = 32
"""PyTorch's memory-efficient attention pads its log-sum-exps to a multiple of so many queries."""

_aten = torch.ops.aten


def attention_named(name: AttentionName) -> Attention:
    """A back end other than ``auto``, whether or not it can run here."""
    if name == "triton":
        return triton_attention()
    if name == "sdpa":
        return sdpa_attention()
    pairs: dict[AttentionName, Pair] = {
        "cudnn": (_cudnn_forward, _cudnn_backward),
        "xformers": (_xformers_forward, _xformers_backward),
        "flash": (_flash_forward, _flash_backward),
    }
    return Attention.of_pair(name, pairs[name])


def with_int8_forward(attention: Attention, device: torch.device | None) -> Attention:
    """A forward in 8 bits, and the backward of ``attention``, one of ``BEHIND_INT8``, from its results. ``device`` and
    errors: as ``ops.int8_forward``."""
    forward, backward = int8_forward(device), attention.pair[1]

    def with_its_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = forward(q, k, v)
        if attention.name == "cudnn":
            lse = lse[..., None]
        elif attention.name == "sdpa" and q.device.type == "cuda" and q.dtype == torch.float32:
            lse = F.pad(lse, (0, -lse.shape[-1] % LSE_ROWS), value=math.inf)
        return out, lse

    return Attention.of_pair(attention.name, (with_its_lse, backward))


def why_not(name: AttentionName, device: torch.device) -> str | None:
    """The reason why a back end cannot run on ``device``, with the cure; ``None`` if nothing is known against it.
    Computes nothing: ``refusal`` tries it."""
    if name == "triton":
        return why_no_triton(device)
    if name == "sdpa":
        return None
    if device.type != "cuda":
        return "it needs a CUDA card. Cure: -s kernels.attention=sdpa"
    return f"it is not installed. Cure: {cure(name)}" if absent(name) else None


def absent(name: AttentionName) -> bool:
    """Whether a back end is of a library that is not installed."""
    module = {"triton": "triton", "xformers": "xformers", "flash": "flash_attn"}.get(name, "torch")
    return importlib.util.find_spec(module) is None


def refusal(name: AttentionName, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """As ``why_not``, after one small attention with gradient: a library that is there may be built for another card,
    PyTorch or CUDA, and says so only then."""
    if (reason := why_not(name, device)) is not None:
        return reason
    try:
        x = torch.zeros(1, 64, 1, head_dim, device=device, dtype=dtype)
        forward, backward = attention_named(name).pair
        backward(x, x, x, x, *forward(x, x, x))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:  # what libraries raise has many types
        return f"{_first_lines(error)} Cure: {cure(name)}"
    return None


def cure(name: AttentionName) -> str:
    """What to do about a back end that cannot run."""
    other, cuda = "-s kernels.attention=sdpa", (torch.version.cuda or "13.0").replace(".", "")
    # PyPI's wheel is built for one CUDA, which need not be PyTorch's; PyTorch's index has one for each
    index = f"--no-deps --index-url https://download.pytorch.org/whl/cu{cuda}"
    cures: dict[AttentionName, str] = {
        "xformers": f"pip install --force-reinstall xformers {index}, or {other}",
        "flash": f"pip install flash-attn --no-build-isolation, or {other}",
    }
    return cures.get(name, other)


def _first_lines(error: Exception, most: int = 200) -> str:
    """The start of a message and, of xformers' long one, the reason at its end."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    text = f"{lines[0]} {lines[-1]}" if lines[1:] else "".join(lines)
    return f"{type(error).__name__}: {text[:most]}".rstrip(".") + "."


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    heads = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(*heads, None, True)
    return out.transpose(1, 2), lse


def _cudnn_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    d, *heads, result = (x.transpose(1, 2) for x in (d_out, q, k, v, out))
    no_seed, lengths = torch.zeros((), dtype=torch.int64, device=q.device), (q.shape[1], k.shape[1])
    grads = _aten._scaled_dot_product_cudnn_attention_backward(
        d, *heads, result, lse, no_seed, no_seed, None, None, None, *lengths, 0.0, False
    )
    dq, dk, dv = (x.transpose(1, 2) for x in grads)
    return dq, dk, dv


def _xformers_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    from xformers.ops import fmha

    out, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v)
    return out, lse


def _xformers_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from xformers.ops import fmha

    dq, dk, dv = fmha.memory_efficient_attention_backward(d_out, out, lse, q, k, v)
    return dq, dk, dv


_FLASH: dict[str, Any] = {"dropout_p": 0.0, "causal": False, "window_size_left": -1, "window_size_right": -1}
_FLASH |= {"softcap": 0.0, "alibi_slopes": None}


def _flash_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_forward

    scale = q.shape[-1] ** -0.5
    out, lse, *_ = _flash_attn_forward(q, k, v, softmax_scale=scale, return_softmax=False, **_FLASH)
    return out, lse


def _flash_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_backward

    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5
    _flash_attn_backward(
        d_out, q, k, v, out, lse, dq, dk, dv, softmax_scale=scale, deterministic=False, rng_state=None, **_FLASH
    )
    return dq, dk, dv
