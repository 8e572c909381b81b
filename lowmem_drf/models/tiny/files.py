"""The weights of a tiny decoder: found, checked by their shapes, and read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lowmem_drf.errors import BadInputError
from lowmem_drf.models.lora.base import find_base_lora
from lowmem_drf.models.tiny.network import PREFIX, Sizes, TinyNetwork, sizes_of
from lowmem_drf.models.weights.files import damage, is_pickle, read_header
from lowmem_drf.models.weights.finite import refuse_weights
from lowmem_drf.models.weights.sources import TOYWORLD, resolve
from lowmem_drf.texts import expanded

if TYPE_CHECKING:
    from lowmem_drf.models.family import GeneratorSizes

KEY = "model.decoder_file"


def tiny_file(model_id: str, decoder_file: str, generator: GeneratorSizes, say: Callable[[str], None]) -> Path:
    """The local file, downloaded if necessary. ``generator``: that whose VAE it stands in for.

    Raises:
        BadInputError: there is none, or it is no safetensors file.
        LowmemError: the download failed.
    """
    if not decoder_file and model_id == TOYWORLD:
        return toyworld_file()
    if not decoder_file:
        example = generator.tiny_decoder or "FILE.safetensors"
        raise BadInputError(f"a tiny decoder needs its weights: -s {KEY}={example}")
    try:
        path = find_base_lora(decoder_file, say, KEY)
        if is_pickle(path):
            raise BadInputError("it is a pickle, and only safetensors files are loaded: pickles can run code.")
        if path.is_dir() or (what := damage(path)):
            raise BadInputError("it is a folder." if path.is_dir() else f"it {what}.")
    except BadInputError as error:
        cure = " Leave it out: ToyWorld has its own." if model_id == TOYWORLD else _take(generator)
        raise BadInputError(f"{KEY}, {decoder_file}: {error}{cure}") from error
    return path


def toyworld_file() -> Path:
    """The tiny decoder of ToyWorld's VAE (``python -m lowmem_drf.toy.build --stages tiny``)."""
    return Path(resolve(TOYWORLD, "generator")).parent / "tiny" / "decoder.safetensors"


def sizes_in(path: Path, generator: GeneratorSizes) -> Sizes:
    """The sizes of the decoder in a file. Raises BadInputError if it holds none of this architecture, or one for
    other latents."""
    header = read_header(path)[0]
    shapes = {name.removeprefix(PREFIX): row["shape"] for name, row in header.items() if name.startswith(PREFIX)}
    try:
        sizes = sizes_of(shapes)
        if sizes.latent != generator.channels:
            raise ValueError(f"it takes latents of {sizes.latent} channels, and the model's have {generator.channels}")
    except ValueError as error:
        what = f"{KEY}, {path}: this is no decoder of TAEHV for this model: {error}."
        raise BadInputError(what + _take(generator)) from error
    return sizes


def planned_sizes(model_id: str, decoder_file: str, generator: GeneratorSizes) -> Sizes:
    """The sizes of a run's decoder without a download: of the file if it is here, else those of the published one."""
    here = expanded(decoder_file) if decoder_file else toyworld_file() if model_id == TOYWORLD else None
    if here is not None and here.is_file():
        return sizes_in(here, generator)
    return Sizes(latent=generator.channels, patch=generator.vae_patch)


def network_for(sizes: Sizes, generator: GeneratorSizes) -> TinyNetwork:
    """A network with any weights. Raises BadInputError."""
    return TinyNetwork(sizes, generator.temporal, generator.spatial)


def load_tiny(path: Path, generator: GeneratorSizes, dtype: torch.dtype, device: torch.device) -> TinyNetwork:
    """The network of a file, frozen. Raises BadInputError as ``sizes_in``, and for NaN or infinity."""
    from safetensors import safe_open

    network = network_for(sizes_in(path, generator), generator)
    with safe_open(path, framework="pt") as file:
        weights = {name.removeprefix(PREFIX): file.get_tensor(name) for name in file.keys() if name.startswith(PREFIX)}  # noqa: SIM118
    refuse_weights(weights, path)
    network.load(weights)
    return network.to(device, dtype)


def _take(generator: GeneratorSizes) -> str:
    return f" Take, for example, -s {KEY}={generator.tiny_decoder}" if generator.tiny_decoder else ""
