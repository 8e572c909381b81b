"""An English prompt -> what it says. Careful rules, no model: what is not understood is left out rather than
guessed."""

from __future__ import annotations

import re
from dataclasses import replace

from lowmem_drf.questions.english import lexicon as lx
from lowmem_drf.questions.english import nouns
from lowmem_drf.questions.english.chunks import chunks
from lowmem_drf.questions.english.entities import Cast, Ref
from lowmem_drf.questions.english.facts import Claim, Cue, Facts
from lowmem_drf.questions.english.filming import clean, read_filming
from lowmem_drf.questions.english.notes import Draft, Notes
from lowmem_drf.questions.english.nounphrase import article
from lowmem_drf.questions.english.reader import read
from lowmem_drf.questions.english.tag import tagged
from lowmem_drf.questions.english.words import tokens

MAX_CHARACTERS = 6000
"""What stands behind is not read: no generator's text encoder sees that much."""
HYPHEN = re.compile(
    r"\b(snow|moss|ice|dew|rain|tree|palm|neon|candle|frost|ivy|dust|mud|fog|flower|sun|moon|star|cloud|lamp|leaf|sand|fire)[ ]"
    r"(covered|capped|blanketed|dusted|lit|soaked|drenched|kissed|filled|lined|topped|laden|coated)(?=\s+\w)(?!\s+(?:with|in|by)\b)",
    re.IGNORECASE,
)
"""``snow covered trees``"""
AGE = re.compile(r"\b(\d+|\w+)[ -]years?[ -]old\b", re.IGNORECASE)
UNCOUNTED_PLACES = {"space", "water", "snow", "ice", "underwater", "downtown"}


def parse(prompt: str) -> Facts:
    """Takes a prompt apart.

    prompt: any text. Sentences, fragments and keyword lists in English are understood; of a text in another language
    nothing is. Never raises.
    """
    text = clean(prompt)[:MAX_CHARACTERS]
    if foreign(text):
        return Facts(text)
    filming = read_filming(text)
    notes = Notes()
    for sentence in tagged(tokens(HYPHEN.sub(r"\1-\2", AGE.sub(r"\1-year-old", filming.text)))):
        read(notes, chunks(sentence))
    cast = notes.cast
    cast.settle()
    claims = _claims(cast, notes.drafts)
    once = {ref.entity: (prep, ref) for prep, ref in reversed(notes.places)}
    places = [
        Cue("place", "the video", "do", f"take place {_at(prep, ref)} {_the(ref)}{cast.written(ref, [], True)}")
        for prep, ref in reversed(once.values())
    ]
    return Facts(
        text,
        tuple(cast.entities),
        tuple(cast.name(i) for i in range(len(cast.entities))),
        tuple(claim for claim in claims if claim.kind == "attribute"),
        tuple(claim for claim in claims if claim.kind == "action"),
        tuple(claim for claim in claims if claim.kind == "relation"),
        tuple(dict.fromkeys([*places, *notes.backdrops])),
        tuple(dict.fromkeys(notes.times)),
        tuple(
            replace(cue, words=cast.named(_plain(cue.words))) if cue.subject == "the camera" else cue
            for cue in filming.camera
        ),
        (*filming.styles, *notes.moods),
        tuple(filming.texts),
    )


def _claims(cast: Cast, drafts: list[Draft]) -> list[Claim]:
    """Drafts in the order of the prompt, each once, without those that nothing in the picture answers for."""
    claims: dict[tuple[tuple[int, ...], str, str], Claim] = {}
    for order, draft in enumerate(drafts):
        if draft.dropped or not draft.subjects or any(cast.entities[i].key in nouns.IGNORED for i in draft.subjects):
            continue
        subjects = tuple(dict.fromkeys(draft.subjects))
        short, full = (
            " ".join(
                part if isinstance(part, str) else cast.written(part, draft.subjects, whole) for part in draft.parts
            ).strip()
            for whole in (False, True)
        )
        if all(short.lower() != cast.entities[i].label.lower() for i in subjects):  # "Is the red car red?"
            claims.setdefault(
                (subjects, draft.form, short), Claim(draft.kind, subjects, draft.form, short, full, draft.topic, order)
            )
    return list(claims.values())


def _plain(words: str) -> str:
    """A camera's move without the adjectives of what it follows."""
    move, _, tail = words.partition(" ")
    out, seen = [move], False
    for item in (c for s in tagged(tokens(tail)) for c in chunks(s)):
        if item.low in {"with", "at", "as", "in"} and seen:
            break
        seen = seen or item.phrase is not None
        if item.phrase:
            out.append(item.phrase.pronoun or item.phrase.short())
        elif item.kind in {"PREP", "ADV", "CONJ", "TO"}:
            out.append(item.low)
        else:
            out.append(" ".join(item.adjectives) or (item.verb.words if item.verb else ""))
    return " ".join(word for word in out if word)


def _at(prep: str, ref: Ref) -> str:
    """How a scene is set where an action runs: ``across a field`` -> ``in``, ``down a street`` -> ``on``."""
    mapped = nouns.PLACE_PREPOSITIONS.get(prep, prep)
    key = ref.phrase.key if ref.phrase else ""
    if prep == "on" and key in nouns.TOWNS:
        return "in"
    return "on" if mapped in {"in", "along"} and prep != "in" and key in nouns.WITHIN else mapped


def _the(ref: Ref) -> str:
    """The article that keyword prompts leave out: ``in park``, ``in ocean``."""
    phrase = ref.phrase
    if (
        phrase is None
        or phrase.determiner
        or phrase.plural
        or phrase.last[:1].isupper()
        or phrase.key in UNCOUNTED_PLACES
    ):
        return ""
    if phrase.key in nouns.THE:
        return "the " if phrase.adjectives else ""
    return article(phrase.short(True)) + " "


def foreign(text: str) -> bool:
    """Whether the text is hardly English: mostly other letters, or other languages' small words outnumber ours."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    if not words:
        return True
    strange = sum(any(ord(c) > 0x24F for c in word) for word in words)
    small = lx.DETERMINERS | lx.PREPOSITIONS | lx.CONJUNCTIONS | lx.POSSESSIVES.keys() | lx.BE | lx.NUMBERS.keys()
    ours = sum(w in small for w in words)
    theirs = sum(w in lx.FOREIGN for w in words)
    return strange * 2 > len(words) or theirs > 1 and theirs >= ours
