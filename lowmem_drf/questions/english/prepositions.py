"""A noun after a preposition: a time, a place, clothes, a possession, a tool, or a relation."""

from __future__ import annotations

from lowmem_drf.questions.english import lexicon as lx
from lowmem_drf.questions.english import nouns
from lowmem_drf.questions.english.entities import Ref
from lowmem_drf.questions.english.lexicon import wordset
from lowmem_drf.questions.english.notes import Draft, Notes
from lowmem_drf.questions.english.nounphrase import NounPhrase
from lowmem_drf.questions.english.verbs import ENFOLDING, STATIVE, TAKES_PREPOSITION

STATIC = wordset(
    """
    in on at under above below beneath behind beside between among near by against inside outside underneath atop alongside around over
    next_to on_top_of in_front_of close_to in_the_corner_of within opposite
    """
)
"""Prepositions that say where something is, not where it goes."""
IGNORED = {"without", "like", "for", "about", "because of", "instead of", "as well as", "of", "since"}
"""What stands behind them need not be in the picture."""
ABOVE = {"under", "beneath", "against"}
AT_TIMES = ABOVE | {"at", "in", "during", "on", "by", "before", "after", "through", "amid"}
IN_LIGHT = {"at", "in", "during", "under", "by"}


def prepositional(n: Notes, i: int, prep: str, phrase: NounPhrase) -> None:
    """Writes down the phrase at chunk ``i``."""
    s = n.s
    low = prep.lower()
    participle = s.verb is not None and s.verb.shape == "part" and not s.verb.phrases
    if s.verb and participle and s.verb.base in ENFOLDING and not phrase.pronoun:
        ref = n.cast.add(phrase, ask=phrase.key not in nouns.LOCATIVE | nouns.PLACES)
        _relate(n, low, ref, phrase, False)
        s.last = ref.entity
    elif low in IGNORED:
        n.cast.add(phrase, ask=False, describe=False)
    elif (
        phrase.key in nouns.TIMES
        and phrase.of is None
        and low in (ABOVE if phrase.key in nouns.SKY else IN_LIGHT if phrase.key in nouns.LIGHT else AT_TIMES)
    ):
        n.time(low, phrase)
    elif low == "during":
        return
    elif low in {"in", "on", "against", "with", "in front of"} and phrase.key in nouns.BACKDROPS and phrase.adjectives:
        n.backdrop(phrase)
    elif low == "in" and phrase.key in nouns.CLOTHES and s.last is not None and not (s.verb and s.verb.shape == "part"):
        _wearing(n, phrase)
    elif low == "with" and not participle:
        _with(n, i, phrase)
    elif not _place(n, i, low, phrase):
        ref = n.cast.add(
            phrase, ask=phrase.key not in nouns.LOCATIVE, besides=[*s.subject, *(s.verb.subjects if s.verb else ())]
        )
        placed, s.placed = s.placed, False
        _relate(n, low, ref, phrase, placed)
        s.last = ref.entity if ref.entity is not None else s.last


def _place(n: Notes, i: int, low: str, phrase: NounPhrase) -> bool:
    """The first sentence sets the scene with any place, a later one with a place in front, or the first "in the …"."""
    s = n.s
    place = phrase.key in nouns.PLACES or phrase.of is None and phrase.last[:1].isupper() and low in {"in", "at"}
    bare = phrase.key in nouns.LOCATIVE and not phrase.adjectives and len(phrase.nouns) == 1
    somebody = (
        bool(s.subject or s.scene or s.verb and s.verb.subjects)
        or low in {"in", "at"}
        or i == 1
        and n.next_kind(i) == "COMMA"
    )
    setting = n.number == 0 or i == 1 or not n.places and low in {"in", "at", "on", "inside"}
    agent = s.verb is not None and s.verb.shape == "part" and not s.verb.phrases and low == "by"
    if not (place and low in nouns.PLACE_PREPOSITIONS and somebody and setting) or bare or agent:
        return False
    ref = n.cast.add(phrase, ask=False, describe=False)
    s.last, s.placed, s.extend = ref.entity, True, None
    n.places.append((low, ref))
    if s.verb:
        s.verb.phrases += 1
    return True


def _relate(n: Notes, prep: str, ref: Ref, phrase: NounPhrase, placed: bool) -> None:
    """A relation of the verb where there is one, else of what stands before. placed: the phrase before said where the
    scene is."""
    s, draft = n.s, n.s.verb
    if ref.entity is None:
        return
    if (
        draft
        and not draft.phrases
        and (draft.shape == "part" or draft.base in TAKES_PREPOSITION and not draft.has_object)
    ):
        draft.parts += [prep, ref]
        draft.phrases += 1
        s.extend = lambda more: draft.parts.extend(["and", more])
        return
    static = prep.replace(" ", "_") in STATIC and phrase.key not in nouns.LOCATIVE
    if draft and draft.subjects and not s.copula:
        relation = draft.grown(prep, ref)
        if (
            draft.phrases
            and not placed
            and static
            and draft.base not in STATIVE
            and s.last is not None
            and s.last not in draft.subjects
        ):
            relation = Draft("relation", [s.last], "be", [prep, ref])  # "runs past a house behind a tree"
        draft.phrases += 1
    elif s.subject:
        relation = Draft("relation", list(s.subject), "be", [prep, ref])
    else:
        if draft is None:
            s.opening.append((prep, ref))
        return
    n.drafts.append(relation)
    s.extend = lambda more: relation.parts.extend(["and", more])


def _wearing(n: Notes, phrase: NounPhrase) -> None:
    """``in a red dress``"""
    s = n.s
    near = s.last if s.last is not None and n.cast.entities[s.last].animate else None
    owners = [near] if near is not None else s.subject
    ref = n.cast.add(phrase, ask=False)
    s.extend = lambda more: n.draft("attribute", owners, "be", "wearing", more)
    s.extend(ref)
    s.last = ref.entity if ref.entity is not None else s.last


def _with(n: Notes, i: int, phrase: NounPhrase) -> None:
    """What something has, what it is done with, or one more thing in the scene."""
    s = n.s
    if phrase.pronoun:
        return
    if _apart(n, i, phrase):
        s.subject, s.verb = [], None
        n.subject(i, phrase)
        return
    worn = nouns.BODY | nouns.CLOTHES
    acting = s.verb if s.verb and s.verb.subjects and not s.copula and phrase.key not in worn - nouns.TOOLS else None
    if acting and (phrase.key in nouns.TOOLS or acting.phrases == 0 or phrase.determiner in lx.POSSESSIVES):
        ref = n.cast.add(phrase)
        relation = acting.grown("with", ref)
        n.drafts.append(relation)
        s.extend, s.last = (lambda more: relation.parts.extend(["and", more])), ref.entity
        return
    comma = i > 1 and n.items[i - 2].kind == "COMMA"
    owners = list(s.subject) if comma or s.last is None else [s.last]
    s.extend = lambda more: n.have(owners, more)
    ref = n.cast.add(phrase, ask=False, describe=phrase.key not in nouns.BODY)
    s.extend(ref)
    s.last = ref.entity if ref.entity is not None else s.last


def _apart(n: Notes, i: int, phrase: NounPhrase) -> bool:
    """``, with mountains in the background``, ``with smoke rising``: belongs to nobody."""
    s = n.s
    following = n.items[i + 1] if i + 1 < len(n.items) else None
    place = (
        n.items[i + 2].phrase if i + 2 < len(n.items) and following is not None and following.kind == "PREP" else None
    )
    if (
        place is not None
        and place.key in nouns.LOCATIVE
        or s.last is not None
        and n.cast.entities[s.last].head in nouns.LOCATIVE
        and not n.cast.entities[s.last].ask
    ):
        return True
    if not s.subject and s.last is None:
        return True
    if i > 1 and n.items[i - 2].kind == "COMMA" and not (phrase.key in nouns.BODY | nouns.CLOTHES and s.subject):
        return True
    verb = following.verb if following is not None else None
    return verb is not None and not verb.finite and verb.shape == "ing" and phrase.key not in nouns.BODY
