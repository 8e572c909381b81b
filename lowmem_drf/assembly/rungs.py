"""Settings that take less memory: a ladder of changes for each stage of an update, first those that cost time only,
then fewer bits, then less for the critic to see, last a smaller clip. ``planner/ladder.py`` climbs them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import reduce
from typing import Any

from lowmem_drf.assembly.sizes import sizes_of
from lowmem_drf.method.vae_stream import TRACES
from lowmem_drf.models.generators import generator_config
from lowmem_drf.schema import Config

Rung = Callable[[Config], str | None]
"""Configuration -> the override, or ``None`` if it already has that setting."""

DEAR: tuple[tuple[str, ...], ...] = (
    ("video.",),
    ("critic.id", "critic.frames"),
    ("critic.quant", "model.quant", "optim.name", "memory.vae_grad_dtype"),
)
"""Keys by the cost in quality of changing them, highest first: the clip, the critic, bits. Others cost time only."""


def rank_of(override: str) -> int:
    """Lower ranks cost more quality."""
    return next((rank for rank, keys in enumerate(DEAR) if override.startswith(keys)), len(DEAR))


def keeps_gradient(override: str) -> bool:
    """Whether a rung's setting costs time only: the gradient stays the same up to rounding."""
    return rank_of(override) == len(DEAR)


ROUNDED = (
    *("micro_batch", "memory.token_slices", "memory.vae_strips", "memory.record_decode", "memory.vae_cache_every"),
    'memory.text_device="host"',
)
"""Settings that cut or move the arithmetic, or change its dtype: the gradient is the same up to rounding. Of others it
is to the bit."""


def _set(key: str, value: object, start: object = None) -> Rung:
    """Sets ``key`` unless it has that value already. With ``start``: only from that value."""

    def rung(config: Config) -> str | None:
        now = value_of(config, key)
        return None if now == value or start not in (None, now) else f"{key}={compact(value)}"

    return rung


def _pack(quant: str) -> Rung:
    """In fewer bits than now. Products of integers have their own format; ``auto`` can do without them."""
    step = _set("model.quant", quant, start="none" if quant == "int8" else None)
    return lambda config: None if config.model.products == "int8" or config.model.storage == quant else step(config)


def _raise(key: str, value: int) -> Rung:
    return lambda config: f"{key}={value}" if value_of(config, key) < value else None


def _lower(key: str, value: int) -> Rung:
    return lambda config: f"{key}={value}" if value_of(config, key) > value else None


def value_of(config: Config, key: str) -> Any:
    """Of a dotted key."""
    return reduce(getattr, key.split("."), config)


def _park(name: str) -> Rung:
    def rung(config: Config) -> str | None:
        memory = config.memory
        return None if name in (*memory.park, *memory.stream) else f"memory.park={compact([*memory.park, name])}"

    return rung


def _away(name: str) -> Rung:
    """For stages that do not use the model. Streaming takes no more host memory than parking, hides its copies, and
    serves the model's own stages and its loading too; but it needs checkpointing."""
    return lambda config: (_park(name) if config.memory.checkpoint is False else _stream(name))(config)


def _stream(name: str) -> Rung:
    """Also turns on checkpointing, which streaming needs."""

    def rung(config: Config) -> str | None:
        if name in config.memory.stream:
            return None
        also = "" if config.memory.checkpoint else " memory.checkpoint=true"
        return f"memory.stream={compact([*config.memory.stream, name])}{also}"

    return rung


def _back(name: str) -> Rung:
    """To the card, for good."""

    def rung(config: Config) -> str | None:
        lists = {key: getattr(config.memory, key) for key in ("park", "stream")}
        kept = {key: [one for one in names if one != name] for key, names in lists.items()}
        return " ".join(f"memory.{key}={compact(kept[key])}" for key in lists if kept[key] != lists[key]) or None

    return rung


def compact(value: object) -> str:
    """JSON without spaces: a space separates two settings."""
    return json.dumps(value, separators=(",", ":"))


def _fewer_frames(config: Config) -> str | None:
    unit = sizes_of(generator_config(config.model.id)).temporal or 1
    frames = (config.video.frames - 1) * 3 // 5 // unit * unit + 1
    seen = config.critic.frames
    return f"video.frames={frames}" if frames >= 9 and not (isinstance(seen, int) and seen > frames) else None


def _smaller(config: Config) -> str | None:
    """Three quarters of height and width, on the grid of 32 pixels that some generators need, if they are on it."""
    sides = config.video.width, config.video.height
    grid = 16 if any(side % 32 for side in sides) else 32
    width, height = (side * 3 // 4 // grid * grid for side in sides)
    return f"video.width={width} video.height={height}" if min(width, height) >= 64 else None


def _critic_sees_less(config: Config) -> str | None:
    frames = config.critic.frames
    return f"critic.frames={frames // 2}" if isinstance(frames, int) and frames >= 4 else None


def _smaller_critic(config: Config) -> str | None:
    return f"critic.id={compact('Qwen/Qwen2.5-VL-3B-Instruct')}" if "7B" in config.critic.id else None


def _unrecorded(config: Config) -> str | None:
    """No record of the decode; and caches that are stored for chunks whose traces are then made in one go."""
    if not config.memory.record_decode:
        return None
    every = f" memory.vae_cache_every={TRACES}" if config.memory.vae_cache_every > TRACES else ""
    return f"memory.record_decode=0{every}"


def _paged(config: Config) -> str | None:
    """Of AdamW alone: another optimizer is another course of the run, not fewer bits."""
    return _set("optim.name", "paged_adamw8bit")(config) if "adamw" in config.optim.name else None


_one_clip = _set("micro_batch", 1)
_checkpoint = _set("memory.checkpoint", True, start=False)
_slices = _raise("memory.token_slices", 4)
_vae_caches = _set("memory.vae_caches", "host")
_four_strips, _eight_strips = _raise("memory.vae_strips", 4), _raise("memory.vae_strips", 8)
_moments = _set("optim.name", "adamw8bit", start="adamw")
_packed = (_pack("int8"), _pack("nf4"))
_smaller_clip: tuple[Rung, ...] = (_fewer_frames, _fewer_frames, _smaller, _fewer_frames, _smaller, _smaller)
_park_transformer, _park_vae, _park_critic = (_park(name) for name in ("transformer", "vae", "critic"))
_away_transformer, _away_critic = (_away(name) for name in ("transformer", "critic"))

LADDERS: dict[str, tuple[Rung, ...]] = {
    "text": (_set("memory.text_device", "stream", start="card"), _set("memory.text_device", "host")),
    "rollout": (
        *(_one_clip, _away_critic, _park_vae, _stream("transformer"), _slices),
        *(_moments, *_packed, *_smaller_clip),
    ),
    "decode": (
        *(_one_clip, _away_critic, _away_transformer, _vae_caches, _four_strips, _eight_strips),
        *(_moments, *_smaller_clip),
    ),
    "critic": (
        *(_one_clip, _away_transformer, _park_vae, _checkpoint, _stream("critic")),
        *(_moments, _set("critic.quant", "nf4")),
        *(_critic_sees_less, _smaller_critic, _critic_sees_less, *_smaller_clip),
    ),
    "vae_backward": (
        *(_one_clip, _away_critic, _away_transformer, _four_strips, _vae_caches, _eight_strips),
        *(_set("memory.vae_grad_dtype", "bf16"), _moments, *_smaller_clip),
    ),
    "denoise_backward": (
        *(_one_clip, _set("memory.keep_attention", "host", start="card"), _checkpoint, _away_critic, _park_vae),
        *(_stream("transformer"), _set("memory.checkpoint", "host"), _slices),
        *(_moments, *_packed, *_smaller_clip),
    ),
    "update": (_away_critic, _park_vae, _away_transformer, _moments, _paged),
}

_samples: tuple[Rung, ...] = (
    *(_lower("log.eval_batch", 4), _lower("log.eval_batch", 1), _park_critic, _vae_caches),
    *(_park_transformer, _park_vae, _slices, _stream("transformer"), *_packed),
)

OUTSIDE: dict[str, tuple[Rung, ...]] = {
    "loading": (_park_critic, _park_vae, _stream("transformer"), _stream("critic"), *_packed),
    "questions": (_park_transformer, _park_vae, _stream("critic"), _set("critic.quant", "nf4"), _smaller_critic),
    "previews": _samples,
    "watch": _samples,
    "evaluation": _samples,
}
"""Ladders for what a run does besides its updates. They are not planned."""

HOST: tuple[Rung, ...] = (
    *(_lower("memory.record_decode", 10), _unrecorded, _set("memory.record_rollout", False)),
    *(_raise("memory.vae_cache_every", 2), _raise("memory.vae_cache_every", 4), _raise("memory.vae_cache_every", 8)),
    _set("memory.keep_attention", "none", start="host"),
)
"""A ladder for the host's memory. Like those above it is climbed one way: no rung takes back another's."""

HOST_FOR_CARD: tuple[Rung, ...] = (
    *(*HOST, _set("memory.checkpoint", True, start="host"), _set("memory.vae_caches", "card")),
    *(_back(name) for name in ("vae", "transformer", "critic")),
    *(_set("critic.quant", "nf4"), *_packed, _smaller_critic, *_smaller_clip),
)
"""Further rungs for the host's memory, where a plan says whether the card has room for what comes back to it."""
