"""Fused attention checkpointing: a recomputed block repeats its matrix products, but not its attentions.

Besides q, k and v an attention's backward needs only its output and log-sum-exp. These are kept, on the card or on the
host.
"""

from __future__ import annotations

from collections import deque

from torch import Tensor

from lowmem_drf.memory.host import Held, HostStore


class KeptAttention:
    """The results of one block's attentions, in the order of computation: written in a forward, read once in its
    recompute.

    ``store``: where they wait. ``None``: on the card.
    """

    def __init__(self, store: HostStore | None) -> None:
        self._store = store
        self._results: deque[tuple[Tensor | Held, Tensor | Held]] = deque()
        self.reading = False
        self.nbytes = 0
        """Bytes written so far."""

    def write(self, out: Tensor, lse: Tensor) -> None:
        self.nbytes += out.nbytes + lse.nbytes
        if self._store is None:
            self._results.append((out.detach(), lse.detach()))
        else:
            self._results.append((self._store.put(out), self._store.put(lse)))

    def rewind(self) -> None:
        """Turns from writing to reading. Raises RuntimeError the second time: one backward uses the results up."""
        if self.reading:
            raise RuntimeError(
                "the attentions of a block were kept for one backward, and this is another one: run the forward again"
            )
        self.reading = True

    def prefetch(self) -> None:
        """Starts to copy the next result to the card."""
        for kept in self._results[0] if self._results else ():
            if isinstance(kept, Held):
                kept.prefetch()

    def read(self) -> tuple[Tensor, Tensor]:
        """(out, lse) of the next attention, on the card."""
        out, lse = self._results.popleft()
        found = _arrived(out), _arrived(lse)
        self.prefetch()
        return found


def _arrived(kept: Tensor | Held) -> Tensor:
    return kept.get() if isinstance(kept, Held) else kept
