"""What a run was worth, in words and a few figures: the head of its report."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lowmem_drf.reporting.read import Record, Row, as_row, curve, names, number, outside
from lowmem_drf.terminal import clock

Tone = Literal["good", "bad", "warn", "plain"]

ASPECTS = {"TA": "the prompt", "Phy": "physics", "VQ": "quality"}
MEASURES = {
    "heldout_reward": "held-out questions",
    "diversity": "diversity",
    "motion": "motion",
    "velocity_norm": "velocity norm",
    "lora_norm": "size of the LoRA",
    "blur": "blur",
    "reward": "reward",
}
KEPT = ("diversity", "motion")
"""Measures that training should leave as they are."""
FIRST = ("oracle: all", "oracle: physics", MEASURES["diversity"])
CLEAR, CLEAR_RATE = 0.01, 0.02
"""A smaller change of a reward, or of a rate, is none."""
SLOW, LARGE, MARGIN_GIB = 1.5, 1.05, 0.5
"""An update or a peak earns a warning from this multiple of its plan, and a peak from this much beyond it."""


@dataclass(frozen=True)
class Figure:
    """One value before and after."""

    name: str
    before: str
    after: str
    change: str
    tone: Tone = "plain"


@dataclass(frozen=True)
class Verdict:
    tone: Tone
    headline: str
    lines: Sequence[str]
    figures: Sequence[Figure]
    source: str
    """Where the figures come from."""


def verdict(record: Record) -> Verdict:
    rows, source = _figures(record)
    if not rows:
        return Verdict("plain", "There is nothing to judge yet", [_watched(record)], [], "")
    lead = rows[0]
    word = {"good": "rose", "bad": "fell"}.get(lead.tone, "did not clearly change")
    about = lead.name if "reward" in lead.name else f"the reward on {lead.name}"
    but = f", but the alarm spoke at update {record.alarm}" if record.alarm is not None else ""
    headline = f"{about[0].upper()}{about[1:]} {word}: {lead.before} to {lead.after}{but}"
    return Verdict("warn" if but else lead.tone, headline, [_watched(record)], rows, source)


def warnings(record: Record) -> list[str]:
    """What the run earned besides the alarm, the gravest first."""
    config, found = record.config, list[str]()
    if record.skipped:
        first = record.skipped[0]
        cause = as_row(first["skipped"])
        why = f": {cause['what']} in {cause.get('stage', 'a stage')}" if "what" in cause else ""
        count = len(record.skipped)
        found.append(f"{count} update{'s were' if count > 1 else ' was'} skipped, the first is {first['step']}{why}.")
    if record.done < config.steps:
        found.append(f"The run is not complete: {record.done} of {config.steps} updates.")
    found += _against_plan(record)
    _, cosines = curve(record.updates, "decoder_cosine")
    if cosines and min(cosines) < config.model.decoder_least_cosine:
        found.append(f"The tiny decoder's gradient pointed elsewhere: its cosine fell to {min(cosines):.2f}.")
    return [*found, *record.problems]


def tiles(found: Verdict, most: int = 4) -> list[Figure]:
    """The figures to see first: what the verdict is about, then the truth where it is known, then what was to stay."""
    known = {figure.name: figure for figure in found.figures[2:]}
    first = [*found.figures[:2], *(known[name] for name in FIRST if name in known)]
    rest = [figure for figure in found.figures if figure not in first]
    return [*first, *rest][:most]


def costs(record: Record) -> list[Figure]:
    """Seconds of an update and its highest peak, beside their plan."""
    rows, found = stages(record), list[Figure]()
    _, seconds = curve(record.updates[1:] or record.updates, "update_s")
    planned, peaks = number(record.plan.get("update_s")), [float(row["gib"]) for row in rows if row["gib"]]
    if seconds:
        plan = f"{planned:.1f} s planned" if planned else f"{clock(sum(seconds))} in all"
        found.append(Figure("an update", plan, f"{statistics.median(seconds):.1f} s", ""))
    if peaks:
        plans = [float(row["planned_gib"]) for row in rows if row["planned_gib"]]
        found.append(
            Figure("highest peak", f"{max(plans):.1f} GiB planned" if plans else "", f"{max(peaks):.1f} GiB", "")
        )
    return found


def stages(record: Record) -> list[dict[str, float | str | None]]:
    """Each stage of an update: the median of its seconds and its highest peak, beside its plan."""
    planned = as_row(record.plan.get("stages"))
    rows: list[dict[str, float | str | None]] = []
    for name in names(record.updates, "stage_s"):
        _, seconds = curve(record.updates[1:] or record.updates, "stage_s", name)  # the first update warms up
        _, peaks = curve(record.updates, "stage_peak_gib", name)
        plan = as_row(planned.get(name))
        rows.append(
            {
                "name": name.replace("_", " "),
                "s": statistics.median(seconds) if seconds else None,
                "planned_s": number(plan.get("s")),
                "gib": max(peaks, default=None),
                "planned_gib": number(plan.get("peak_gib")),
            }
        )
    return rows


def signed(value: float | None, digits: int = 3) -> str:
    """A number with a real minus sign, and none before a zero."""
    return "–" if value is None else f"{value:z.{digits}f}".replace("-", "−")


def _figures(record: Record) -> tuple[list[Figure], str]:
    """The best evidence that there is: base against tuned, else the watch, else the rewards of training."""
    result = record.result
    base, tuned = as_row(result.get("base")), as_row(result.get("tuned"))
    if number(base.get("reward")) is not None and number(tuned.get("reward")) is not None:
        return _compared(base, tuned), f"Base against tuned: {result.get('source')}."
    measures = [as_row(row.get("measures")) for row in record.watch]
    if len(measures) > 1 and number(measures[0].get("heldout_reward")) is not None:
        first, last, step = measures[0], measures[-1], record.watch[-1]["step"]
        rows = [_figure(_words(name), first.get(name), last.get(name), name) for name in _ordered(measures)]
        return [row for row in rows if row], f"The watch's fixed prompts and seeds, the base against update {step}."
    rows = [_trained(record, "training reward", "reward")]
    for aspect in names(record.updates, "reward_by_aspect"):
        rows.append(_trained(record, f"training reward: {ASPECTS.get(aspect, aspect)}", "reward_by_aspect", aspect))
    return [row for row in rows if row], "Means of the first and the last tenth of the updates, on their own prompts."


def _compared(base: Row, tuned: Row) -> list[Figure]:
    rows = [_figure(MEASURES["heldout_reward"], base.get("heldout_reward"), tuned.get("heldout_reward"), "reward")]
    rows.append(_figure("trained questions", base["reward"], tuned["reward"], "reward"))
    was, now = as_row(base.get("reward_by_aspect")), as_row(tuned.get("reward_by_aspect"))
    rows += [_figure(f"reward: {ASPECTS.get(name, name)}", was[name], now.get(name), "reward") for name in was]
    was, now = as_row(base.get("oracle")), as_row(tuned.get("oracle"))
    rows += [_figure(f"oracle: {name}", was[name], now.get(name), "rate") for name in was]
    rows += [_figure(_words(n), base.get(n), tuned.get(n), n) for n in ("diversity", "motion", "velocity_norm")]
    return [row for row in rows if row]


def _figure(name: str, before: object, after: object, kind: str) -> Figure | None:
    was, now = number(before), number(after)
    if was is None or now is None:
        return None
    change = round(now - was, 3)
    small = abs(change) < {"reward": CLEAR, "heldout_reward": CLEAR, "rate": CLEAR_RATE}.get(kind, 0.0)
    tone: Tone = "plain" if small or not change else "good" if change > 0 else "bad"
    plus = "+" if change > 0 else ""
    if kind == "rate":
        return Figure(name, f"{was:.1%}", f"{now:.1%}", f"{plus}{signed(100 * change, 1)} points", tone)
    if kind in ("reward", "heldout_reward"):
        return Figure(name, signed(was), signed(now), f"{plus}{signed(change)}", tone)
    of = f"{now / was:.0%}" if was > 0 else ""
    return Figure(name, signed(was), signed(now), of, "bad" if kind in KEPT and now < 0.9 * was else "plain")


def _trained(record: Record, name: str, *keys: str) -> Figure | None:
    """The first tenth of the updates against the last; a change within twice its standard error is none."""
    _, values = curve(record.updates, *keys)
    part = max(1, len(values) // 10)
    first, last = values[:part], values[-part:]
    if len(values) < 2:
        return None
    row = _figure(name, statistics.fmean(first), statistics.fmean(last), "reward")
    error = math.sqrt(sum(statistics.variance(one) / len(one) for one in (first, last))) if part > 1 else 0.0
    if row and abs(statistics.fmean(last) - statistics.fmean(first)) <= 2 * error:
        return Figure(row.name, row.before, row.after, row.change)
    return row


def _watched(record: Record) -> str:
    if not record.watch:
        return "This run has no watch.jsonl: drift would not have been noticed."
    if record.alarm is not None:
        gone = {name for row in record.watch if row["step"] >= record.alarm for name in outside(row)}
        left = _listed(sorted(map(_words, gone))) or "the clips"
        best = f" The best checkpoint is that of update {record.best}." if record.best is not None else ""
        return f"From update {record.alarm} on the reward rose while {left} left what the base makes.{best}"
    count = len(as_row(record.watch[0].get("measures")))
    return f"{count} measures of drift, looked at {len(record.watch)} times: never two of them outside at once."


def _against_plan(record: Record) -> list[str]:
    rows, found = stages(record), list[str]()
    both = [(str(r["name"]), float(r["gib"]), float(r["planned_gib"])) for r in rows if r["gib"] and r["planned_gib"]]
    large = [name for name, gib, planned in both if gib > max(LARGE * planned, planned + MARGIN_GIB)]
    if large:
        found.append(f"More memory than planned in {_listed(large)}.")
    _, seconds = curve(record.updates[1:], "update_s")
    planned = number(record.plan.get("update_s"))
    if seconds and planned and statistics.median(seconds) > SLOW * planned:
        found.append(f"An update took {statistics.median(seconds):.3g} s, planned were {planned:.3g} s.")
    return found


def _ordered(measures: Sequence[Row]) -> list[str]:
    found = list(dict.fromkeys(name for row in measures for name in row))
    return sorted(found, key=lambda name: list(MEASURES).index(name) if name in MEASURES else len(MEASURES))


def _words(name: str) -> str:
    return MEASURES.get(name, name.replace("_", " "))


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
