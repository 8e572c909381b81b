"""The link between card and host in a plan: copies that run beside the computation, and what it waits for them.

Two queues, one each way, as PCIe has it and as ``host`` uses it: a stream of copies to the host, one to the card. A
copy begins when the one before it on its queue has ended; the computation goes on, until it needs what has not arrived.
"""

from __future__ import annotations

from collections import deque


class Pcie:
    """Times are seconds on the clock of whoever asks, and never go back.

    Args: rate: bytes a second, each way. Infinite: copies take no time. in_flight: bytes that may be on their way to
        the host before the computation waits for the oldest of them; the newest may in any case.
    """

    def __init__(self, rate: float, in_flight: int) -> None:
        self._rate, self._in_flight = rate, in_flight
        self._up_until = self._down_until = 0.0
        self._leaving: deque[tuple[float, int]] = deque()
        self.up_bytes = self.down_bytes = 0
        """Sent to the card, and to the host."""
        self.between_bytes = 0
        """Of both, what other cards sent and got."""
        self.busy_s = 0.0
        """What the copies took, each by itself."""

    def fetch(self, now: float, nbytes: int, written: float) -> float:
        """Starts a copy to the card, of something that is on the host from ``written`` on. Returns when it has
        arrived."""
        self._up_until = max(now, self._up_until, written) + nbytes / self._rate
        self.up_bytes += nbytes
        self.busy_s += nbytes / self._rate
        return self._up_until

    def send(self, now: float, nbytes: int) -> tuple[float, float]:
        """Starts a copy to the host. Returns when it will be there, and until when the computation has to wait before
        it goes on."""
        self._down_until = max(now, self._down_until) + nbytes / self._rate
        self.down_bytes += nbytes
        self.busy_s += nbytes / self._rate
        self._leaving.append((self._down_until, nbytes))
        until = now
        while len(self._leaving) > 1 and sum(size for _, size in self._leaving) > self._in_flight:
            until = max(until, self._leaving.popleft()[0])
        return self._down_until, until

    def exchange(self, now: float, nbytes: int, ready: float) -> float:
        """Sends so many bytes to other cards, through the host's memory, and gets as many from them, both at once and
        from ``ready`` on. Returns when it is done."""
        self._up_until = self._down_until = max(now, ready, self._up_until, self._down_until) + nbytes / self._rate
        self.up_bytes += nbytes
        self.down_bytes += nbytes
        self.between_bytes += 2 * nbytes
        self.busy_s += 2 * nbytes / self._rate
        return self._up_until

    def sent(self, now: float) -> float:
        """When all that is on its way to the host will be there."""
        self._leaving.clear()
        return max(now, self._down_until)

    def quiet(self, now: float) -> float:
        """When nothing will be on its way."""
        return max(self.sent(now), self._up_until)
