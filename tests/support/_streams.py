"""CUDA streams on a CPU that are as late as they may be: whoever relies on luck with the order of copies is found
out."""

from __future__ import annotations

import ctypes
import weakref
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem_drf.memory import host
from lowmem_drf.memory.host import HostStore


class Event:
    """A place in a stream's work. Called, that work runs."""

    def __init__(self, stream):
        self.stream, self.position = stream, len(stream.work)

    def __call__(self):
        self.stream.run(self.position)

    def query(self):
        return self.stream.done >= self.position


class Stream:
    """A CUDA stream that does its work as late as it may: when an event of it is waited for. ``eager``: the stream that
    computes."""

    def __init__(self, eager=False):
        self.eager, self.work, self.done = eager, [], 0

    def record_event(self):
        return Event(self)

    def run(self, position):
        while self.done < position:
            work, self.done = self.work[self.done], self.done + 1
            work()

    def wait_event(self, event):
        event() if self.eager else self.work.append(event)

    def wait_stream(self, other):
        assert other.eager  # its work is done when it is asked for

    def synchronize(self):
        self.run(len(self.work))


class LateCopies(TorchDispatchMode):
    """Copies go to the stream, with addresses instead of tensors: whoever frees a tensor before the copy has run is
    found out."""

    def __init__(self, stream):
        super().__init__()
        self.stream = stream

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not torch.ops.aten.copy_.default:
            return func(*args, **(kwargs or {}))
        to, source = args[:2]
        storages = [weakref.ref(tensor.untyped_storage()) for tensor in (to, source)]
        addresses, length = (to.data_ptr(), source.data_ptr()), to.nbytes
        assert to.nbytes == source.nbytes

        def copy():
            assert all(storage() is not None for storage in storages), "memory was given back before its copy had ended"
            ctypes.memmove(*addresses, length)

        self.stream.work.append(copy)
        return to


def late_store(monkeypatch, arena=4096, in_flight=2000):
    """A store that takes the CUDA path, on simulated streams, with small arenas that are not pinned."""
    compute = Stream(eager=True)

    @contextmanager
    def on(stream):
        with LateCopies(stream):
            yield

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(host, "ARENA", arena)
    monkeypatch.setattr(host, "IN_FLIGHT", in_flight)
    monkeypatch.setattr(host._Pinned, "_allocate", lambda self: torch.zeros(host.ARENA, dtype=torch.uint8))
    return HostStore(torch.device("cpu"), host._Pinned(torch.device("cpu")))
