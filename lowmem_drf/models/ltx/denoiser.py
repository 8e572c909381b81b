"""The LTX-Video transformer as a ``types.Velocity``: flow-matching velocity v = eps - x_0 at noise level sigma.

As ``LTXPipeline`` of diffusers 0.42.1 calls it: one token of every latent, timestep 1000 sigma (a real number),
positions in seconds and pixels, and a mask over the text's padding.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch

from lowmem_drf.errors import BadInputError
from lowmem_drf.method.schedule import TRAIN_TIMESTEPS
from lowmem_drf.models.blocks import set_blocks
from lowmem_drf.models.ltx.published import NAME, SPATIAL, TEMPORAL

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem_drf.memory.host import HostStore
    from lowmem_drf.memory.recorded_rollout import Recorder
    from lowmem_drf.memory.streaming import Streamed
    from lowmem_drf.ops import Attention, RowOps
    from lowmem_drf.types import Velocity

_ORDER = ("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb", "encoder_attention_mask")
"""Arguments of a block."""


class _Forward:
    """A block's own ``forward``."""

    def __init__(self, block: Any) -> None:
        self._run = type(block).forward.__get__(block)

    def __call__(self, hidden_BLD: Tensor, *rest: Any, kept_attention: None = None, recorded: bool = False) -> Any:
        return self._run(hidden_BLD, *rest)

    unread = __call__


def set_activations(
    transformer: Any,
    checkpoint: bool | Literal["host"] = True,
    slices: int = 1,
    store: HostStore | None = None,
    rows: RowOps | None = None,
    attention: Attention | None = None,
    keep_attention: Literal["none", "card", "host"] = "none",
    recorder: Recorder | None = None,
    rollout_attention: Any = None,
    graded_attention: Attention | None = None,
    streamed: Streamed | None = None,
    hooked: bool = False,
) -> None:
    """See ``Family.set_activations``. The blocks are diffusers' own: ``slices``, ``rows`` and ``attention``, which
    change no results, are not used.

    Raises BadInputError: kept attentions, or an attention in 8 bit.
    """
    if keep_attention != "none":
        raise BadInputError(f"The blocks of {NAME} keep no attentions yet: -s memory.keep_attention=none")
    if rollout_attention is not None or graded_attention is not None:
        raise BadInputError(
            f"The blocks of {NAME} have no attention in 8 bit yet: -s kernels.rollout_attention=same "
            "-s kernels.graded_attention=same"
        )
    blocks = list(transformer.transformer_blocks)
    for block in blocks:
        if _positional not in block._forward_pre_hooks.values():
            block.register_forward_pre_hook(_positional, with_kwargs=True)
    set_blocks(
        transformer, blocks, lambda block, weights: _Forward(block), checkpoint, store, keep_attention, recorder,
        streamed, hooked,
    )  # fmt: skip


def _positional(block: Any, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """diffusers names the arguments of a block, unless it checkpoints."""
    return (*given, *(named[name] for name in _ORDER if name in named)), {}


def as_velocity(transformer: Any, recorder: Recorder | None = None, call: Any = None, fps: float = 24.0) -> Velocity:
    """``f(x_BCFhw, sigma, text_BLD) -> v_BCFhw`` in the dtype of ``x``, computed in the transformer's dtype.
    Differentiable in ``x`` and the LoRA. Text embeddings that are zero are padding, and masked.

    Args:
        call: called in place of the transformer.
        fps: frames a second of the clips: positions in time are seconds.
    """
    call = transformer if call is None else call
    scale = (TEMPORAL / fps, SPATIAL, SPATIAL)

    def velocity(x_BCFhw: Tensor, sigma: float, cond: Any) -> Tensor:
        dtype, (frames, height, width) = transformer.proj_in.weight.dtype, x_BCFhw.shape[2:]
        timestep_B = torch.full((len(x_BCFhw),), sigma * TRAIN_TIMESTEPS, dtype=torch.float32, device=x_BCFhw.device)
        text_BLD = cond.to(x_BCFhw.device, dtype)
        with nullcontext() if recorder is None else recorder.during(cond):
            (v_BND,) = call(
                x_BCFhw.to(dtype).flatten(2).transpose(1, 2), text_BLD, timestep_B, (text_BLD != 0).any(dim=2),
                frames, height, width, scale, return_dict=False,
            )  # fmt: skip
        return v_BND.transpose(1, 2).unflatten(2, (frames, height, width)).to(x_BCFhw.dtype)

    return velocity
