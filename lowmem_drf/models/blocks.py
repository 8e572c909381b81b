"""Around the ``forward`` of a block in every family: streamed weights, records of the rollout, and the policy by which
a backward recomputes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lowmem_drf.errors import BadInputError
from lowmem_drf.memory.activations import BlockPolicy, HookedForward, Pace
from lowmem_drf.memory.recorded_rollout import RecordedForward

if TYPE_CHECKING:
    from lowmem_drf.memory.host import HostStore
    from lowmem_drf.memory.recorded_rollout import Recorder
    from lowmem_drf.memory.streaming import Layer, Streamed
    from lowmem_drf.ops import Attention, RowOps


@dataclass(frozen=True)
class Activations:
    """How blocks compute and which activations they keep. No option changes results, except that ``slices`` changes the
    rounding of matrix products, and an attention in 8 bit what it rounds."""

    checkpoint: bool | Literal["host"] = True
    """``True``: blocks keep their input and recompute in their backward. ``"host"``: the inputs are offloaded to
    ``store``. ``False``: blocks keep all activations."""
    slices: int = 1
    """Slices of tokens for the per-token work of a block. 1: as in diffusers."""
    store: HostStore | None = None
    rows: RowOps | None = None
    """``None``: diffusers' arithmetic."""
    attention: Attention | None = None
    """``None``: PyTorch's SDPA."""
    keep_attention: Literal["none", "card", "host"] = "none"
    """Under ``checkpoint``, blocks also keep their self-attention's output instead of recomputing it."""
    recorder: Recorder | None = None
    """Replays forwards that the rollout has recorded."""
    rollout_attention: Any = None
    """(q, k, v) -> out; self-attention without gradient that is not recorded."""
    graded_attention: Attention | None = None
    """Self-attention of all other passes. ``None``: ``attention``."""
    streamed: Streamed | None = None
    """The blocks' weights, if they are streamed."""
    hooked: bool = False
    """Whether hooks on the blocks' calls provide their weights (``activations.HookedForward``)."""


AS_IN_DIFFUSERS = Activations()


def set_blocks(
    transformer: Any, blocks: Sequence[Any], forward_of: Callable[[Any, Layer | None], Any], how: Activations
) -> None:
    """Replaces the ``forward`` of every block. The transformer calls its blocks in order, each with the hidden states
    first; under ``gradient_checkpointing`` through diffusers' ``_gradient_checkpointing_func``.

    Args:
        forward_of: (block, its weights if they are streamed) -> its forward. That takes ``recorded`` and
            ``kept_attention`` too (``memory.kept_attention``; ``None`` without ``keep_attention``), and has a method
            ``unread`` for a recompute whose result nobody reads (``activations.BlockPolicy``).
        how: all but ``slices``, ``rows`` and the attentions, which are ``forward_of``'s.
    """
    store, streamed, recorder, hooked = how.store, how.streamed, how.recorder, how.hooked
    if store is None and "host" in (how.checkpoint, how.keep_attention):
        raise ValueError("activations on the host need a store")
    pace = Pace()
    for place, block in enumerate(blocks):
        forward = forward_of(block, streamed.layers[place] if streamed else None)
        forward = streamed.forward(place, forward) if streamed else HookedForward(forward, pace) if hooked else forward
        block.forward = forward if recorder is None else RecordedForward(forward, block is blocks[-1], recorder)
    if how.checkpoint is False:
        transformer.disable_gradient_checkpointing()
        return
    inputs = store if how.checkpoint == "host" else None
    kept = None if how.keep_attention == "none" else how.keep_attention
    transformer.enable_gradient_checkpointing(BlockPolicy(blocks, inputs, kept, store, recorder))


def without_effect(name: str, how: Activations) -> tuple[str, ...]:
    """The settings that change nothing where blocks compute as diffusers does: what ``Family.set_activations`` returns.
    ``name``: of the family, for messages.

    Raises BadInputError: kept attentions, or an attention in 8 bit, which would change memory or results.
    """
    if how.keep_attention != "none":
        raise BadInputError(f"The blocks of {name} keep no attentions yet: -s memory.keep_attention=none")
    if how.rollout_attention is not None or how.graded_attention is not None:
        raise BadInputError(
            f"The blocks of {name} have no attention in 8 bit yet: -s kernels.rollout_attention=same "
            "-s kernels.graded_attention=same"
        )
    unused = {
        "kernels.ops": how.rows is not None and how.rows.name == "fused",
        "kernels.attention": how.attention is not None and how.attention.name != "sdpa",
        "memory.token_slices": how.slices > 1,
    }
    return tuple(name for name, is_set in unused.items() if is_set)
