"""A prompt's questions: what it says (TA), asked part by part as in a Davidsonian scene graph (arXiv 2310.18235), and
the fixed ones (Phy, VQ)."""

from __future__ import annotations

from dataclasses import dataclass

from lowmem_drf.errors import BadInputError
from lowmem_drf.questions.english import nouns, wording
from lowmem_drf.questions.english.dense import dense
from lowmem_drf.questions.english.facts import Claim, Facts
from lowmem_drf.questions.english.fixed import checks
from lowmem_drf.questions.english.foil import foil
from lowmem_drf.questions.english.parse import parse
from lowmem_drf.questions.english.verbs import STATIVE
from lowmem_drf.types import Question

MODES = ("yesno", "dense", "both", "vanilla", "heldout")
MAX_ALIGNMENT = 20
"""Questions about the prompt, besides the contrast. The packed pass grows with them."""
KINDS = ("subject", "count", "attribute", "action", "relation", "place", "time", "camera", "style", "text", "global")
"""Names of alignment questions, in the order in which they are asked."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A candidate: both wordings and how much it matters (less is more)."""

    name: str
    texts: tuple[str, str]
    rank: float
    order: int
    claim: Claim | None = None


def questions(prompt: str, mode: str = "yesno") -> tuple[Question, ...]:
    """The questions of a free English prompt. No model, no network, always the same.

    mode: ``yesno``; ``dense``: explanation queries with a reference answer; ``both``; ``vanilla``: one global question;
    ``heldout``: ``yesno`` in wordings that training never uses, for evaluation.

    Yes/no alignment questions are answered ``yes`` by a clip that follows the prompt; at most one, ``foil``,
    contradicts the prompt and is answered ``no``, and shares its weight with the question that it contradicts. Phy and
    VQ ask every property both ways, half the weight each.

    Raises:
        BadInputError: an unknown mode.
    """
    if mode not in MODES:
        raise BadInputError(f"critic.mode = {mode!r} is unknown. Use one of: {', '.join(MODES)}.")
    facts = parse(prompt)
    if mode == "vanilla":
        return (Question("TA", wording.globally(facts.prompt) + wording.ANSWER, "yes", name="global"),)
    speaker = wording.Speaker(facts.subjects, list(facts.names))
    kept = checks(facts)
    asked = alignment(facts, speaker)
    out: list[Question] = []
    if mode in {"yesno", "both", "heldout"}:
        second = mode == "heldout"
        out += _alignment_questions(facts, speaker, asked, second)
        for check in kept:
            for texts, answer in ((check.good, "yes"), (check.bad, "no")):
                out.append(Question(check.aspect, texts[second] + wording.ANSWER, answer, weight=0.5, name=check.name))
    if mode in {"dense", "both"}:
        claims = [item.claim for item in sorted(asked, key=lambda item: item.rank) if item.claim]
        out += dense(facts, claims, speaker, kept)
    return tuple(out)


def _alignment_questions(facts: Facts, speaker: wording.Speaker, asked: list[Asked], second: bool) -> list[Question]:
    contrast = foil(facts, speaker, [(item.texts[0], item.name, item.claim) for item in asked])
    out = []
    for item in asked:
        shared = contrast is not None and contrast.twin == item.texts[0]
        out.append(
            Question("TA", item.texts[second] + wording.ANSWER, "yes", weight=0.5 if shared else 1.0, name=item.name)
        )
    if contrast:
        out.append(Question("TA", contrast.texts[second] + wording.ANSWER, "no", weight=0.5, name="foil"))
    return out


def alignment(facts: Facts, speaker: wording.Speaker) -> list[Asked]:
    """The most important parts of a prompt, in the order of ``KINDS``."""
    found = [*_entities(facts, speaker), *_claims(facts, speaker)]
    for name, cues, first, step in (
        ("place", facts.places, 5, 14),
        ("time", facts.times, 9, 10),
        ("camera", facts.camera, 5, 4),
        ("style", facts.styles, 7, 6),
    ):
        found += [
            Asked(name, wording.cue(item), first + step * k, k)
            for k, item in enumerate(sorted(cues, key=lambda cue: cue.subject != "the camera"))
        ]
    found.sort(key=lambda item: item.order)
    found += [Asked("text", wording.text(item), 4 + 9 * k, k) for k, item in enumerate(facts.texts)]
    if len(found) < 3:
        found.append(Asked("global", (wording.globally(facts.prompt), wording.globally(facts.prompt, True)), 0, 0))
    unique = list({item.texts[0].lower(): item for item in reversed(found)}.values())
    chosen = sorted(unique, key=lambda item: (item.rank, item.order))[:MAX_ALIGNMENT]
    return sorted(chosen, key=lambda item: (KINDS.index(item.name), item.order))


def _entities(facts: Facts, speaker: wording.Speaker) -> list[Asked]:
    out: list[Asked] = []
    busy = {i for claim in (*facts.attributes, *facts.actions, *facts.relations) for i in claim.subjects}
    shown = 0
    for i, entity in enumerate(facts.subjects):
        if not entity.ask or not speaker.named(i):
            continue
        last = entity.key
        implied = i in busy and shown > 1
        out.append(
            Asked(
                "time" if last in nouns.TIMES.keys() - nouns.SKY else "subject",
                speaker.existence(i),
                (1 if not shown else 6 + 4 * shown) + 14 * implied,
                i,
            )
        )
        shown += 1
        if (
            entity.quantity
            and (entity.count is None or entity.count > 0)
            and entity.count != 1
            or entity.quantity == "one"
        ):
            out.append(Asked("count", speaker.count(i), 3 + 2 * len([o for o in out if o.name == "count"]), i))
    return out


def _claims(facts: Facts, speaker: wording.Speaker) -> list[Asked]:
    out = []
    seen: dict[str, int] = {}
    placed = {claim.subjects for claim in facts.relations if claim.form == "be"}
    for claim in sorted((*facts.attributes, *facts.actions, *facts.relations), key=lambda c: c.order):
        entity = facts.subjects[claim.subjects[0]]
        last = entity.key
        name = (
            "count"
            if claim.topic == "count"
            else "time"
            if last in nouns.LIGHT and claim.kind == "attribute"
            else claim.kind
        )
        mood = claim.kind == "attribute" and (last in nouns.LIGHT or last in nouns.VAGUE)
        key = (
            "manner"
            if claim.topic == "manner"
            else "color"
            if claim.topic == "color"
            else "mood"
            if mood
            else claim.kind
        )
        first, step = {
            "manner": (30, 5),
            "color": (4, 2.5),
            "mood": (10, 5),
            "attribute": (9, 3),
            "action": (2, 2),
            "relation": (8, 4),
        }[key]
        still = claim.words.split()[0] in STATIVE and claim.subjects in placed  # "sits" says less than "is on a chair"
        rank = (
            first + step * seen.get(key, 0) + (12 if still else -2 if key == "relation" and claim.form == "be" else 0)
        )
        out.append(Asked(name, speaker.claim(claim), rank, claim.order, claim))
        seen[key] = seen.get(key, 0) + 1
    return out
