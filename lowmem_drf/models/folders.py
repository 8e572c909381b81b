"""Transformer and VAE from a folder in diffusers' layout, by the names of diffusers' modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lowmem_drf.errors import BadInputError
from lowmem_drf.models.weights.finite import refuse_model
from lowmem_drf.models.weights.quant import Quant
from lowmem_drf.models.weights.reader import Changes, TensorFiles, files_in, fill_from_files, require_complete
from lowmem_drf.models.weights.sources import complete, downloaded, loading


def load_transformer(
    kind: str,
    empty: Callable[..., Any],
    list_of_blocks: str,
    folder_or_id: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    quant: Quant = "none",
    subfolder: str = "transformer",
    home: str | torch.device | None = None,
    changes: Changes | None = None,
    blocks: int | None = None,
    taken: Callable[[torch.nn.Parameter], None] | None = None,
) -> Any:
    """See ``Family.load_transformer``. Tensors are read, changed and packed one by one, so at most one is in a larger
    format than the result.

    Args:
        kind: its class in diffusers.
        empty: ``Family.empty_transformer``.
        list_of_blocks: ``Family.BLOCKS``.
    """
    import diffusers

    with loading("the transformer", folder_or_id):
        folder = Path(folder_or_id) if Path(folder_or_id).is_dir() else downloaded(folder_or_id, subfolder)
        model = empty(getattr(diffusers, kind).load_config(folder, subfolder=subfolder), quant=quant)
        files = TensorFiles(files_in(folder / subfolder))
        require_complete(files, model)
        names = {name: name for name in files.entries}
        model = fill_from_files(model, files, names, dtype, device, home, changes, blocks, taken, list_of_blocks)
        return model.to(device if home is None else home)  # buffers too


def refuse_file(family: str, file: str | Path, config: Mapping[str, Any], model: str, *_: Any, **__: Any) -> Any:
    """``Family.load_file`` of a family that reads no single files. Raises BadInputError."""
    raise BadInputError(
        f"model.transformer = {str(file)!r}: transformers of {family} are read from folders in diffusers' layout "
        "alone. Give that folder as model.id, and leave model.transformer empty."
    )


def load_vae(
    kind: str, folder_or_id: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Any:
    """The VAE of class ``kind`` in subfolder ``vae`` of a diffusers model: frozen, eval. Raises BadInputError if it
    cannot be loaded."""
    import diffusers

    load = getattr(diffusers, kind).from_pretrained
    with loading("the VAE", folder_or_id):
        vae = complete(load(folder_or_id, subfolder="vae", torch_dtype=dtype, output_loading_info=True))
    vae = vae.to(device).eval().requires_grad_(False)
    refuse_model(vae, f"the VAE of {folder_or_id}")
    return vae


def drop_encoder(vae: Any) -> None:
    """Frees the weights that only encoding needs."""
    vae.encoder = None
