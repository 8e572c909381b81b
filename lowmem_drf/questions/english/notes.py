"""What has been read of a prompt so far, where the reader stands in the sentence, and the ways to write something
down."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from lowmem_drf.questions.english import lexicon as lx
from lowmem_drf.questions.english import nouns
from lowmem_drf.questions.english.chunks import Chunk
from lowmem_drf.questions.english.entities import Cast, Ref
from lowmem_drf.questions.english.facts import Cue, Form
from lowmem_drf.questions.english.nounphrase import NounPhrase
from lowmem_drf.questions.english.words import comparative

ClaimKind = Literal["attribute", "action", "relation"]


@dataclass(slots=True, eq=False)
class Draft:
    """A claim while it is read: texts and references in the order of the sentence."""

    kind: ClaimKind
    subjects: list[int]
    form: Form
    parts: list[str | Ref]
    base: str = ""
    shape: str = ""
    topic: str = ""
    dropped: bool = False
    has_object: bool = False
    phrases: int = 0
    """Prepositional phrases read since the verb."""

    def grown(self, *parts: str | Ref) -> Draft:
        """A relation: the same verb with a phrase more."""
        return replace(self, kind="relation", parts=[*self.parts, *parts], topic="")


@dataclass(slots=True)
class State:
    """Where the reader stands in a sentence. Numbers are indices of entities."""

    subject: list[int] = field(default_factory=list)
    joint: list[int] = field(default_factory=list)
    """Subjects before ``and`` that wait for the same verb."""
    verb: Draft | None = None
    last: int | None = None
    """What was mentioned last."""
    prep: str = ""
    """A preposition that waits for its noun."""
    before: str = "START"
    """Kind of the chunk before."""
    conj: bool = False
    relative: bool = False
    copula: bool = False
    """``is`` waits for what the subject is."""
    finite: bool = False
    """The clause has had its verb; what came before were participles."""
    silent: bool = False
    """The subject is a pronoun that nothing is known for: what follows is said of nobody."""
    placed: bool = False
    """The last phrase said where the scene is."""
    scene: bool = False
    """The sentence opened with a time alone: what follows describes the scene."""
    opening: list[tuple[str, Ref]] = field(default_factory=list)
    """Phrases before the subject: ``On the ground, a crowd …``."""
    extend: Callable[[Ref], None] | None = None
    """Takes one more member of the list that is being read."""


class Notes:
    """A prompt's notes."""

    def __init__(self) -> None:
        self.cast = Cast()
        self.drafts: list[Draft] = []
        self.places: list[tuple[str, Ref]] = []
        self.backdrops: list[Cue] = []
        self.times: list[Cue] = []
        self.moods: list[Cue] = []
        self.objects: dict[tuple[int, ...], int] = {}
        """What a subject's last verb acted on: what "it" means in its next one."""
        self.s = State()
        self.items: list[Chunk] = []
        self.number = -1
        """Of the sentence that is being read."""

    def next_kind(self, i: int) -> str:
        return self.items[i + 1].kind if i + 1 < len(self.items) else "STOP"

    def clause_at(self, i: int, finite: bool = False) -> bool:
        """The noun phrase at ``i`` is followed by its own verb (by a finite one)."""
        j = i + 1
        while j < len(self.items):
            kind = self.items[j].kind
            ahead = [item.kind for item in self.items[j + 1 : j + 3]]
            if kind == "VERB":
                verb = self.items[j].verb
                return bool(verb and (verb.finite or verb.shape == "ing" and not finite))
            if kind == "ADV":
                j += 1
            elif kind == "PREP" and ahead[:1] == ["NP"] or kind == "CONJ" and ahead == ["NP", "VERB"]:
                j += 2
            else:
                return False
        return False

    def draft(self, kind: ClaimKind, subjects: list[int], form: Form, *parts: str | Ref, topic: str = "") -> None:
        self.drafts.append(Draft(kind, list(subjects), form, list(parts), topic=topic))

    def subject(self, i: int, phrase: NounPhrase) -> None:
        """A phrase that opens a clause, or stands alone."""
        s = self.s
        verb_next = self.clause_at(i)
        waiting = s.before == "CONJ" and s.verb is None and not s.finite and not s.copula
        s.joint = [*s.joint, *s.subject] if waiting else []
        s.verb, s.copula, s.extend, s.relative, s.finite = None, False, None, False, False
        alone = not verb_next and self.next_kind(i) != "VERB" and phrase.of is None and not phrase.pronoun
        if phrase.key in nouns.TIMES.keys() - nouns.SKY and alone:
            self.time(nouns.TIMES[phrase.key], phrase, fragment=True)
            s.scene, s.subject = True, []
            return
        if phrase.key in nouns.BACKDROPS and phrase.adjectives and not verb_next:
            self.backdrop(phrase)
            return
        ref = self.cast.add(phrase, subject=True)
        s.silent = ref.entity is None
        if ref.entity is None:
            s.subject = []
            return
        s.subject, s.last = [ref.entity], ref.entity
        self.cast.entities[ref.entity].lead = True
        for prep, place in s.opening:
            self.draft("relation", s.subject, "be", prep, place)
        s.opening = []
        subject = s.subject
        s.extend = lambda more: subject.append(more.entity) if more.entity is not None else None

    def attribute(self, subjects: list[int], word: str) -> None:
        """An adjective, if it is one that can be seen."""
        low = word.lower()
        if low in lx.NO_QUESTION or comparative(low):
            return
        aged = re.fullmatch(r"(\w+)-year-old", word)
        if aged:
            self.draft("attribute", subjects, "be", f"{aged[1]} years old")
        elif low in nouns.MATERIALS - lx.COLORS:
            self.draft("attribute", subjects, "be", f"made of {word}", topic="material")
        else:
            color = set(low.replace(" and ", " ").split()) <= lx.COLORS | lx.SHADES and low.split()[-1] in lx.COLORS
            self.draft("attribute", subjects, "be", word, topic="color" if color else "")

    def have(self, owners: list[int], ref: Ref) -> None:
        """``with a cap``, ``has long hair``: clothes are worn, and what is said of hair, eyes and the like is one claim
        each."""
        phrase = ref.phrase
        if not owners or phrase is None:
            return
        if ref.entity is not None:
            self.cast.entities[ref.entity].ask = False
        if phrase.key in nouns.CLOTHES and all(self.cast.entities[i].animate for i in owners):
            self.draft("attribute", owners, "be", "wearing", ref)
        elif phrase.key in nouns.BODY and phrase.adjectives:
            for word in phrase.adjectives:
                color = word.lower().split()[-1] in lx.COLORS
                self.draft(
                    "attribute",
                    owners,
                    "do",
                    "have",
                    replace(phrase, adjectives=[word]).short(True, True),
                    topic="color" if color else "",
                )
        else:
            self.draft(
                "attribute", owners, "do", "have", replace(ref, counted=True), topic="count" if phrase.quantity else ""
            )

    def time(self, prep: str, phrase: NounPhrase, fragment: bool = False) -> None:
        """fragment: the phrase stood alone, and ``prep`` is what its noun takes."""
        words = replace(phrase, determiner="" if phrase.determiner in lx.POSSESSIVES else phrase.determiner).short(True)
        if prep == "in" and nouns.TIMES[phrase.key] == "at" and words == phrase.head():
            prep = "at"
        prep = "in" if prep in {"through", "amid"} else prep
        if fragment and (phrase.determiner or phrase.key in nouns.MASS):
            prep = prep.removesuffix(" the").removesuffix(" a")
        lit = fragment and (phrase.key in nouns.LIGHT or not prep)
        self.times.append(Cue("time", "the video", "do", f"have {words}" if lit else f"take place {prep} {words}"))

    def backdrop(self, phrase: NounPhrase) -> None:
        """``against a black background``"""
        self.backdrops += [Cue("place", f"the {phrase.head()}", "be", word) for word in phrase.adjectives]
