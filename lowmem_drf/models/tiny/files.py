"""The weights of a tiny decoder: found, checked by their shapes, and read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowmem_drf.errors import BadInputError
from lowmem_drf.models.lora.base import find_base_lora
from lowmem_drf.models.tiny.network import PREFIX, Sizes, TinyNetwork, sizes_of
from lowmem_drf.models.weights.files import damage, is_pickle, read_header
from lowmem_drf.models.weights.finite import refuse_weights
from lowmem_drf.models.weights.sources import TOYWORLD, resolve
from lowmem_drf.texts import expanded

if TYPE_CHECKING:
    from collections.abc import Mapping

KEY = "model.decoder_file"
PUBLISHED = {16: "Kijai/WanVideo_comfy/taew2_1.safetensors", 48: "Kijai/WanVideo_comfy/taew2_2.safetensors"}
"""By the latents' channels: TAEHV's files for the VAEs of Wan 2.1 (which Wan2.2-A14B has too) and Wan2.2-TI2V-5B."""


def tiny_file(model_id: str, decoder_file: str, latent: int, say: Callable[[str], None]) -> Path:
    """The local file, downloaded if necessary. ``latent``: channels of the generator's latents.

    Raises:
        BadInputError: there is none, or it is no safetensors file.
        LowmemError: the download failed.
    """
    if not decoder_file and model_id == TOYWORLD:
        return toyworld_file()
    if not decoder_file:
        example = PUBLISHED.get(latent, "FILE.safetensors")
        raise BadInputError(f"a tiny decoder needs its weights: -s {KEY}={example}")
    try:
        path = find_base_lora(decoder_file, say, KEY)
        if is_pickle(path):
            raise BadInputError("it is a pickle, and only safetensors files are loaded: pickles can run code.")
        if path.is_dir() or (what := damage(path)):
            raise BadInputError("it is a folder." if path.is_dir() else f"it {what}.")
    except BadInputError as error:
        cure = " Leave it out: ToyWorld has its own." if model_id == TOYWORLD else _take(latent)
        raise BadInputError(f"{KEY}, {decoder_file}: {error}{cure}") from error
    return path


def toyworld_file() -> Path:
    """The tiny decoder of ToyWorld's VAE (``python -m lowmem_drf.toy.build --stages tiny``)."""
    return Path(resolve(TOYWORLD, "generator")).parent / "tiny" / "decoder.safetensors"


def sizes_in(path: Path, latent: int) -> Sizes:
    """The sizes of the decoder in a file. Raises BadInputError if it holds none of this architecture, or one for
    other latents."""
    header = read_header(path)[0]
    shapes = {name.removeprefix(PREFIX): row["shape"] for name, row in header.items() if name.startswith(PREFIX)}
    try:
        sizes = sizes_of(shapes)
        if sizes.latent != latent:
            raise ValueError(f"it takes latents of {sizes.latent} channels, and the model's have {latent}")
    except ValueError as error:
        what = f"{KEY}, {path}: this is no decoder of TAEHV for this model: {error}."
        raise BadInputError(what + _take(latent)) from error
    return sizes


def planned_sizes(model_id: str, decoder_file: str, vae: Mapping[str, Any]) -> Sizes:
    """The sizes of a run's decoder without a download: of the file if it is here, else those of the published one."""
    here = expanded(decoder_file) if decoder_file else toyworld_file() if model_id == TOYWORLD else None
    if here is not None and here.is_file():
        return sizes_in(here, vae["z_dim"])
    return Sizes(latent=vae["z_dim"], patch=vae.get("patch_size") or 1)


def network_for(sizes: Sizes, vae: Mapping[str, Any]) -> TinyNetwork:
    """A network with any weights. ``vae``: ``config.json`` of the VAE that it stands in for. Raises BadInputError."""
    return TinyNetwork(sizes, vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8))


def load_tiny(path: Path, vae: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> TinyNetwork:
    """The network of a file, frozen. Raises BadInputError as ``sizes_in``, and for NaN or infinity."""
    from safetensors import safe_open

    network = network_for(sizes_in(path, vae["z_dim"]), vae)
    with safe_open(path, framework="pt") as file:
        weights = {name.removeprefix(PREFIX): file.get_tensor(name) for name in file.keys() if name.startswith(PREFIX)}  # noqa: SIM118
    refuse_weights(weights, path)
    network.load(weights)
    return network.to(device, dtype)


def _take(latent: int) -> str:
    return f" Take, for example, -s {KEY}={PUBLISHED[latent]}" if latent in PUBLISHED else ""
