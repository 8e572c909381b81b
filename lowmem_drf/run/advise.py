"""What to change where a plan does not fit: the settings that cost least, tried by planning with them.

Every stage has its ladder: first what costs time alone, last what changes the clip. The stage that is largest climbs its own until it fits, then the
one that is largest now; afterwards every change that turns out not to be needed is taken back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace

from lowmem_drf.config import change
from lowmem_drf.errors import BadInputError
from lowmem_drf.run.cards import Card
from lowmem_drf.run.plan import Plan, make_plan
from lowmem_drf.schema import Config

Rung = Callable[[Config], str | None]
"""Configuration -> the override, or ``None`` where it is so already."""

SAVES = 0.01
"""A change that takes less than this share off its stage's peak is not kept."""


def _set(key: str, value: object, unless: Callable[[Config], bool]) -> Rung:
    return lambda config: None if unless(config) else f"{key}={json.dumps(value)}"


def _park(name: str) -> Rung:
    def rung(config: Config) -> str | None:
        return None if name in config.memory.park else f"memory.park={json.dumps([*config.memory.park, name])}"

    return rung


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
_smaller_clip: tuple[Rung, ...] = (_fewer_frames, _fewer_frames, _smaller, _fewer_frames, _smaller, _smaller)

LADDERS: dict[str, tuple[Rung, ...]] = {
    "text": (_set("memory.text_device", "host", lambda c: c.memory.text_device == "host"),),
    "rollout": (
        _one_clip,
        _park("critic"),
        _park("vae"),
        _set("memory.token_slices", 4, lambda c: c.memory.token_slices >= 4),
        *_smaller_clip,
    ),
    "decode": (
        _one_clip,
        _park("critic"),
        _set("memory.vae_caches", "host", lambda c: c.memory.vae_caches == "host"),
        _park("transformer"),
        *_smaller_clip,
    ),
    "critic": (
        _one_clip,
        _park("transformer"),
        _park("vae"),
        _set("memory.checkpoint", True, lambda c: bool(c.memory.checkpoint)),
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
        _set("memory.vae_grad_dtype", "bf16", lambda c: c.memory.vae_grad_dtype == "bf16"),
        _set("memory.vae_strips", 8, lambda c: c.memory.vae_strips >= 8),
        _park("transformer"),
        *_smaller_clip,
    ),
    "denoise_backward": (
        _one_clip,
        _set("memory.keep_blocks", 0, lambda c: c.memory.keep_blocks == 0),
        _set("memory.keep_attention", "host", lambda c: c.memory.keep_attention != "card"),
        _set("memory.checkpoint", True, lambda c: bool(c.memory.checkpoint)),
        _park("critic"),
        _set("memory.token_slices", 4, lambda c: c.memory.token_slices >= 4),
        _park("vae"),
        _set("memory.checkpoint", "host", lambda c: c.memory.checkpoint == "host"),
        *_smaller_clip,
    ),
    "update": (_park("critic"), _park("vae"), _park("transformer")),
}


def advise(config: Config, card: Card, plan: Plan, say: Callable[[str], None] = lambda text: None) -> Plan:
    """``plan`` of ``config``, with ``changes`` that make it fit; without any where it fits, or where nothing of the ladders helps.

    ``say`` is told what is tried. Following the changes (``train -s …`` each) gives a plan that fits: the last one made here.
    """
    if plan.fits:
        return plan
    first, now = config, plan
    rungs = {name: iter(ladder) for name, ladder in LADDERS.items()}
    applied: list[str] = []
    while not now.fits:
        name, peak = now.largest, now.peak_gib
        while True:
            override = _next(rungs[name], config)
            if override is None:
                return plan
            say(f"{name}: {override}")
            changed = _changed(config, override)
            after = _peak(changed, card, plan, name) if changed else peak
            if changed and after < peak * (1 - SAVES):
                config, peak = changed, after
                applied.append(override)
                if peak <= plan.usable_gib:
                    break
        now = make_plan(config, card, plan.vram_gib)
    needed = list(_pruned(first, applied, card, plan, say))
    return replace(plan, changes=tuple(needed)) if needed else plan


def _next(rungs: Iterator[Rung], config: Config) -> str | None:
    return next((override for rung in rungs if (override := rung(config))), None)


def _peak(config: Config, card: Card, plan: Plan, stage: str) -> float:
    return make_plan(config, card, plan.vram_gib, only=stage).stages[stage].peak_gib


def _changed(config: Config, *overrides: str) -> Config | None:
    """``None`` where the settings do not go together."""
    try:
        return change(config, [part for override in overrides for part in override.split()])
    except BadInputError:
        return None


def _pruned(config: Config, overrides: list[str], card: Card, plan: Plan, say: Callable[[str], None]) -> Iterator[str]:
    """Without those that are not needed, the costliest first; of one key the last."""
    last = {override.partition("=")[0]: override for override in overrides}
    if len(last) == 1:
        yield from next(iter(last.values())).split()
        return
    for key in reversed(list(last)):
        others = [override for other, override in last.items() if other != key]
        say(f"without {last[key]}")
        if _all_fit(config, others, card, plan):
            del last[key]
    for override in last.values():
        yield from override.split()


def _all_fit(config: Config, overrides: list[str], card: Card, plan: Plan) -> bool:
    changed = _changed(config, *overrides)
    return changed is not None and make_plan(changed, card, plan.vram_gib).fits
