"""The Wan transformer as a ``types.Velocity``: flow matching velocity v = eps - x_0 at a noise level sigma."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from lowmem_drf.memory.activations import BlockPolicy, HookedForward, Pace
from lowmem_drf.memory.recorded_rollout import RecordedForward
from lowmem_drf.models.wan.attention import attention_named
from lowmem_drf.models.wan.block import BlockForward
from lowmem_drf.models.wan.random_generator import empty_transformer
from lowmem_drf.models.weights.quant import Quant
from lowmem_drf.models.weights.reader import Changes, TensorFiles, files_in, fill_from_files, require_complete
from lowmem_drf.models.weights.sources import loading
from lowmem_drf.ops import naive_ops

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel
    from torch import Tensor

    from lowmem_drf.memory.host import HostStore
    from lowmem_drf.memory.recorded_rollout import Recorder
    from lowmem_drf.memory.streaming import Streamed
    from lowmem_drf.ops import Attention, RowOps
    from lowmem_drf.types import Velocity

TRAIN_TIMESTEPS = 1000


def load_denoiser(
    folder_or_id: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    quant: Quant = "none",
    subfolder: str = "transformer",
    home: str | torch.device | None = None,
    changes: Changes | None = None,
    blocks: int | None = None,
    taken: Callable[[torch.nn.Parameter], None] | None = None,
) -> WanTransformer3DModel:
    """The transformer in a subfolder of a diffusers model: frozen, eval. In 16 bits norms and the time embedding stay
    in fp32, as ``from_pretrained`` has it.

    Tensors are read, changed and packed one by one: neither the host nor the card holds anything in more bits than it
    stays in, but for one tensor.

    Args:
        quant: what the linears of the blocks are kept in (see ``quant``).
        home: where the model stays. Default: ``device``, where weights are changed and packed.
        changes: of the base's weights: ``base_lora``'s.
        blocks: only the first so many have values (``weight_reader.fill_from_files``).
        taken: called with every parameter as soon as it has its value (``filling.fill``).

    Raises:
        BadInputError: it cannot be loaded, its weights are quantised already, or bitsandbytes is missing.
    """
    from diffusers import WanTransformer3DModel

    with loading("the transformer", folder_or_id):
        folder = Path(folder_or_id) if Path(folder_or_id).is_dir() else _downloaded(folder_or_id, subfolder)
        model = empty_transformer(WanTransformer3DModel.load_config(folder, subfolder=subfolder), quant=quant)
        files = TensorFiles(files_in(folder / subfolder))
        require_complete(files, model)
        return cast(
            "WanTransformer3DModel",
            fill_from_files(
                model, files, {name: name for name in files.entries}, dtype, device, home, changes, blocks, taken
            ),
        )


def _downloaded(hub_id: str, subfolder: str) -> Path:
    """A subfolder of a repository, in the hub's cache."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(hub_id, allow_patterns=[f"{subfolder}/*.json", f"{subfolder}/*.safetensors"]))


def set_activations(
    transformer: WanTransformer3DModel,
    checkpoint: bool | Literal["host"] = True,
    slices: int = 1,
    store: HostStore | None = None,
    rows: RowOps | None = None,
    attention: Attention | None = None,
    keep_attention: Literal["none", "card", "host"] = "none",
    recorder: Recorder | None = None,
    rollout_attention: Any = None,
    streamed: Streamed | None = None,
    hooked: bool = False,
) -> None:
    """How the blocks compute, and what they keep of a forward with gradient. May be called again, with or without a
    LoRA on. Where memory is saved nothing else changes but the rounding of matrix products over ``slices``.

    Args: checkpoint: ``True``: each block keeps its input, and is computed again in its backward. ``"host"``: and the
        inputs wait in ``store``. ``False``: each block keeps all it needs. slices: what a block does token by token is
        done in so many slices of tokens, with gradient and without (see ``wan_block``). 1: as in diffusers. store: of
        ``"host"``. rows, attention: the form of the operations; by default diffusers' arithmetic and PyTorch's SDPA.
        keep_attention: under ``checkpoint``, blocks keep the results of their attentions too, and never compute one
        twice. recorder: decides about forwards that are taken from the rollout. rollout_attention: (q, k, v) -> out,
        among the tokens, wherever there is no gradient and nothing is recorded. streamed: the blocks, where their
        weights are streamed. hooked: the blocks' weights come by hooks on their calls (``activations.HookedForward``).

    Raises:
        BadInputError: an image-to-video transformer.
    """
    needs_store = checkpoint == "host" or keep_attention == "host"
    if needs_store and store is None:
        raise ValueError("what waits on the host needs a store")
    blocks, pace = list(transformer.blocks), Pace()
    for place, block in enumerate(blocks):
        weights = streamed.layers[place] if streamed else None
        forward: Any = BlockForward(
            block, rows or naive_ops(), attention or attention_named("sdpa"), slices, rollout_attention, weights
        )
        forward = streamed.forward(place, forward) if streamed else HookedForward(forward, pace) if hooked else forward
        block.forward = forward if recorder is None else RecordedForward(forward, block is blocks[-1], recorder)
    if checkpoint is False:
        transformer.disable_gradient_checkpointing()
        return
    policy = BlockPolicy(
        blocks,
        store if checkpoint == "host" else None,
        None if keep_attention == "none" else keep_attention,
        store,
        recorder,
    )
    transformer.enable_gradient_checkpointing(policy)


def timestep_of(sigma: float) -> int:
    """The integer timestep that WanPipeline passes for ``sigma`` in (0, 1]: UniPC stores 1000 sigma in an int64, which
    truncates."""
    return int(sigma * TRAIN_TIMESTEPS)


def as_velocity(transformer: WanTransformer3DModel, recorder: Recorder | None = None, call: Any = None) -> Velocity:
    """``f(x_BCFhw, sigma, text_BLD) -> v_BCFhw`` in the dtype of ``x``; computed in the dtype of the transformer.
    Differentiable in ``x`` and the LoRA. ``call``: computes as the transformer does, and is called in its place."""
    call = transformer if call is None else call

    def velocity(x_BCFhw: Tensor, sigma: float, cond: Any) -> Tensor:
        # patch_embedding's, not transformer.dtype: that answers with the dtype of whatever parameter comes last, an
        # fp32 LoRA's for one
        dtype = transformer.patch_embedding.weight.dtype
        timestep = torch.full((x_BCFhw.shape[0],), timestep_of(sigma), dtype=torch.int64, device=x_BCFhw.device)
        with nullcontext() if recorder is None else recorder.during(cond):
            v = call(x_BCFhw.to(dtype), timestep, cond.to(x_BCFhw.device, dtype), return_dict=False)[0]
        return v.to(x_BCFhw.dtype)

    return velocity
