"""Tensors offloaded to the host: values, bytes, and the CUDA path's order of copies on simulated streams that run as
late as possible."""

from __future__ import annotations

import random
import weakref

import pytest
import torch
from _streams import Stream, late_store

from lowmem_drf.memory import host
from lowmem_drf.memory.host import HostStore
from lowmem_drf.planner.ledger import Ledger
from lowmem_drf.planner.stand_ins import planned_store
from lowmem_drf.shortage import shortage_of

CPU = torch.device("cpu")


def test_what_is_put_comes_back_contiguous_as_often_as_asked():
    store = HostStore(CPU)
    for tensor in (
        torch.randn(3, 5),
        torch.randn(4, 6).T,
        torch.arange(7),
        torch.randn(2, 8, dtype=torch.bfloat16)[:, ::2],
        torch.tensor(1.5),
    ):
        held = store.put(tensor.requires_grad_(tensor.is_floating_point()))
        assert held.nbytes == tensor.nbytes
        for _ in range(2):
            held.prefetch()
            got = held.get()
            assert (
                torch.equal(got, tensor) and got.dtype == tensor.dtype and got.is_contiguous() and not got.requires_grad
            )


def test_on_a_cpu_nothing_is_copied_but_a_view_out_of_something_larger():
    store, whole = HostStore(CPU), torch.randn(100)
    assert store.put(whole).get().data_ptr() == whole.data_ptr()
    assert store.put(whole[:10]).get().untyped_storage().nbytes() == 40


def test_under_a_ledger_the_bytes_are_those_of_a_card_and_a_host():
    store = planned_store()
    with Ledger() as ledger:
        tensor = torch.ones(1000)
        held = store.put(tensor)
        assert (ledger.card_bytes, ledger.host_bytes) == (4000, 4000)
        del tensor
        assert (ledger.card_bytes, ledger.host_bytes) == (0, 4000)
        held.prefetch()
        assert ledger.card_bytes == 4000
        first = held.get()
        assert ledger.card_bytes == 4000
        second = held.get()
        assert ledger.card_bytes == 8000 and torch.equal(first, second)
        del first, second, held
        assert (ledger.card_bytes, ledger.host_bytes) == (0, 0)


@pytest.fixture
def pinned_store(monkeypatch):
    return late_store(monkeypatch)


def test_copies_are_ordered_whatever_their_streams_are_late_with(pinned_store):
    """Random puts, prefetches, gets and drops: right values, no memory freed during a copy, host memory reused."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    waiting, taken, live = [], 0, 0
    most = 0
    for _ in range(3000):
        action = rng.random()
        if action < 0.4 or not waiting:
            shape = (rng.choice([0, 1, 63, 700, 3000]),)
            tensor = torch.randint(0, 255, shape, dtype=torch.uint8, generator=generator)
            waiting.append((pinned_store.put(tensor), tensor.tolist()))
            live += -(-tensor.nbytes // host.ALIGN) * host.ALIGN
        elif action < 0.55:
            rng.choice(waiting)[0].prefetch()
        elif action < 0.75:
            held, values = rng.choice(waiting)
            assert held.get().tolist() == values
            taken += 1
        else:
            held, _ = waiting.pop(rng.randrange(len(waiting)))
            live -= -(-held.nbytes // host.ALIGN) * host.ALIGN
            del held
        most = max(most, live)
    assert taken > 300
    assert len(pinned_store._copier._arenas) <= -(-most // host.ARENA)  # packed: not one arena more than the bytes need
    for held, values in waiting:
        assert held.get().tolist() == values
    for stream in (pinned_store._copier._to_host, pinned_store._copier._to_card):
        stream.synchronize()


def test_the_card_holds_few_tensors_that_are_on_their_way(pinned_store):
    sizes, sources = [900, 900, 900, 5000, 100], []
    alive = []
    for size in sizes:
        tensor = torch.zeros(size, dtype=torch.uint8)
        sources.append(weakref.ref(tensor.untyped_storage()))
        held = pinned_store.put(tensor)
        del tensor
        alive.append(sum(1 for source in sources if source() is not None))
    assert alive == [1, 2, 2, 1, 1] and held.nbytes == 100  # at most 2,000 bytes, or the newest alone
    pinned_store.settle()
    assert sources[-1]() is None


def test_weights_that_are_in_host_memory_already_are_packed_too(pinned_store):
    def put_from_host(tensor):
        pinned_store._copier._device = torch.device("meta")  # so that a CPU tensor is none of the card's
        held = pinned_store.put(tensor)
        pinned_store._copier._device = CPU
        return held

    assert put_from_host(torch.arange(100)).get().tolist() == list(range(100))
    # a copy to the host that is late: it must not land in what comes next
    del_me = pinned_store.put(torch.zeros(100, dtype=torch.int64))
    del del_me
    held = put_from_host(torch.arange(100))
    pinned_store.settle()
    assert held.get().tolist() == list(range(100))
    del held
    late = put_from_host(torch.arange(100, 200))
    late.prefetch()
    coming = late._coming  # on its way to the card while the host's memory is given to another
    del late
    other = put_from_host(torch.zeros(100, dtype=torch.int64))
    assert coming().tolist() == list(range(100, 200)) and other.nbytes == 800


def test_memory_that_cannot_be_pinned_is_said_once_and_used_all_the_same(monkeypatch):
    def refuse(*size, pin_memory=False, **arguments):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return torch.zeros(*size, **arguments)

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    pinned = host._Pinned(CPU)
    pinned._arenas = [torch.zeros(1)] * 16
    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.warns(
        UserWarning, match=r"No more than 1.0 GiB of host memory can be pinned \(CUDA error: out of memory\)"
    ):
        assert pinned._allocate().nbytes == host.ARENA
    # a second warning would be an error (pyproject has none, pytest.warns took the first)
    assert pinned._allocate().nbytes == host.ARENA


def test_no_host_memory_left_is_said_with_what_waits_there(pinned_store, monkeypatch):
    held = pinned_store.put(torch.zeros(5000, dtype=torch.uint8))

    def refuse(self):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(host._Pinned, "_allocate", refuse)
    with pytest.raises(MemoryError, match="0.0 GiB wait in host memory for the card") as caught:
        pinned_store.put(torch.zeros(5000, dtype=torch.uint8))
    assert shortage_of(caught.value).kind == "host"
    assert held.nbytes == 5000
