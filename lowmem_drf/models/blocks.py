"""Around the ``forward`` of a block in every family: streamed weights, records of the rollout, and the policy by which
a backward recomputes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from lowmem_drf.memory.activations import BlockPolicy, HookedForward, Pace
from lowmem_drf.memory.recorded_rollout import RecordedForward

if TYPE_CHECKING:
    from lowmem_drf.memory.host import HostStore
    from lowmem_drf.memory.recorded_rollout import Recorder
    from lowmem_drf.memory.streaming import Layer, Streamed


def set_blocks(
    transformer: Any,
    blocks: Sequence[Any],
    forward_of: Callable[[Any, Layer | None], Any],
    checkpoint: bool | Literal["host"] = True,
    store: HostStore | None = None,
    keep_attention: Literal["none", "card", "host"] = "none",
    recorder: Recorder | None = None,
    streamed: Streamed | None = None,
    hooked: bool = False,
) -> None:
    """Replaces the ``forward`` of every block. The transformer calls its blocks in order, each with the hidden states
    first; under ``gradient_checkpointing`` through diffusers' ``_gradient_checkpointing_func``.

    Args:
        forward_of: (block, its weights if they are streamed) -> its forward. That takes ``recorded`` and
            ``kept_attention`` too (``memory.kept_attention``; ``None`` without ``keep_attention``), and has a method
            ``unread`` for a recompute whose result nobody reads (``activations.BlockPolicy``).
        checkpoint, store, keep_attention, recorder, streamed, hooked: as of ``Family.set_activations``.
    """
    if store is None and "host" in (checkpoint, keep_attention):
        raise ValueError("activations on the host need a store")
    pace = Pace()
    for place, block in enumerate(blocks):
        forward = forward_of(block, streamed.layers[place] if streamed else None)
        forward = streamed.forward(place, forward) if streamed else HookedForward(forward, pace) if hooked else forward
        block.forward = forward if recorder is None else RecordedForward(forward, block is blocks[-1], recorder)
    if checkpoint is False:
        transformer.disable_gradient_checkpointing()
        return
    inputs, kept = store if checkpoint == "host" else None, None if keep_attention == "none" else keep_attention
    transformer.enable_gradient_checkpointing(BlockPolicy(blocks, inputs, kept, store, recorder))
