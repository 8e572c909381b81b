"""The families of generators, and the configuration of any generator that is published or on this machine."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lowmem_drf.errors import BadInputError, quoted
from lowmem_drf.models.cogvideox import family as cogvideox
from lowmem_drf.models.family import Family, GeneratorConfig, KnownGenerator
from lowmem_drf.models.ltx import family as ltx
from lowmem_drf.models.sd3 import family as sd3
from lowmem_drf.models.wan import family as wan
from lowmem_drf.models.weights.files import (
    IMAGE_ENCODER,
    MODEL_INDEX,
    MORE_TEXT,
    SECOND,
    has_model,
    has_second,
    read_model_index,
)
from lowmem_drf.models.weights.sources import resolve
from lowmem_drf.texts import parse_json

FAMILIES: list[Family] = [
    wan,
    ltx,
    sd3,
    cogvideox,
]
"""Each is one folder beside this file (docs/adding-a-generator.md)."""

SUBFOLDERS = {"transformer": "transformer", "vae": "vae", "text": "text_encoder"}
"""Field of ``GeneratorConfig`` -> subfolder of a diffusers model."""
KNOWN_GENERATORS: dict[str, KnownGenerator] = {
    name: known for family in FAMILIES for name, known in family.KNOWN.items()
}
"""By hub id. They serve random and fake weights, the plan, and single-file transformers, which must fit tensor by
tensor."""


def family_of(model: Any) -> Family:
    """The family of a transformer, or of a ``GeneratorConfig``. Raises ValueError for any other class."""
    kind = model.transformer["_class_name"] if isinstance(model, GeneratorConfig) else type(model).__name__
    found = next((family for family in FAMILIES if kind == family.KINDS["transformer"]), None)
    if found is None:
        raise ValueError(f"no family of generators has a {kind}")
    return found


def image_use(generator: GeneratorConfig) -> Literal["no", "may", "must"]:
    """Whether a clip begins with an image of its prompt."""
    images = family_of(generator).IMAGES
    return images.use(generator) if images else "no"


def blocks_of(transformer: Any) -> list[Any]:
    """The blocks of a transformer, in their order."""
    return list(getattr(transformer, family_of(transformer).BLOCKS))


def names_of(families: Iterable[Family]) -> str:
    """ "Wan", or several with "or", for messages."""
    *first, last = (family.NAME for family in families)
    return f"{', '.join(first)} or {last}" if first else last


def generator_config(folder_or_id: str) -> GeneratorConfig:
    """The configuration of a generator, without its weights and without the network.

    ``folder_or_id``: ``toyworld``, a diffusers folder, or a hub id that is in the hub's cache or in
    ``KNOWN_GENERATORS``.

    Raises BadInputError: the configuration is not on this machine, cannot be read, or is of no family.
    """
    place = resolve(folder_or_id, "generator")

    def find(name: str) -> Path | None:
        return Path(place) / name if Path(place).is_dir() else _cached(place, name)

    files = [find(f"{subfolder}/config.json") for subfolder in SUBFOLDERS.values()]
    index = find(MODEL_INDEX)
    if index is not None and None not in files:
        pairs = zip(SUBFOLDERS.items(), files, strict=True)
        models: dict[str, dict[str, Any]] = {}
        families: Collection[Family] = FAMILIES
        for (field, subfolder), file in pairs:
            assert file is not None
            models[field], families = _read(subfolder, file, place, families)
        generator = GeneratorConfig(models["transformer"], models["vae"], models["text"])
        (family,) = families
        listed = read_model_index(index)
        generator = replace(generator, more_text=_more_text(family, find, place))
        if family.IMAGES and has_model(listed, IMAGE_ENCODER):
            file = find(f"{IMAGE_ENCODER}/config.json") or Path(place) / IMAGE_ENCODER
            generator = replace(generator, image=_read(IMAGE_ENCODER, file, place, families)[0])
        generator = replace(generator, first_frame=bool(family.IMAGES and listed.get("expand_timesteps")))
        family.refuse(generator, place)
        boundary = _boundary(listed)
        second = find(f"{SECOND}/config.json") if boundary is not None else None
        if boundary is None or second is not None:
            expert = None if second is None else _read(SECOND, second, place, families)[0]
            return replace(generator, transformer_2=expert, boundary=boundary)
    if place in KNOWN_GENERATORS:
        return KNOWN_GENERATORS[place].config
    raise BadInputError(
        f"No configuration of {place!r} is on this machine, neither as a folder nor in the hub's cache. If it is an id "
        "on the Hugging Face hub, get its configuration (a few kilobytes): "
        f"hf download {quoted(place)} --include '*.json'\n"
        f"Or give a folder in diffusers layout, or one of: {', '.join(KNOWN_GENERATORS)}."
    )


def _more_text(family: Family, find: Callable[[str], Path | None], place: str) -> dict[str, dict[str, Any]]:
    """The configurations of the text encoders after the first."""
    found: dict[str, dict[str, Any]] = {}
    for subfolder in family.KINDS:
        if subfolder.startswith(MORE_TEXT):
            file = find(f"{subfolder}/config.json")
            found[subfolder] = _read(subfolder, file or Path(place) / subfolder, place, [family])[0]
    return found


def _cached(hub_id: str, name: str) -> Path | None:
    """A file in the hub's cache, or ``None``."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(hub_id, name)
    except HFValidationError:  # not an id, so a folder that does not exist
        return None
    return Path(cached) if isinstance(cached, str) else None


def _boundary(index: Mapping[str, Any]) -> float | None:
    """``boundary_ratio`` if there are two experts. Without it diffusers never calls a second transformer."""
    ratio = index.get("boundary_ratio")
    if ratio is None:
        return None
    if not isinstance(ratio, float) or not 0 < ratio < 1 or not has_second(index):
        raise BadInputError(
            f"{MODEL_INDEX} has boundary_ratio = {ratio!r}: it is to be a number between 0 and 1, beside a {SECOND}."
        )
    return ratio


def _read(
    subfolder: str, file: Path, place: str, families: Collection[Family]
) -> tuple[dict[str, Any], Collection[Family]]:
    """A model's configuration, and those of ``families`` that have such a model."""
    if not file.is_file():
        raise BadInputError(f"{place} lacks {subfolder}/config.json: give the complete folder of a diffusers model.")
    try:
        config: dict[str, Any] = parse_json(file.read_bytes())
        kind = config.get("_class_name") or config.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise BadInputError(f"{file} cannot be read as a configuration ({error}). Get it anew.") from error
    wanted = {family.KINDS["transformer" if subfolder == SECOND else subfolder]: family for family in families}
    if kind not in wanted:
        raise BadInputError(
            f"{place} holds a {kind} in {subfolder}, and a {' or '.join(wanted)} is expected there: this program "
            f"trains models of {names_of(FAMILIES)}."
        )
    return config, [wanted[kind]]
