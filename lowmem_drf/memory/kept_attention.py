"""Fused attention checkpointing: a recomputed block repeats its matrix products, but not its self-attention.

Besides q, k and v an attention's backward needs only its output and log-sum-exp. These are kept, on the card or on the
host. The cross-attention to a few hundred tokens of text is repeated: its output is as large, and takes a hundredth of
the time.
"""

from __future__ import annotations

from torch import Tensor

from lowmem_drf.memory.host import Held, HostStore


class KeptAttention:
    """The result of one block's self-attention: written in a forward, read once in its recompute.

    ``store``: where it waits. ``None``: on the card.
    """

    def __init__(self, store: HostStore | None) -> None:
        self._store = store
        self._result: tuple[Tensor | Held, Tensor | Held] | None = None
        self.reading = False
        self.nbytes = 0
        """Bytes written so far."""

    def write(self, out: Tensor, lse: Tensor) -> None:
        self.nbytes += out.nbytes + lse.nbytes
        kept = self._store.put if self._store is not None else Tensor.detach
        self._result = kept(out), kept(lse)

    def copy(self) -> KeptAttention:
        """The same result, for a backward of its own."""
        other = KeptAttention(self._store)
        other._result, other.nbytes = self._result, self.nbytes
        return other

    def rewind(self) -> None:
        """Turns from writing to reading. Raises RuntimeError the second time: one backward uses the result up."""
        if self.reading:
            raise RuntimeError(
                "the attention of a block was kept for one backward, and this is another one: run the forward again"
            )
        self.reading = True

    def prefetch(self) -> None:
        """Starts to copy the result to the card."""
        for kept in self._result or ():
            if isinstance(kept, Held):
                kept.prefetch()

    def read(self) -> tuple[Tensor, Tensor]:
        """(out, lse), on the card."""
        assert self._result is not None
        (out, lse), self._result = self._result, None
        return _arrived(out), _arrived(lse)


def _arrived(kept: Tensor | Held) -> Tensor:
    return kept.get() if isinstance(kept, Held) else kept
