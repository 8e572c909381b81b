"""Climbs the ladders of ``rungs``: what makes a plan fit, found by planning with each change.

The stage that needs most climbs its ladder until it fits, then the stage that needs most next. At the end every change
that is not needed is taken back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from lowmem_drf.assembly.rungs import (
    HOST,
    HOST_FOR_CARD,
    LADDERS,
    OUTSIDE,
    ROUNDED,
    Rung,
    compact,
    keeps_gradient,
    rank_of,
    value_of,
)
from lowmem_drf.config import change, known_keys
from lowmem_drf.errors import BadInputError
from lowmem_drf.planner.cards import Card
from lowmem_drf.planner.fakes import Fakes
from lowmem_drf.planner.plan import Seen, make_plan, new_fakes
from lowmem_drf.planner.stages import Outcome, Plan
from lowmem_drf.schema import Config

Say = Callable[[str], None]

SAVES = 0.01
"""Changes that lower the peak of their stage by a smaller share are dropped."""


@dataclass(frozen=True)
class Lowered:
    """Settings that take less memory in one stage."""

    overrides: tuple[str, ...] = ()
    peak_gib: float | None = None
    """The stage's planned peak before, and with them. ``None``: it is not planned."""
    lowered_gib: float | None = None


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


@dataclass(frozen=True)
class StagePlanner:
    """Plans changed configurations for one card. ``free_gib``, ``measured``: as in ``Plan``."""

    card: Card
    vram_gib: float
    fakes: Fakes
    seen: Seen = field(default_factory=dict)
    free_gib: float | None = None
    measured: bool = False
    known: dict[tuple[str, str], float] = field(default_factory=dict)
    """What stages need, by configuration."""
    plans: dict[str, Plan] = field(default_factory=dict)
    """Whole plans, by configuration."""

    def whole(self, config: Config) -> Plan:
        key = config.model_dump_json()
        if key not in self.plans:
            plan = make_plan(config, self.card, self.vram_gib, fakes=self.fakes, seen=self.seen)
            self.plans[key] = replace(plan, free_gib=self.free_gib, measured=self.measured)
        return self.plans[key]

    def fitting(self, config: Config) -> Plan | None:
        """The plan if it fits. ``None``: it does not, or cannot be planned here."""
        try:
            plan = self.whole(config)
        except BadInputError:
            return None
        return plan if plan.fits else None

    def peak(self, config: Config, stage: str) -> float:
        """Infinite if the settings cannot be planned here: bitsandbytes is missing."""
        try:
            return self._stage(config, stage).stages[stage].peak_gib
        except BadInputError:
            return math.inf

    def needs(self, config: Config, stage: str) -> float:
        """What the stage needs free on the card; as ``peak``."""
        key = stage, config.model_dump_json()
        if key not in self.known:
            try:
                self.known[key] = self._stage(config, stage).stages[stage].needs_gib
            except BadInputError:
                self.known[key] = math.inf
        return self.known[key]

    def _stage(self, config: Config, stage: str) -> Plan:
        return make_plan(config, self.card, self.vram_gib, only=stage, fakes=self.fakes, seen=self.seen)


def advise(
    config: Config, card: Card, plan: Plan, say: Say = lambda text: None,
    fakes: Fakes | None = None, seen: Seen | None = None, dear: bool = True,
) -> Plan:  # fmt: skip
    """Makes ``plan`` of ``config`` fit the card.

    With ``memory.fit = "auto"`` by settings that keep the gradient (``applied``), if that is possible: then the plan
    returned is with them. Else it is ``plan`` with advice (``changes``), which is tried: with the changes the same call
    returns a plan that fits, with the figures of ``changed``. It is ``plan`` itself if it fits, or if no ladder helps.

    Args:
        say: gets each attempt.
        dear: also look for advice that costs quality.
        fakes, seen: see ``make_plan``.
    """
    if plan.fits:
        return plan
    planner = _planner(card, plan, fakes, seen)
    auto = config.memory.fit == "auto"
    if found := _climbed(config, plan, planner, say, keeps_gradient):
        return replace(found[1], applied=differences(config, found[0])) if auto else _advised(plan, config, *found)
    found = _climbed(config, plan, planner, say, prune=_is_dear if auto else _anything) if dear else None
    if found and auto:  # what keeps the gradient is set by itself, once the rest is
        less = _changed(config, *filter(_is_dear, differences(config, found[0])))
        if less and (again := _climbed(less, planner.whole(less), planner, say, keeps_gradient)):
            return _advised(plan, config, less, again[1])
    return _advised(plan, config, *found) if found else plan


def advise_host(
    config: Config, card: Card, plan: Plan, host_gib: float, say: Say = lambda text: None,
    fakes: Fakes | None = None, seen: Seen | None = None,
) -> Plan:  # fmt: skip
    """As ``advise``, for a ``plan`` that fits the card and takes more than ``host_gib`` of the host's memory."""
    if not plan.fits or plan.host_gib <= host_gib:
        return plan
    planner = _planner(card, plan, fakes, seen)
    start = _changed(config, *plan.applied) or config
    for allowed in (keeps_gradient, _anything):
        at, now = start, plan
        for rung in HOST_FOR_CARD:
            override = rung(at)
            if not override or not allowed(override) or not (changed := _changed(at, override)):
                continue
            say(f"host memory: {override}")
            after = planner.fitting(changed)
            if after and after.host_gib < now.host_gib * (1 - SAVES):
                at, now = changed, after
            if now.host_gib <= host_gib:
                return _with_less_host(config, start, plan, at, now, host_gib, planner)
    return plan


def _with_less_host(
    config: Config, start: Config, plan: Plan, at: Config, now: Plan, host_gib: float, planner: StagePlanner
) -> Plan:
    """Takes back what is not needed of the changes from ``start`` to ``at``. What takes more of the host is there for
    time, and stays."""
    for rung in _takings(start, at):
        if without := _changed(at, rung(at) or ""):
            after = planner.fitting(without)
            if after and now.host_gib * (1 - SAVES) <= after.host_gib <= host_gib:
                at, now = without, after
    settings = differences(config, at)
    if config.memory.fit == "auto" and all(map(keeps_gradient, settings)):
        return replace(now, applied=settings)
    return _advised(plan, config, at, now)


def _planner(card: Card, plan: Plan, fakes: Fakes | None, seen: Seen | None) -> StagePlanner:
    seen = {} if seen is None else seen
    return StagePlanner(card, plan.vram_gib, fakes or new_fakes(), seen, plan.free_gib, plan.measured)


def _advised(plan: Plan, config: Config, changed: Config, with_changes: Plan) -> Plan:
    outcome = Outcome(with_changes.peak_gib, with_changes.host_gib, with_changes.update_s)
    return replace(plan, changes=differences(config, changed), changed=outcome)


def _is_dear(override: str) -> bool:
    return not keeps_gradient(override)


def _anything(override: str) -> bool:
    return True


def _climbed(
    first: Config, plan: Plan, planner: StagePlanner, say: Say, allowed: Callable[[str], bool] = _anything,
    prune: Callable[[str], bool] = _anything,
) -> tuple[Config, Plan] | None:  # fmt: skip
    """``first`` with the rungs that make it fit, and its plan. ``None``: these ladders do not help.

    Args:
        allowed: settings that may be made.
        prune: settings that are taken back where they are not needed.
    """
    config, now = first, plan
    rungs = {name: iter(ladder) for name, ladder in LADDERS.items()}
    set_for: dict[str, str] = {}
    while not now.fits:
        name, needs, in_vain = now.tightest, now.stages[now.tightest].needs_gib, set[str]()
        while needs > now.room_gib:
            offered = (text for rung in rungs[name] if (text := rung(config)) and allowed(text))
            override = next((text for text in offered if text not in in_vain), None)
            if override is None:
                return None
            say(f"{name}: {override}")
            changed = _changed(config, override)
            after = planner.needs(changed, name) if changed else needs
            if changed and after < needs * (1 - SAVES):
                config, needs = changed, after
                set_for |= {part.partition("=")[0]: name for part in override.split()}
                in_vain.clear()
            else:
                in_vain.add(override)
        now = planner.whole(config)
    takings = _takings(first, config)
    for rung in takings if len(takings) > 1 else ():
        override = rung(config) or ""
        if not prune(override):
            continue
        say(f"{override} again")
        without = _changed(config, override)
        # its stage alone first: half the time, and it usually decides
        if without and planner.needs(without, set_for[override.partition("=")[0]]) <= now.room_gib:
            config, now = (without, whole) if (whole := planner.fitting(without)) else (config, now)
    return config, now


def differences(first: Config, config: Config) -> tuple[str, ...]:
    """The settings that make ``config`` of ``first``."""
    return tuple(
        f"{key}={compact(value)}" for key in known_keys() if (value := value_of(config, key)) != value_of(first, key)
    )


def _takings(first: Config, config: Config) -> list[Rung]:
    """Rungs that each take back one change between the two: first those that cost most in quality, then what rounds,
    then the rest."""
    rows: list[tuple[str, Rung]] = []
    for key in (setting.partition("=")[0] for setting in differences(first, config)):
        before, now = value_of(first, key), value_of(config, key)
        names = set(before) ^ set(now) if isinstance(now, list) else {None}
        rows += [(key, _restored(key, before, name)) for name in sorted(names, key=str)]
    rows.sort(key=lambda row: (rank_of(row[0]), not row[0].startswith(ROUNDED)))
    return [rung for _, rung in rows]


def _restored(key: str, before: object, name: str | None) -> Rung:
    """``key`` as it was before; with ``name``: this entry of its list."""

    def rung(config: Config) -> str:
        if name is None:
            return f"{key}={compact(before)}"
        now = value_of(config, key)
        return f"{key}={compact([one for one in now if one != name] if name in now else [*now, name])}"

    return rung


def _changed(config: Config, *overrides: str) -> Config | None:
    """``None`` if the settings contradict each other."""
    try:
        return change(config, [part for override in overrides for part in override.split()])
    except BadInputError:
        return None
