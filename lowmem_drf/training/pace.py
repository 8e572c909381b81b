"""Seconds per update: notices when a card becomes slow, as when its driver moves memory into the host's in silence."""

from __future__ import annotations

import statistics

import torch

from lowmem_drf.shortage import GIB

JUMP, BEFORE = 3.0, 5
"""An update is slow if it takes this many times the median of those before, of which there must be so many."""


class Pace:
    """The updates of this process."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: list[float] = []
        self._said = device.type != "cuda"  # a CPU has no such driver, and its speed says little

    def add(self, step: int, seconds: float) -> str:
        """Counts an update. Returns a line to print, once in a run, or nothing."""
        usual = statistics.median(self._seconds) if len(self._seconds) >= BEFORE else float("inf")
        self._seconds.append(seconds)
        if self._said or seconds <= JUMP * usual:
            return ""
        self._said = True
        free, total = torch.cuda.mem_get_info(self._device)
        return (
            f"Update {step} took {seconds:.1f} s, the median before it {usual:.1f} s; {free / GIB:.1f} of the card's "
            f"{total / GIB:.1f} GiB are free. With little free, the driver of Windows (WSL2 too) moves memory of the "
            "card into the host's instead of failing: close other programs on the card, or set NVIDIA Control Panel > "
            "Manage 3D settings > CUDA - Sysmem Fallback Policy to Prefer No Sysmem Fallback, and the run says what "
            "takes less. With much free, something else uses the card, or it is too hot."
        )
