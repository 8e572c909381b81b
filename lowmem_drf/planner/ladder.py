"""What to change where a plan does not fit: the settings that cost least, tried by planning with them.

Every stage has its ladder: first what costs time alone, then what is computed or kept in fewer bits, then what the
critic sees, last what changes the clip. The stage that is largest climbs its own until it fits, then the one that is
largest now; afterwards every change that turns out not to be needed is taken back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from lowmem_drf.config import change
from lowmem_drf.errors import BadInputError
from lowmem_drf.planner.cards import USABLE, Card
from lowmem_drf.planner.fakes import Fakes
from lowmem_drf.planner.plan import make_plan, new_fakes
from lowmem_drf.planner.stages import Plan
from lowmem_drf.schema import Config

Rung = Callable[[Config], str | None]
"""Configuration -> the override, or ``None`` where it is so already."""

SAVES = 0.01
"""A change that takes less than this share off its stage's peak is not kept."""

DEAR: tuple[tuple[str, ...], ...] = (
    ("video.",),
    ("critic.id", "critic.frames"),
    ("critic.quant", "model.quant", "optim.name", "memory.vae_grad_dtype"),
)
"""Keys by what changing them costs, the dearest first: the clip; who sees it and how much of it; bits. All others cost
time alone."""


def price(override: str) -> int:
    """The lower, the dearer."""
    return next((place for place, keys in enumerate(DEAR) if override.startswith(keys)), len(DEAR))


def _set(key: str, value: object, unless: Callable[[Config], bool]) -> Rung:
    return lambda config: None if unless(config) else f"{key}={_compact(value)}"


def _park(name: str) -> Rung:
    def rung(config: Config) -> str | None:
        return None if name in config.memory.park else f"memory.park={_compact([*config.memory.park, name])}"

    return rung


def _stream(name: str) -> Rung:
    """Together with the recompute that it needs."""

    def rung(config: Config) -> str | None:
        if name in config.memory.stream:
            return None
        also = "" if config.memory.checkpoint else " memory.checkpoint=true"
        return f"memory.stream={_compact([*config.memory.stream, name])}{also}"

    return rung


def _compact(value: object) -> str:
    """Without spaces: they part one setting from the next."""
    return json.dumps(value, separators=(",", ":"))


def _fewer_frames(config: Config) -> str | None:
    frames = (config.video.frames - 1) * 3 // 5 // 4 * 4 + 1
    return f"video.frames={frames}" if frames >= 9 and not _sees_more(config, frames) else None


def _sees_more(config: Config, frames: int) -> bool:
    return isinstance(config.critic.frames, int) and config.critic.frames > frames


def _smaller(config: Config) -> str | None:
    """Three quarters of the height and width, on the grid of 16 pixels."""
    width, height = (side * 3 // 4 // 16 * 16 for side in (config.video.width, config.video.height))
    return f"video.width={width} video.height={height}" if min(width, height) >= 64 else None


def _critic_sees_less(config: Config) -> str | None:
    frames = config.critic.frames
    return f"critic.frames={frames // 2}" if isinstance(frames, int) and frames >= 4 else None


_one_clip = _set("micro_batch", 1, lambda c: c.micro_batch == 1)
_slices = _set("memory.token_slices", 4, lambda c: c.memory.token_slices >= 4)
_moments = _set("optim.name", "adamw8bit", lambda c: c.optim.name != "adamw")
_packed: tuple[Rung, ...] = (
    _set("model.quant", "int8", lambda c: c.model.quant != "none"),
    _set("model.quant", "nf4", lambda c: c.model.quant == "nf4"),
)
_smaller_clip: tuple[Rung, ...] = (_fewer_frames, _fewer_frames, _smaller, _fewer_frames, _smaller, _smaller)

LADDERS: dict[str, tuple[Rung, ...]] = {
    "text": (
        _set("memory.text_device", "stream", lambda c: c.memory.text_device != "card"),
        _set("memory.text_device", "host", lambda c: c.memory.text_device == "host"),
    ),
    "rollout": (
        _one_clip,
        _park("critic"),
        _park("vae"),
        _slices,
        _stream("transformer"),
        _moments,
        *_packed,
        *_smaller_clip,
    ),
    "decode": (
        _one_clip,
        _park("critic"),
        _set("memory.vae_caches", "host", lambda c: c.memory.vae_caches == "host"),
        _park("transformer"),
        _moments,
        *_smaller_clip,
    ),
    "critic": (
        _one_clip,
        _park("transformer"),
        _park("vae"),
        _set("memory.checkpoint", True, lambda c: bool(c.memory.checkpoint)),
        _stream("critic"),
        _moments,
        _set("critic.quant", "nf4", lambda c: c.critic.quant == "nf4"),
        _critic_sees_less,
        _set("critic.id", "Qwen/Qwen2.5-VL-3B-Instruct", lambda c: "7B" not in c.critic.id),
        _critic_sees_less,
        *_smaller_clip,
    ),
    "vae_backward": (
        _one_clip,
        _set("memory.vae_strips", 4, lambda c: c.memory.vae_strips >= 4),
        _park("critic"),
        _set("memory.vae_strips", 8, lambda c: c.memory.vae_strips >= 8),
        _park("transformer"),
        _set("memory.vae_grad_dtype", "bf16", lambda c: c.memory.vae_grad_dtype == "bf16"),
        _moments,
        *_smaller_clip,
    ),
    "denoise_backward": (
        _one_clip,
        _set("memory.keep_attention", "host", lambda c: c.memory.keep_attention != "card"),
        _set("memory.checkpoint", True, lambda c: bool(c.memory.checkpoint)),
        _park("critic"),
        _slices,
        _park("vae"),
        _set("memory.checkpoint", "host", lambda c: c.memory.checkpoint == "host"),
        _stream("transformer"),
        _moments,
        *_packed,
        *_smaller_clip,
    ),
    "update": (
        _park("critic"),
        _park("vae"),
        _park("transformer"),
        _moments,
        _set("optim.name", "paged_adamw8bit", lambda c: c.optim.name == "paged_adamw8bit"),
    ),
}


def advise(
    config: Config, card: Card, plan: Plan, say: Callable[[str], None] = lambda text: None, fakes: Fakes | None = None
) -> Plan:
    """``plan`` of ``config``, with ``changes`` that make it fit; without any where it fits, or where nothing of the
    ladders helps.

    ``say`` is told what is tried. Following the changes (``train -s …`` each) gives a plan that fits: the last one made
    here. ``fakes``: see ``make_plan``.
    """
    if plan.fits:
        return plan
    planner = _Planner(card, plan.vram_gib, fakes or new_fakes())
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
                applied[override.partition("=")[0]] = _Applied(override, name)  # of one key the last
                if peak <= plan.usable_gib:
                    break
        now = planner.whole(config)
    needed = _pruned(first, applied, planner, say)
    return replace(plan, changes=tuple(part for one in needed for part in one.override.split()))


@dataclass(frozen=True)
class _Applied:
    override: str
    stage: str
    """Whose peak it lowered."""


@dataclass(frozen=True)
class _Planner:
    card: Card
    vram_gib: float
    fakes: Fakes

    def whole(self, config: Config) -> Plan:
        return make_plan(config, self.card, self.vram_gib, fakes=self.fakes)

    def peak(self, config: Config, stage: str) -> float:
        """Infinite where the settings cannot be had here: bitsandbytes is missing."""
        try:
            return make_plan(config, self.card, self.vram_gib, only=stage, fakes=self.fakes).stages[stage].peak_gib
        except BadInputError:
            return math.inf


def _next(rungs: Iterator[Rung], config: Config) -> str | None:
    return next((override for rung in rungs if (override := rung(config))), None)


def _changed(config: Config, *overrides: str) -> Config | None:
    """``None`` where the settings do not go together."""
    try:
        return change(config, [part for override in overrides for part in override.split()])
    except BadInputError:
        return None


def _pruned(
    config: Config, applied: Mapping[str, _Applied], planner: _Planner, say: Callable[[str], None]
) -> list[_Applied]:
    """Without those that are not needed, the dearest first, of equally dear ones the last."""
    kept = dict(applied)
    for key in sorted(reversed(list(applied)), key=price) if len(applied) > 1 else ():
        others = [one.override for other, one in kept.items() if other != key]
        say(f"without {kept[key].override}")
        without = _changed(config, *others)
        # its own stage alone first: that is planned in half the time, and is mostly the answer
        if (
            without
            and planner.peak(without, kept[key].stage) <= planner.vram_gib * USABLE
            and planner.whole(without).fits
        ):
            del kept[key]
    return list(kept.values())
