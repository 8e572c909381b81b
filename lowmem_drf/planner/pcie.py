"""A plan's model of the link between card and host: copies overlap with computation until it needs their result.

Two queues, one per direction, as PCIe has them and ``host`` uses them: one stream copies to the host, one to the card.
A copy starts when the previous one of its queue has ended.
"""

from __future__ import annotations

from collections import deque


class Pcie:
    """Times are seconds on the caller's clock, and never decrease.

    Args:
        rate: bytes per second in each direction. Infinite: copies take no time.
        in_flight: bytes that may be on their way to the host before the computation waits for the oldest copy; a single
            copy may be larger.
    """

    def __init__(self, rate: float, in_flight: int) -> None:
        self._rate, self._in_flight = rate, in_flight
        self._up_until = self._down_until = 0.0
        self._leaving: deque[tuple[float, int]] = deque()
        self.up_bytes = self.down_bytes = 0
        """Sent to the card, and to the host."""
        self.between_bytes = 0
        """Part of both that was exchanged with other cards."""
        self.busy_s = 0.0
        """Summed duration of the copies."""

    def fetch(self, now: float, nbytes: int, written: float) -> float:
        """Starts a copy to the card of a tensor that is on the host from ``written`` on. Returns its arrival time."""
        self._up_until = max(now, self._up_until, written) + nbytes / self._rate
        self.up_bytes += nbytes
        self.busy_s += nbytes / self._rate
        return self._up_until

    def send(self, now: float, nbytes: int) -> tuple[float, float]:
        """Starts a copy to the host. Returns its arrival time, and the time until which the computation must wait."""
        self._down_until = max(now, self._down_until) + nbytes / self._rate
        self.down_bytes += nbytes
        self.busy_s += nbytes / self._rate
        self._leaving.append((self._down_until, nbytes))
        until = now
        while len(self._leaving) > 1 and sum(size for _, size in self._leaving) > self._in_flight:
            until = max(until, self._leaving.popleft()[0])
        return self._down_until, until

    def exchange(self, now: float, nbytes: int, ready: float) -> float:
        """Sends ``nbytes`` to other cards through the host's memory and receives as many, at the same time, from
        ``ready`` on. Returns when it is done."""
        self._up_until = self._down_until = max(now, ready, self._up_until, self._down_until) + nbytes / self._rate
        self.up_bytes += nbytes
        self.down_bytes += nbytes
        self.between_bytes += 2 * nbytes
        self.busy_s += 2 * nbytes / self._rate
        return self._up_until

    def sent(self, now: float) -> float:
        """When all copies to the host have arrived."""
        self._leaving.clear()
        return max(now, self._down_until)

    def quiet(self, now: float) -> float:
        """When no copy is under way."""
        return max(self.sent(now), self._up_until)
