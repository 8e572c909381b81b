"""Preset TOML + overrides -> one frozen, typed tree (``schema.Config``).

``load_config`` reads a preset (a name or a path), applies ``key=value`` overrides, checks everything and reports
**all** problems at once, each with its source and its key. Every field has a default; a preset holds only the
differences from the defaults, or from the preset that it names in ``extends``. ``method/``, ``memory/`` and
``kernels/`` never see the tree: they take flat arguments.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from lowmem_drf.errors import BadInputError
from lowmem_drf.preset_files import DEFAULT_PRESET, extended_preset, preset_path, text_of
from lowmem_drf.sampling.published import TIMESTEPS, as_published, grid_of
from lowmem_drf.schema import Config
from lowmem_drf.schema.generator import Video
from lowmem_drf.schema.learning import Reward
from lowmem_drf.schema.node import Node
from lowmem_drf.schema.running import Log
from lowmem_drf.texts import escaped, one_line, parse_toml, shown, toml_value

_PATTERNS = {
    "memory.vae_backward": 'should be "exact" or "window:n", for example "window:3"',
    "critic.frames": 'should be a number of frames or "fps:rate", for example "fps:2"',
    "rewards": "their names should be lower-case letters, digits and underscores, for example rewards.clip.id",
}
"""Error messages for keys that ``schema`` checks with a regular expression."""

MOST_PROBLEMS = 4
"""Listed in one message."""

_ANY = object()
_RETIRED = {
    "memory.keep_blocks": 0,
    "zero.nvme_path": "",
    "zero.stage3_prefetch_bucket_size": _ANY,
    "zero.stage3_max_live_parameters": _ANY,
    "zero.stage3_param_persistence_threshold": _ANY,
}
"""Keys of earlier versions, with the value under which nothing has changed. Runs of those versions hold all keys."""
_ADDED = {
    **{"critic.check": False, "critic.writer": "", "skip_prompts": [], "optim.max_skipped": 5},
    **{"log.sample_first": True, "memory.fit": "as_given"},
}
"""Keys that earlier versions lack, with the value that those versions acted on."""


def known_keys(node: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the tree, without the sections."""
    keys: list[str] = []
    for name, info in node.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += known_keys(kind, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def is_key(key: str) -> bool:
    """Whether it is a key of the tree: one of ``known_keys``, or ``rewards.<name>.<key>``."""
    table, _, rest = key.partition(".")
    return key in known_keys() or (table == "rewards" and rest.partition(".")[2] in Reward.model_fields)


def parse_override(text: str) -> tuple[str, Any]:
    """``key=value`` -> (key, value). The value is TOML; anything else is taken as a string (``-s
    critic.mode=vanilla``)."""
    key, equals, raw = text.partition("=")
    key, raw = key.strip(), raw.strip()
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
        raise BadInputError(f"{_option(text)}: write it as key=value, for example -s optim.lr=1e-4")
    try:
        table = parse_toml(f"v = {raw}")
    except ValueError:  # a bare word
        return key, float(raw) if re.fullmatch(r"[+-]?\d+[eE][+-]?\d+", raw) else raw
    return key, table["v"] if len(table) == 1 else raw  # a text of several lines may hold more keys


def _option(override: str) -> str:
    return f"-s {one_line(override, 80)}"


def as_overrides(settings: Mapping[str, Any]) -> list[str]:
    """``{"optim": {"lr": 1e-4}, "lora.rank": 8}`` -> the same as ``key=value``."""
    overrides = []
    for key, value in _flat(settings):
        try:
            overrides.append(f"{key}={toml_value(str(value) if isinstance(value, Path) else value)}")
        except (TypeError, ValueError) as error:
            raise BadInputError(f"settings: {shown(key)} is {shown(value)}, which no configuration holds.") from error
    return overrides


def load_config(preset: str | Path = DEFAULT_PRESET, overrides: Iterable[str] = ()) -> Config:
    """The configuration of a preset with overrides applied. Raises BadInputError that lists every problem."""
    path = preset_path(preset) if isinstance(preset, str) else preset
    return _overridden(_preset_values(path), overrides)


def _preset_values(path: Path, below: tuple[Path, ...] = ()) -> dict[str, tuple[Any, str]]:
    """Key -> (value, file that sets it), including the keys of the preset that this one extends. ``below``: the presets
    that extend this one."""
    try:
        table = parse_toml(text_of(path))
    except ValueError as error:
        cure = "Correct it there; a preset to compare it with: lowmem-drf presets show toy"
        raise BadInputError(f"{path}: cannot be read as a TOML file: {one_line(str(error))}. {cure}") from error
    chain = (*below, path.resolve())
    values: dict[str, tuple[Any, str]] = {}
    if "extends" in table:
        base = extended_preset(path, table.pop("extends"))
        if base.resolve() in chain:
            circle = ", ".join(str(file) for file in (*chain, base.resolve()))
            message = f"these presets extend each other in a circle: {circle}. Take the line out of one of them."
            raise BadInputError(f"{path}: extends: {message}")
        values = _preset_values(base, chain)
    own = dict(_flat(table))
    if len(own) > 0.75 * len(known_keys()):  # a run's file: no preset holds that many keys
        own = _ADDED | own
    grammar = {"templates": ("prompts", "critic.id"), "phrases": ("critic.id",)}
    earlier = grammar.get(str(own.get("critic.questions")), ())
    if any(own.get(key) == "toyworld" for key in earlier):
        del own["critic.questions"]  # names of ToyWorld's grammar in earlier versions
    kept = {key: value for key, value in own.items() if key not in _RETIRED or _RETIRED[key] not in (_ANY, value)}
    return values | {key: (value, str(path)) for key, value in kept.items()}


def change(config: Config, overrides: Iterable[str]) -> Config:
    """The configuration with ``key=value`` overrides applied. Raises as ``load_config`` does."""
    return _overridden({key: (value, "configuration") for key, value in _flat(config.model_dump())}, overrides)


def _overridden(values: dict[str, tuple[Any, str]], overrides: Iterable[str]) -> Config:
    problems: list[str] = []
    own: dict[str, tuple[Any, str]] = {}
    for text in overrides:
        try:
            key, value = parse_override(text)
            rows = [(key, value)] if key in known_keys() else _flat({key: value})  # a section as an inline table
            own |= {k: (v, _option(text)) for k, v in rows}
        except BadInputError as error:
            problems.append(str(error))
    levels, _ = values.get(TIMESTEPS, ([], ""))
    if "sampler.steps" in own and TIMESTEPS not in own and len(levels) != own["sampler.steps"][0]:
        values = {key: value for key, value in values.items() if key != TIMESTEPS}  # those of another number of steps
    return _validate(as_published(values | own), problems)


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _validate(values: Mapping[str, tuple[Any, str]], problems: list[str]) -> Config:
    sources = {key: source for key, (_, source) in values.items()}
    tree: dict[str, Any] = {}
    known = set(known_keys())
    for key, (value, source) in values.items():
        if key not in known and not is_key(key):
            hint = _did_you_mean(key) if len(problems) < MOST_PROBLEMS else ""  # which takes milliseconds
            problems.append(f"{source}: there is no key {shown(key)}.{hint}")
            continue
        *sections, leaf = key.split(".")
        node = tree
        for section in sections:
            child = node.get(section)
            node[section] = node = child if isinstance(child, dict) else {}
        node[leaf] = dict(value) if isinstance(value, Mapping) else value
    wrong: dict[str, str] = {}
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        wrong = _type_problems(error)
        problems += [f"{sources.get(key, 'default')}: {key}: {message}" for key, message in wrong.items()]
        config = Config.model_validate(_without(tree, wrong))
    problems += _cross_problems(config, sources, wrong, grid=grid_of(config.model.id))
    if problems:
        more = len(problems) - MOST_PROBLEMS
        lines = problems if more <= 1 else [*problems[:MOST_PROBLEMS], f"and {more} more"]
        raise BadInputError("the configuration cannot be used:\n  " + "\n  ".join(lines))
    return config


def _without(tree: Mapping[str, Any], keys: Iterable[str], prefix: str = "") -> dict[str, Any]:
    """The tree without these keys."""
    return {
        name: _without(value, keys, f"{prefix}{name}.") if isinstance(value, Mapping) else value
        for name, value in tree.items()
        if prefix + name not in keys
    }


def _type_problems(error: ValidationError) -> dict[str, str]:
    """One message per key, which joins the messages of a union's branches."""
    messages: dict[str, list[str]] = {}
    for item in error.errors():
        where = [str(part) for part in item["loc"]]
        prefixes = (".".join(where[:n]) for n in range(len(where), 0, -1))
        key = next((prefix for prefix in prefixes if is_key(prefix)), ".".join(where))
        said = item["msg"][0].lower() + item["msg"][1:]
        if item["type"] == "string_pattern_mismatch":
            said = _PATTERNS[key]
        for kind, side, words in (("greater", "ge", "at least"), ("less", "le", "at most")):
            if item["type"] == f"{kind}_than_equal" and isinstance(bound := item["ctx"][side], float):
                said = f"input should be {words} {bound:g}"  # pydantic writes 0.0000000000000001
        is_value = len(where) <= key.count(".") + 1 and ", not " not in said
        messages.setdefault(key, []).append(said + (f", not {shown(item['input'])}" if is_value else ""))
    return {key: one_line(" or ".join(dict.fromkeys(said))) for key, said in messages.items()}


def _cross_problems(
    node: Node, sources: Mapping[str, str], wrong: Iterable[str], prefix: str = "", grid: Sequence[int] = ()
) -> list[str]:
    """The ``problems`` of every section, except sections that hold a key already reported as wrong."""
    found: list[str] = []
    if not any(key.startswith(prefix) for key in wrong):
        said = node.problems(*grid) if isinstance(node, Video | Log) else node.problems()
        rows = [(prefix + field, one_line(message, 240)) for field, message in said]
        found = [f"{sources.get(key, 'default')}: {key}: {message}" for key, message in rows]
    for name in type(node).model_fields:
        if isinstance(child := getattr(node, name), Node):
            found += _cross_problems(child, sources, wrong, f"{prefix}{name}.", grid)
    return found


def _did_you_mean(key: str) -> str:
    keys = known_keys()
    if key.startswith("rewards."):
        return " Those of a reward: " + ", ".join(f"rewards.<name>.{name}" for name in Reward.model_fields)
    if inside := [known for known in keys if known.startswith(f"{key}.")]:
        return f" It is a section: set one of its keys: {', '.join(inside)}"
    leaf, leaves = key.rpartition(".")[2], {known: known.rpartition(".")[2] for known in keys}
    near = [known for known in keys if leaves[known] == leaf]
    near = near or difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    near = near or [known for known in keys if leaves[known] in difflib.get_close_matches(leaf, leaves.values(), n=1)]
    return f" Did you mean {near[0]}?" if near else " See every key with: lowmem-drf train --dry-run"


def to_toml(config: Config) -> str:
    """The complete configuration as TOML; ``load_config`` reads back an equal tree."""
    import tomli_w

    return escaped(tomli_w.dumps(config.model_dump()))
