"""Clock and peak meter around the stages of a step (``Parts.stage``).

On CUDA the peak is the allocator's. On the CPU it is the process's resident memory: Linux can reset its high-water mark
(``/proc/self/clear_refs``, see proc(5)); elsewhere (Windows, macOS) the peak covers the whole process so far.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from lowmem_drf.shortage import GIB, during


class Meter:
    """Seconds and peak GiB by stage name, since the last ``take``. Over several entries of a stage seconds add up, and
    the largest peak counts."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}
        self._peak_gib: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures the block. Synchronises the device at both ends, so that a stage's work counts as its own."""
        self._synchronize()
        _reset_peak(self._device)
        start = time.perf_counter()
        try:
            with during(name):
                yield
        finally:
            self._synchronize()
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start
            self._peak_gib[name] = max(self._peak_gib.get(name, 0.0), _peak_gib(self._device))

    def take(self) -> tuple[dict[str, float], dict[str, float]]:
        """(seconds by stage, peak GiB by stage); then starts anew."""
        taken = self._seconds, self._peak_gib
        self._seconds, self._peak_gib = {}, {}
        return taken

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def free_bytes(device: torch.device) -> int:
    """Bytes that this process can still allocate on a CUDA card, also under ``set_per_process_memory_fraction``."""
    free, total = torch.cuda.mem_get_info(device)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    cap = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return min(free, cap - reserved) + reserved - allocated


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:  # OSError: a container
            file.write("5")


def _peak_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    with suppress(OSError), open("/proc/self/status", encoding="utf-8", errors="replace") as file:
        return next((int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM")), 0) / GIB
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GIB  # bytes on macOS
