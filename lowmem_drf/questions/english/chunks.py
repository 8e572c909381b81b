"""Tagged words -> chunks: noun phrases, verb groups, prepositions and the small words between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lowmem_drf.questions.english import lexicon as lx
from lowmem_drf.questions.english.nounphrase import STARTS, NounPhrase, noun_phrase
from lowmem_drf.questions.english.verbs import SHOWING
from lowmem_drf.questions.english.words import Token

Kind = Literal["NP", "ADJ", "VERB", "PREP", "ADV", "CONJ", "COMMA", "SUB", "REL", "TO", "THERE"]


@dataclass(slots=True)
class Verb:
    """A verb with its helpers. ``is slowly walking`` -> form ``be``, words ``walking``, finite, manner ``slowly``."""

    base: str
    form: Literal["do", "be"]
    words: str
    finite: bool
    shape: Literal["copula", "have", "base", "ing", "part"]
    manner: list[str] = field(default_factory=list)
    negated: bool = False
    singular: bool = False
    """Third person singular: the subject is one."""


@dataclass(slots=True)
class Chunk:
    kind: Kind
    low: str = ""
    phrase: NounPhrase | None = None
    adjectives: list[str] = field(default_factory=list)
    verb: Verb | None = None


def chunks(items: list[Token]) -> list[Chunk]:
    """Every token of a sentence ends up in one chunk."""
    out: list[Chunk] = []
    i = 0
    while i < len(items):
        token = items[i]
        group = _verb(items, i)
        if group:
            verb, i = group
            out.append(Chunk("VERB", verb.base, verb=verb))
        elif token.tag in STARTS:
            phrase, end = noun_phrase(items, i)
            end = max(end, i + 1)
            if isinstance(phrase, list):
                if phrase:
                    out.append(Chunk("ADJ", " ".join(phrase), adjectives=phrase))
            elif phrase.nouns or phrase.pronoun:
                out.append(Chunk("NP", phrase.key, phrase))
            i = end
        else:
            kind: Kind = (
                token.tag if token.tag in {"PREP", "ADV", "CONJ", "COMMA", "SUB", "REL", "TO", "THERE"} else "ADV"
            )  # type: ignore[assignment]
            if token.tag not in {"QUOTE", "GEN", "NOT"}:
                out.append(Chunk(kind, token.text if kind == "PREP" else token.low))
            i += 1
    return out


def _verb(items: list[Token], i: int) -> tuple[Verb, int] | None:
    """The verb group at ``i``, with adverbs before and inside it."""
    manner, negated, be, have, modal, j = [], False, False, False, False, i
    while j < len(items):
        token = items[j]
        if token.tag == "BE":
            be = True
        elif token.tag == "HAVE":
            have = True
        elif token.tag == "MODAL":
            modal = True
        elif token.tag == "NOT":
            negated = True
        elif token.tag == "ADV" and token.low not in lx.PARTICLES:
            manner.append(token.low)
        elif token.tag == "V":
            manner = [word for word in manner if word.endswith("ly")]
            if token.base in SHOWING and token.form == "part" and be:
                if j + 1 < len(items) and items[j + 1].form == "ing":
                    j += 1
                    continue
                return Verb("", "be", "", True, "part"), j + 1
            if token.form == "ing":
                return Verb(token.base, "be", token.low, be or have, "ing", manner, negated), j + 1
            if token.form == "part" or token.form == "past" and be:
                if have and not be:
                    return Verb(token.base, "do", token.base, True, "base", manner, negated), j + 1
                return Verb(token.base, "be", token.low, be, "part", manner, negated), j + 1
            if token.base == "get" and j + 1 < len(items) and items[j + 1].form == "part":
                return Verb(items[j + 1].base, "do", f"get {items[j + 1].low}", True, "part", manner, negated), j + 2
            return Verb(token.base, "do", token.base, True, "base", manner, negated, token.form == "s"), j + 1
        else:
            break
        j += 1
    if be:
        return Verb("be", "be", "", True, "copula", negated=negated), j
    if have:
        return Verb("have", "do", "have", True, "have", negated=negated), j
    return (Verb("", "do", "", True, "base", negated=True), j) if modal else None
