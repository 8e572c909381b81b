"""What a run was worth, in words: the head of its report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowmem_drf.reporting.costs import beyond_the_plan
from lowmem_drf.reporting.figures import HELDOUT, Figure, evidence, words
from lowmem_drf.reporting.read import Record, as_row, curve, outside

SUBJECTS = {HELDOUT: "The reward on held-out questions", "reward": "The reward", "training reward": "Training reward"}


@dataclass(frozen=True)
class Verdict:
    headline: str
    watched: str
    """What the watch says."""
    figures: Sequence[Figure]
    """The first are those to see first."""
    source: str
    """Where the figures come from."""


def verdict(record: Record) -> Verdict:
    figures, source = evidence(record)
    lead = next((figure for figure in figures if figure.name in SUBJECTS), None)
    if lead is None:
        return Verdict("There is nothing to judge yet", _watched(record), figures, source)
    word = {"good": "rose", "bad": "fell"}.get(lead.tone, "did not clearly change")
    spoke = ""
    if record.alarm is not None and record.alarmed:
        spoke = f", {'but' if word == 'rose' else 'and'} the alarm spoke at update {record.alarm}"
    headline = f"{SUBJECTS[lead.name]} {word}: {lead.before} to {lead.after}{spoke}"
    return Verdict(headline, _watched(record), figures, source)


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
    found += beyond_the_plan(record)
    _, cosines = curve(record.updates, "decoder_cosine")
    if cosines and min(cosines) < config.model.decoder_least_cosine:
        found.append(f"The tiny decoder's gradient pointed elsewhere: its cosine fell to {min(cosines):.2f}.")
    return [*found, *record.problems]


def _watched(record: Record) -> str:
    if not record.watch:
        return "This run has no watch.jsonl: drift would not have been noticed."
    best = f" The best checkpoint is that of update {record.best}." if record.best is not None else ""
    if record.alarm is not None:
        gone = {name for row in record.watch if row["step"] >= record.alarm for name in outside(row)}
        left = _listed(sorted(map(words, gone))) or "the clips"
        over = "" if record.alarmed else " In the end the clips were back within them."
        worse = next((row.get("worse") for row in record.watch if row["step"] == record.alarm), False)
        but = "held-out answers were worse than the base's, and" if worse else "the reward rose while"
        return f"From update {record.alarm} on {but} {left} left their bands.{over}{best}"
    if not record.watch[0].get("bands"):
        return f"Looked at {len(record.watch)} times, at one prompt: nothing to compare with, so no alarm.{best}"
    return f"Looked at {len(record.watch)} times: nothing that the alarm speaks for.{best}"


def _listed(some: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(some[:-1]), *some[-1:]]))
