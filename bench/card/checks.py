"""``lowmem-drf doctor --full`` as rows: versions, cuDNN, kernels, attentions, NF4, pinned memory and its copies."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional as F

from bench.card.rows import Row, State
from lowmem_drf.doctor import card
from lowmem_drf.doctor.checks import Status, looked_at
from lowmem_drf.doctor.machine import packages

STATES: dict[Status, State] = {"ok": "ok", "warning": "off", "failure": "wrong"}


def versions() -> Iterator[Row]:
    """Doctor's checks, and PyTorch's own choice for conv3d."""
    card.FULL = True
    for name, look in {"packages": packages, **card.steps()}.items():
        for check in looked_at(name, look):
            yield Row(check.name, check.detail, state=STATES[check.status], note=check.cure)
    x = torch.zeros(1, 16, 3, 8, 8, device="cuda", dtype=torch.bfloat16)
    weight = torch.zeros(16, 16, 3, 3, 3, device="cuda", dtype=torch.bfloat16)
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        laid = x.to(memory_format=layout), weight.to(memory_format=layout)
        F.conv3d(*laid)
        used = torch._C._select_conv_backend(*laid, None, [1] * 3, [0] * 3, [1] * 3, False, [0] * 3, 1, [0]).name
        what = f"bf16 conv3d, {str(layout).removeprefix('torch.')}"
        yield Row(what, used, "", "Cudnn", "ok" if "udnn" in used else "wrong", "9.8 <= cuDNN < 9.15 is refused")
