"""Launchers as operators of PyTorch: fake tensors, FLOP counters and a plan's ledger see them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("lowmem_drf", "FRAGMENT")


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: ``torch.ops.lowmem_drf.<name>``, with the schema of the function's annotations. The function must not
    write to its inputs nor return one; ``torch.library.register_fake`` says what it allocates.

    ``torch.library.custom_op`` checks that at every call, and goes through an autograd kernel in Python; every caller
    here is an ``autograd.Function``. ``bench/kernels/host_time.py`` prints what either takes of the host.
    """

    def register(launch: Callable[..., Any]) -> Any:
        _LIBRARY.define(name + torch.library.infer_schema(launch, mutates_args=()))
        _LIBRARY.impl(name, launch, "CompositeExplicitAutograd")
        return getattr(torch.ops.lowmem_drf, name).default

    return register
