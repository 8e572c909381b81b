"""Around the ``forward`` of a block in every family: streamed weights, records of the rollout, and the policy by which
a backward recomputes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from lowmem_drf.errors import BadInputError
from lowmem_drf.memory.activations import BlockPolicy, HookedForward, Pace
from lowmem_drf.memory.recorded_rollout import RecordedForward

if TYPE_CHECKING:
    from lowmem_drf.memory.host import HostStore
    from lowmem_drf.memory.recorded_rollout import Recorder
    from lowmem_drf.memory.streaming import Layer, Streamed
    from lowmem_drf.ops import Attention, RowOps


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


def without_effect(
    name: str,
    slices: int,
    rows: RowOps | None,
    attention: Attention | None,
    keep_attention: str,
    others: Sequence[Any],
) -> tuple[str, ...]:
    """The settings that change nothing where blocks compute as diffusers does: what ``Family.set_activations`` returns.

    Args:
        name: of the family, for messages.
        others: ``rollout_attention`` and ``graded_attention``.

    Raises BadInputError: kept attentions, or an attention in 8 bit, which would change memory or results.
    """
    if keep_attention != "none":
        raise BadInputError(f"The blocks of {name} keep no attentions yet: -s memory.keep_attention=none")
    if any(other is not None for other in others):
        raise BadInputError(
            f"The blocks of {name} have no attention in 8 bit yet: -s kernels.rollout_attention=same "
            "-s kernels.graded_attention=same"
        )
    unused = {
        "kernels.ops": rows is not None and rows.name == "fused",
        "kernels.attention": attention is not None and attention.name != "sdpa",
        "memory.token_slices": slices > 1,
    }
    return tuple(name for name, is_set in unused.items() if is_set)
