"""The host store with copies that come as late as they may, and its rates."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from bench.card import expected
from bench.card.rows import Row, near
from lowmem_drf.memory import host
from lowmem_drf.memory.host import Held, HostStore

LATE_CYCLES = 20_000_000
"""Of the card's clock, about ten milliseconds: longer than the work between two copies."""
COUNT, ELEMENTS, IN_FLIGHT = 24, 2**20, 16 * 1024**2
"""Tensors, fp32 numbers in each, and bytes on their way before the store lets memory go: a few tensors, here."""
RATE_COUNT, RATE_BYTES = 16, 64 * 1024**2


def host_store() -> Iterator[Row]:
    """Bits after copies that were held up, then GB/s."""
    whole, host.IN_FLIGHT = host.IN_FLIGHT, IN_FLIGHT
    for late in ("no copy", "to the host", "to the card", "both"):
        wrong = _wrong_tensors(late)
        what = f"tensors with other bits, late: {late}"
        yield Row(what, float(wrong), f"of {COUNT}", f"0 of {COUNT}", "wrong" if wrong else "ok")
    host.IN_FLIGHT = whole
    yield from _rates()


def _wrong_tensors(late: str) -> int:
    """Puts tensors, uses their memory again at once, and fetches them back while the card computes."""
    device = torch.device("cuda", torch.cuda.current_device())
    store = HostStore(device)
    copier = store._copier
    held = []
    for n in range(COUNT):
        on_card = _values(n, device)
        _hold_up(copier._to_host, late in ("to the host", "both"))  # type: ignore[attr-defined]
        held.append(store.put(on_card))
        del on_card
        torch.full((ELEMENTS,), float("nan"), device=device)  # the same memory, if the store let it go too early
    wrong = []
    for n, one in enumerate(held):
        _hold_up(copier._to_card, late in ("to the card", "both"))  # type: ignore[attr-defined]
        one.prefetch()
        if n + 1 < COUNT:
            held[n + 1].prefetch()
        wrong.append(_differs(one.get(), _values(n, device)))
    store.settle()
    return int(torch.stack(wrong).sum().item())


def _values(n: int, device: torch.device) -> Tensor:
    """Made on the card: a copy from pageable memory would wait for all streams."""
    return torch.arange(ELEMENTS, dtype=torch.float32, device=device) + 7 * n


def _hold_up(stream: torch.cuda.Stream, late: bool) -> None:
    if late:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(LATE_CYCLES)


def _differs(one: Tensor, other: Tensor) -> Tensor:
    return (one.view(torch.int32) != other.view(torch.int32)).any()


def _rates() -> Iterator[Row]:
    card = expected.this_card()
    wanted, source = (card.link, "what a plan counts on") if card else (None, "")
    device = torch.device("cuda", torch.cuda.current_device())
    store, tensors = HostStore(device), [torch.ones(RATE_BYTES, dtype=torch.int8, device=device)] * RATE_COUNT
    held: list[Held] = []

    def put() -> None:
        held[:] = [store.put(tensor) for tensor in tensors]

    def get() -> None:
        for one in held:
            one.get()

    put()  # pins the memory
    held.clear()
    store.settle()
    for direction, work in {"to the host": put, "to the card": get}.items():
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        rate = RATE_COUNT * RATE_BYTES / (time.perf_counter() - started) / 1e9
        yield near(f"{RATE_COUNT} tensors of {RATE_BYTES // 1024**2} MiB {direction}", rate, "GB/s", wanted, source)
