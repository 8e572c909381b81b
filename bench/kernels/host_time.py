"""Host time of one call of an operator with three results that launches nothing: as ``kernels/operators.py`` registers
it, as ``torch.library.custom_op`` does, and as a plain function. Runs anywhere.

    python -m bench.kernels.host_time
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from lowmem_drf.kernels.operators import operator

CALLS, ROUNDS = 2000, 7


def plain(x: Tensor, weight: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(shift)


def microseconds(call: Callable[..., object]) -> float:
    """Of one call, the fastest of several rounds, in an autograd function's forward: no gradient is recorded, and the
    inputs require one."""
    tensors = [torch.randn(4, 4, requires_grad=True) for _ in range(3)]
    rounds = []
    with torch.no_grad():
        for _ in range(ROUNDS):
            start = time.perf_counter()
            for _ in range(CALLS):
                call(*tensors, 1e-6)
            rounds.append((time.perf_counter() - start) / CALLS)
    return 1e6 * min(rounds)


def main() -> None:
    ways = {
        "kernels/operators.py": operator("host_time_bench")(plain),
        "torch.library.custom_op": torch.library.custom_op("lowmem_drf::host_time_bench_2", plain, mutates_args=()),
        "a plain function": plain,
    }
    for name, call in ways.items():
        print(f"{name:26} {microseconds(call):6.1f} us")


if __name__ == "__main__":
    main()
