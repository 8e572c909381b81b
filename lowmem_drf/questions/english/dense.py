"""Explanation queries with a reference made from the prompt alone: the critic's probability of the reference is the
reward."""

from __future__ import annotations

from dataclasses import replace

from lowmem_drf.questions.english.facts import Claim, Facts
from lowmem_drf.questions.english.fixed import Check
from lowmem_drf.questions.english.wording import Speaker, capital, listed, state
from lowmem_drf.types import Question

IN_A_SENTENCE = " Answer in one short sentence."
"""Ends every query about a part of the prompt: the references are whole sentences."""
MAX_PARTS = 10
"""Queries about the prompt, besides the global one."""


def dense(facts: Facts, claims: list[Claim], speaker: Speaker, kept: tuple[Check, ...]) -> list[Question]:
    """claims: attributes, actions and relations, the most important first."""
    out = [
        _query(
            "TA",
            "Describe what happens in this video in one sentence.",
            sentence(facts.prompt) or "The video shows a recognizable scene.",
            "global",
        )
    ]
    parts = [
        q
        for claim in claims
        if claim.topic != "manner"
        for q in [_part(_whole(claim, facts), speaker)]
        if q is not None
    ]
    for cue in (*facts.places[:1], *facts.times[:1]):
        if cue.subject == "the video" and cue.words.startswith("take place"):
            asked = (
                "Where does the video take place?"
                if cue.kind == "place"
                else "When or in what weather does the video take place?"
            )
            parts.append(
                _query(
                    "TA", asked + IN_A_SENTENCE, capital(state(cue.subject, False, cue.form, cue.words)) + ".", cue.kind
                )
            )
    for cues, asked, name in (
        (facts.camera, "How is the video filmed?", "camera"),
        (facts.styles, "What is the visual style of the video?", "style"),
    ):
        if cues:
            told = " ".join(capital(state(c.subject, False, c.form, c.words)) + "." for c in cues[:3])
            parts.append(_query("TA", asked + IN_A_SENTENCE, told, name))
    if facts.texts:
        parts.append(
            _query(
                "TA",
                "What text can be read in the video?" + IN_A_SENTENCE,
                f'The text "{facts.texts[0]}" can be read.',
                "text",
            )
        )
    seen: set[str] = set()
    fixed_parts = [q for q in parts if q.name in {"place", "time", "camera", "style", "text"}]
    for q in [*[q for q in parts if q not in fixed_parts][: MAX_PARTS - len(fixed_parts)], *fixed_parts]:
        if q.text not in seen:
            out.append(q)
            seen.add(q.text)
    return [*out, *_fixed(facts, speaker, kept)]


def sentence(prompt: str) -> str:
    """The prompt as it would be said: capital letter, full stop."""
    text = prompt.strip(" ,;")
    return capital(text) + ("" if text.endswith((".", "!", "?")) else ".") if text else ""


def _query(aspect: str, text: str, answer: str, name: str) -> Question:
    return Question(aspect, text, answer, kind="dense", name=name)  # type: ignore[arg-type]


def _whole(claim: Claim, facts: Facts) -> Claim:
    """An action with where it leads: ``walks`` -> ``walks along a narrow trail``."""
    longer = [
        r.full
        for r in facts.relations
        if r.subjects == claim.subjects and r.form == claim.form and r.full.startswith(claim.full + " ")
    ]
    return replace(claim, full=longer[0]) if longer and claim.kind == "action" else claim


def _part(claim: Claim, speaker: Speaker) -> Question | None:
    """``What color is the ball?`` -> ``The ball is red.``"""
    name, plural = speaker.subject(claim)
    do, be = ("do", "are") if plural else ("does", "is")
    if claim.topic == "color" and claim.form == "be":
        asked = f"What color {be} {name}?"
    elif claim.topic == "material":
        asked = f"What {be} {name} made of?"
    elif claim.form == "do" and claim.words.startswith("have "):
        asked = f"What {do} {name} have?"
    elif claim.kind == "attribute" and claim.words.startswith(("wearing", "wear ")):
        asked = f"What {be} {name} wearing?"
    elif claim.kind == "attribute":
        asked = f"What {do} {name} look like?"
    elif claim.kind == "relation":
        asked = f"Where {be} {name}?" if claim.form == "be" and not claim.words.split()[0].endswith("ing") else ""
    else:
        asked = f"What {be} {name} doing?" if claim.form == "be" else f"What {do} {name} do?"
    return _query("TA", asked + IN_A_SENTENCE, speaker.statement(claim), claim.kind) if asked else None


def _fixed(facts: Facts, speaker: Speaker, kept: tuple[Check, ...]) -> list[Question]:
    physics = [check.clause for check in kept if check.aspect == "Phy"]
    quality = [check.clause for check in kept if check.aspect == "VQ"]
    moving = next(
        (
            f"of {speaker.names[c.subjects[0]]} "
            for c in facts.actions
            if not speaker.names[c.subjects[0]].startswith(("a ", "an "))
        ),
        "",
    )
    out = []
    if physics:
        out.append(
            _query(
                "Phy",
                f"Explain whether the motion {moving}in this video is physically plausible.",
                f"The motion is physically plausible: {'; '.join(physics)}.",
                "plausible",
            )
        )
    if quality:
        out.append(
            _query("VQ", "Explain the visual quality of this video.", f"The video is {listed(quality)}.", "quality")
        )
    return out
