"""Which model a LoRA belongs to, and how that is sampled: ``export-lora`` says it and keeps it in the file's header,
``sample`` uses it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from lowmem_drf.config import change
from lowmem_drf.errors import BadInputError
from lowmem_drf.models.lora.levels import first_step
from lowmem_drf.models.weights.sources import FEWSTEP
from lowmem_drf.schema import Config
from lowmem_drf.texts import one_line, parse_json

HEADER = "lowmem_drf.trained_with"
_BASE = ("model.transformer", "model.base_lora", "model.base_lora_scale")
_SAMPLER = ("steps", "graded_steps", "graded", "timesteps", "update", "shift", "guidance")
_KEYS = (*_BASE, *(f"sampler.{key}" for key in _SAMPLER), "lora.max_sigma")
_BEFORE = {"lora.max_sigma": 1.0}
"""Of files that do not say it."""
_GRID = {"sampler.steps", "sampler.timesteps", "sampler.graded", "sampler.graded_steps"}
"""Go together: levels and graded steps are those of a number of steps."""
_EXPERT = "model.expert"


def public(file: str) -> str:
    """A hub file as it is, and of a local one the name: headers are published, and folders are the user's own."""
    return Path(file).name if Path(file).is_absolute() else file


def header(config: Config, expert: str = "") -> dict[str, str]:
    """For the file's header: the settings by key, as JSON, so that ``sample`` finds them again. ``expert``: empty for a
    model with one transformer."""
    of_two = {_EXPERT: expert} if expert else {}
    return {HEADER: json.dumps({"model.id": public(config.model.id), **of_two, **_settings(config)})}


def in_words(config: Config, file: str) -> str:
    """What to load in which order, and how to sample it."""
    model, sampler = config.model, config.sampler
    merged = (f"{public(name)} at strength {scale:g}" for name, scale in model.base_loras())
    loads = [public(model.transformer or model.id), *merged, f"{file} at strength 1"]
    levels = f"shift {sampler.shift:g}"
    if sampler.timesteps:
        levels = f"sigmas {', '.join(f'{level / 1000:.4g}' for level in sampler.timesteps)}, 0"
    fresh = "with fresh noise at each (lcm)" if sampler.update == "renoise" else "by Euler"
    said = (
        f"To be used as it was trained: load {', then '.join(loads)}; {sampler.steps} steps {fresh}, {levels}, "
        f"guidance {sampler.guidance:g}."
    )
    if first := first_step(config):
        without = "the first step" if first == 1 else f"the first {first} steps"
        said += (
            f" Its clips were made with it at sigmas up to {config.lora.max_sigma:g} alone (lora.max_sigma), {without} "
            "without: docs/lora.md."
        )
    return said


def as_trained(
    config: Config, metadata: Mapping[str, str], asked: Sequence[str], may_change: bool
) -> tuple[Config, list[str]]:
    """The configuration that a LoRA file with this header belongs to, and lines that say what differs from ``config``.

    Args:
        asked: overrides of the user, which stay.
        may_change: else the settings are only said.

    Raises BadInputError: it is for the other one of two transformers.
    """
    if HEADER not in metadata:
        return config, []
    try:
        told = parse_json(metadata[HEADER])
        told = _BEFORE | told
        model, settings = str(told["model.id"]), {key: told[key] for key in (*_KEYS, _EXPERT) if key in told}
        said = list(_said(config, model, settings))
        own = [text.partition("=")[0].strip() for text in asked]
        kept = {key for key in settings if any(key == name or key.startswith(f"{name}.") for name in own)}
        kept |= _GRID if kept & {"sampler.steps", "sampler.timesteps"} else set()
        now = {_EXPERT: config.model.expert, **_settings(config)}
        is_kept = _EXPERT in kept or not may_change
        is_other = is_kept and settings.get(_EXPERT, config.model.expert) != config.model.expert
        wanted = {key: value for key, value in settings.items() if key not in kept and value != now[key]}
        wanted = {} if is_other else wanted
        if any(_is_local(file) for file in _names(wanted)):  # not to be found by its name alone
            wanted = {key: value for key, value in wanted.items() if key not in _BASE}
        settings_words = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in wanted.items()]
        changed = change(config, settings_words)
    except (BadInputError, ValueError, KeyError, TypeError, AttributeError):
        return config, ["its header says how it was trained, and cannot be used"]
    if is_other:
        meant = one_line(str(settings[_EXPERT]), 20)
        raise BadInputError(
            f"the LoRA was trained for the {meant}-noise transformer, and this is the {config.model.expert}-noise one. "
            f"Use it with model.expert={meant}; a run keeps its own, so sample with --preset."
        )
    if not wanted:
        return config, said
    shown = one_line(" ".join(settings_words), 400)
    if may_change:
        return changed, [*said, f"as it was trained: {shown}"]
    return config, [*said, f"it was trained with {shown}; this run has other settings"]


def _said(config: Config, model: str, settings: Mapping[str, Any]) -> Iterator[str]:
    """What cannot be set by itself: another model, and files of the user's own."""
    if model != public(config.model.id):
        yield f"it was trained on {one_line(model, 100)}, and is used on {config.model.id}"
    now = set(_names(_settings(config)))
    for file in _names(settings):
        if _is_local(file) and file not in now:
            yield f"it was trained on a base with {one_line(file, 100)}; give that: -s model.base_lora=FOLDER/{file}"


def _settings(config: Config) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in _KEYS:
        value = reduce(getattr, key.split("."), config)
        found[key] = [public(one) for one in value] if key == "model.base_lora" and isinstance(value, list) else value
    for key in ("model.transformer", "model.base_lora"):
        found[key] = public(found[key]) if isinstance(found[key], str) else found[key]
    return found


def _names(settings: Mapping[str, Any]) -> list[str]:
    """The files of the base."""
    files = [settings.get("model.transformer", ""), *_as_list(settings.get("model.base_lora", ""))]
    return [file for file in files if file]


def _as_list(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


def _is_local(file: str) -> bool:
    """Whether it is no file of the hub (``owner/repo/file``), nor of this package. Headers come from anybody: no path
    is followed."""
    if file == FEWSTEP:
        return False
    owner, *rest = str(file).split("/")
    return len(rest) < 2 or not owner[:1].isalnum() or ":" in owner or ".." in rest
