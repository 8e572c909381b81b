"""Whether cuDNN computes the VAE's conv3d in bf16. PyTorch refuses some of its versions, in silence."""

from __future__ import annotations

import re
import sys

import torch

from lowmem_drf.errors import LowmemError
from lowmem_drf.libraries import cure
from lowmem_drf.schema import Config


def require_fast_vae(config: Config, device: torch.device) -> None:
    """Raises LowmemError if the VAE computes in 16 bit on a card, and cuDNN does not (``require_fast_conv3d``)."""
    if device.type == "cuda" and {config.memory.vae_dtype, config.memory.vae_grad_dtype} != {"fp32"}:
        require_fast_conv3d()


def conv3d_backend() -> str:
    """Name of the implementation that PyTorch takes for conv3d in bf16 on the current card."""
    x, weight = (
        torch.ones(shape, dtype=torch.bfloat16, device="cuda") for shape in ((1, 16, 3, 8, 8), (16, 16, 3, 3, 3))
    )
    return torch._C._select_conv_backend(x, weight, None, [1] * 3, [0] * 3, [1] * 3, False, [0] * 3, 1, [0]).name


def require_fast_conv3d() -> None:
    """Raises LowmemError if the VAE's conv3d in bf16 would run outside of cuDNN: far slower, and with columns of
    gigabytes that no plan has. PyTorch does not use cuDNN 9.8 to 9.14 for it."""
    used = conv3d_backend()
    if "udnn" not in used:
        raise LowmemError(
            f"cuDNN {cudnn_version() or 'of an unknown version'} is not used for conv3d in bf16 (but {used}): the VAE "
            f"would take far longer, and gigabytes more of the card.\nMend it with: {cudnn_cure()}\n"
            "Or let the VAE compute in fp32, in more memory: -s memory.vae_dtype=fp32 -s memory.vae_grad_dtype=fp32"
        )


def cudnn_version() -> str:
    """Of the library that is found (``9.19.0``), which need not be PyTorch's own; empty without one."""
    try:
        number = torch.backends.cudnn.version()
    except RuntimeError as error:  # another one than PyTorch's own
        found = re.search(r"runtime version \((\d+), (\d+), (\d+)\)", str(error))
        return ".".join(found.groups()) if found else ""
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}" if number else ""


def cudnn_cure() -> str:
    """How to get a cuDNN that PyTorch uses for conv3d."""
    if sys.platform == "win32":  # it is in PyTorch's own wheel
        return cure("torch")
    package = f'pip install --upgrade "nvidia-cudnn-cu{(torch.version.cuda or "13").split(".")[0]}>=9.15"'
    return f"{package}, and take another cuDNN out of LD_LIBRARY_PATH"
