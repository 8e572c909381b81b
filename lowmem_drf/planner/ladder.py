"""Advice if a plan does not fit: the cheapest changes of settings, found by planning with each.

Each stage has a ladder of changes: first those that cost time only, then fewer bits, then less for the critic to see,
last a smaller clip. The largest stage climbs its ladder until it fits, then the stage that is largest next. At the end
every change that is not needed is taken back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

from lowmem_drf.config import change
from lowmem_drf.errors import BadInputError
from lowmem_drf.planner.cards import USABLE, Card
from lowmem_drf.planner.fakes import Fakes
from lowmem_drf.planner.plan import Seen, make_plan, new_fakes
from lowmem_drf.planner.stages import Plan
from lowmem_drf.schema import Config

Rung = Callable[[Config], str | None]
"""Configuration -> the override, or ``None`` if it already has that setting."""

SAVES = 0.01
"""Changes that lower the peak of their stage by a smaller share are dropped."""

DEAR: tuple[tuple[str, ...], ...] = (
    ("video.",),
    ("critic.id", "critic.frames"),
    ("critic.quant", "model.quant", "optim.name", "memory.vae_grad_dtype"),
)
"""Keys by the cost in quality of changing them, highest first: the clip, the critic, bits. Others cost time only."""


def rank_of(override: str) -> int:
    """Lower ranks cost more quality."""
    return next((rank for rank, keys in enumerate(DEAR) if override.startswith(keys)), len(DEAR))


def _set(key: str, value: object, start: object = None) -> Rung:
    """Sets ``key`` unless it has that value already. With ``start``: only from that value."""

    def rung(config: Config) -> str | None:
        now = _get(config, key)
        return None if now == value or start not in (None, now) else f"{key}={_compact(value)}"

    return rung


def _raise(key: str, value: int) -> Rung:
    return lambda config: f"{key}={value}" if _get(config, key) < value else None


def _lower(key: str, value: int) -> Rung:
    return lambda config: f"{key}={value}" if _get(config, key) > value else None


def _get(config: Config, key: str) -> Any:
    return reduce(getattr, key.split("."), config)


def _park(name: str) -> Rung:
    def rung(config: Config) -> str | None:
        return None if name in config.memory.park else f"memory.park={_compact([*config.memory.park, name])}"

    return rung


def _stream(name: str) -> Rung:
    """Also turns on checkpointing, which streaming needs."""

    def rung(config: Config) -> str | None:
        if name in config.memory.stream:
            return None
        also = "" if config.memory.checkpoint else " memory.checkpoint=true"
        return f"memory.stream={_compact([*config.memory.stream, name])}{also}"

    return rung


def _compact(value: object) -> str:
    """JSON without spaces: a space separates two settings."""
    return json.dumps(value, separators=(",", ":"))


def _fewer_frames(config: Config) -> str | None:
    frames = (config.video.frames - 1) * 3 // 5 // 4 * 4 + 1
    seen = config.critic.frames
    return f"video.frames={frames}" if frames >= 9 and not (isinstance(seen, int) and seen > frames) else None


def _smaller(config: Config) -> str | None:
    """Three quarters of height and width, in multiples of 16 pixels."""
    width, height = (side * 3 // 4 // 16 * 16 for side in (config.video.width, config.video.height))
    return f"video.width={width} video.height={height}" if min(width, height) >= 64 else None


def _critic_sees_less(config: Config) -> str | None:
    frames = config.critic.frames
    return f"critic.frames={frames // 2}" if isinstance(frames, int) and frames >= 4 else None


def _smaller_critic(config: Config) -> str | None:
    return f"critic.id={_compact('Qwen/Qwen2.5-VL-3B-Instruct')}" if "7B" in config.critic.id else None


_one_clip = _set("micro_batch", 1)
_checkpoint = _set("memory.checkpoint", True, start=False)
_slices = _raise("memory.token_slices", 4)
_moments = _set("optim.name", "adamw8bit", start="adamw")
_packed = (_set("model.quant", "int8", start="none"), _set("model.quant", "nf4"))
_smaller_clip: tuple[Rung, ...] = (_fewer_frames, _fewer_frames, _smaller, _fewer_frames, _smaller, _smaller)
_park_transformer, _park_vae, _park_critic = (_park(name) for name in ("transformer", "vae", "critic"))

LADDERS: dict[str, tuple[Rung, ...]] = {
    "text": (_set("memory.text_device", "stream", start="card"), _set("memory.text_device", "host")),
    "rollout": (
        *(_one_clip, _park_critic, _park_vae, _slices, _stream("transformer")),
        *(_moments, *_packed, *_smaller_clip),
    ),
    "decode": (
        *(_one_clip, _park_critic, _set("memory.vae_caches", "host"), _park_transformer),
        *(_moments, *_smaller_clip),
    ),
    "critic": (
        *(_one_clip, _park_transformer, _park_vae, _checkpoint, _stream("critic")),
        *(_moments, _set("critic.quant", "nf4")),
        *(_critic_sees_less, _smaller_critic, _critic_sees_less, *_smaller_clip),
    ),
    "vae_backward": (
        *(_one_clip, _raise("memory.vae_strips", 4), _park_critic, _raise("memory.vae_strips", 8), _park_transformer),
        *(_set("memory.vae_grad_dtype", "bf16"), _moments, *_smaller_clip),
    ),
    "denoise_backward": (
        *(_one_clip, _set("memory.keep_attention", "host", start="card"), _checkpoint, _park_critic, _slices),
        *(_park_vae, _set("memory.checkpoint", "host"), _stream("transformer")),
        *(_moments, *_packed, *_smaller_clip),
    ),
    "update": (_park_critic, _park_vae, _park_transformer, _moments, _set("optim.name", "paged_adamw8bit")),
}

_samples: tuple[Rung, ...] = (
    *(_lower("log.eval_batch", 4), _lower("log.eval_batch", 1), _park_critic, _set("memory.vae_caches", "host")),
    *(_park_transformer, _park_vae, _slices, _stream("transformer"), *_packed),
)

OUTSIDE: dict[str, tuple[Rung, ...]] = {
    "loading": (_park_critic, _park_vae, _stream("transformer"), _stream("critic"), *_packed),
    "questions": (_park_transformer, _park_vae, _stream("critic"), _set("critic.quant", "nf4"), _smaller_critic),
    "previews": _samples,
    "evaluation": _samples,
}
"""Ladders for what a run does besides its updates. They are not planned."""

HOST: tuple[Rung, ...] = (
    *(_set("memory.record_rollout", False), _set("memory.keep_attention", "none", start="host")),
    *(_raise("memory.vae_cache_every", 2), _raise("memory.vae_cache_every", 4), _raise("memory.vae_cache_every", 8)),
)
"""A ladder for the host's memory."""


@dataclass(frozen=True)
class Lowered:
    """Settings that take less memory in one stage."""

    overrides: tuple[str, ...] = ()
    peak_gib: float | None = None
    """The stage's planned peak before, and with them. ``None``: it is not planned."""
    lowered_gib: float | None = None


def keeps_gradient(override: str) -> bool:
    """Whether a rung's setting costs time only: the gradient stays the same up to rounding."""
    return rank_of(override) == len(DEAR)


def lowered(
    config: Config,
    stage: str,
    on_card: bool,
    planner: StagePlanner | None = None,
    room_gib: float | None = None,
    fits: Callable[[str], bool] = keeps_gradient,
) -> Lowered:
    """The next rung of the stage's ladder that ``fits``; with a planner the next that lowers the stage's planned peak,
    and further ones until it is below ``room_gib``. No settings: the ladder is at its end.

    ``on_card``: the run uses a card. Else what would wait in host memory is there already.
    """
    ladder = HOST if stage == "host" else (LADDERS | OUTSIDE).get(stage, ())
    planner = planner if stage in LADDERS else None
    before = now = planner.peak(config, stage) if planner else None
    if before == math.inf:  # it cannot be planned here
        planner = before = now = None
    chosen: dict[str, str] = {}
    for rung in ladder:
        override = rung(config)
        if not override or not fits(override) or not (on_card or _needs_no_host(override)):
            continue
        if not (changed := _changed(config, override)):
            continue
        if planner and now is not None:
            after = planner.peak(changed, stage)
            if after >= now * (1 - SAVES):
                continue
            now = after
        config = changed
        chosen |= {part.partition("=")[0]: part for part in override.split()}
        if now is None or room_gib is None or now <= room_gib:
            break
    return Lowered(tuple(chosen.values()), before, now)


def _needs_no_host(override: str) -> bool:
    return not override.startswith(("memory.park", "memory.stream")) and not override.endswith(('"host"', '"stream"'))


def advise(
    config: Config, card: Card, plan: Plan, say: Callable[[str], None] = lambda text: None,
    fakes: Fakes | None = None, seen: Seen | None = None,
) -> Plan:  # fmt: skip
    """``plan`` of ``config`` with ``changes`` that make it fit; unchanged if it fits or no ladder helps.

    ``say`` gets each attempt. With all changes (``train -s …``) the configuration fits: it was planned here last.
    ``fakes``, ``seen``: see ``make_plan``.
    """
    if plan.fits:
        return plan
    planner = StagePlanner(card, plan.vram_gib, fakes or new_fakes(), {} if seen is None else seen)
    first, now = config, plan
    rungs = {name: iter(ladder) for name, ladder in LADDERS.items()}
    applied: dict[str, _Applied] = {}
    while not now.fits:
        name, peak = now.largest, now.peak_gib
        while True:
            override = _next(rungs[name], config)
            if override is None:
                return plan
            say(f"{name}: {override}")
            changed = _changed(config, override)
            after = planner.peak(changed, name) if changed else peak
            if changed and after < peak * (1 - SAVES):
                config, peak = changed, after
                applied[override.partition("=")[0]] = _Applied(override, name)  # the last one per key
                if peak <= plan.usable_gib:
                    break
        now = planner.whole(config)
    needed = _pruned(first, applied, planner, say)
    return replace(plan, changes=tuple(part for one in needed for part in one.override.split()))


@dataclass(frozen=True)
class _Applied:
    override: str
    stage: str
    """The stage that it was applied for."""


@dataclass(frozen=True)
class StagePlanner:
    """Plans changed configurations for one card."""

    card: Card
    vram_gib: float
    fakes: Fakes
    seen: Seen = field(default_factory=dict)

    def whole(self, config: Config) -> Plan:
        return make_plan(config, self.card, self.vram_gib, fakes=self.fakes, seen=self.seen)

    def peak(self, config: Config, stage: str) -> float:
        """Infinite if the settings cannot be planned here: bitsandbytes is missing."""
        try:
            plan = make_plan(config, self.card, self.vram_gib, only=stage, fakes=self.fakes, seen=self.seen)
        except BadInputError:
            return math.inf
        return plan.stages[stage].peak_gib


def _next(rungs: Iterator[Rung], config: Config) -> str | None:
    return next((override for rung in rungs if (override := rung(config))), None)


def _changed(config: Config, *overrides: str) -> Config | None:
    """``None`` if the settings contradict each other."""
    try:
        return change(config, [part for override in overrides for part in override.split()])
    except BadInputError:
        return None


def _pruned(
    config: Config, applied: Mapping[str, _Applied], planner: StagePlanner, say: Callable[[str], None]
) -> list[_Applied]:
    """Drops changes that are not needed; tries the most expensive first, and among equals the latest."""
    kept = dict(applied)
    for key in sorted(reversed(list(applied)), key=rank_of) if len(applied) > 1 else ():
        others = [one.override for other, one in kept.items() if other != key]
        say(f"without {kept[key].override}")
        without = _changed(config, *others)
        # first its stage alone: half the time, and it usually decides
        fits = without and planner.peak(without, kept[key].stage) <= planner.vram_gib * USABLE
        if without and fits and planner.whole(without).fits:
            del kept[key]
    return list(kept.values())
