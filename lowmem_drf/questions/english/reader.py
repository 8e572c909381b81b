"""Chunks of a sentence -> notes: who does what, who is what. Chunk by chunk from left to right."""

from __future__ import annotations

from lowmem_drf.questions.english import lexicon as lx
from lowmem_drf.questions.english import nouns
from lowmem_drf.questions.english.chunks import Chunk, Verb
from lowmem_drf.questions.english.entities import Ref
from lowmem_drf.questions.english.facts import Cue
from lowmem_drf.questions.english.notes import ClaimKind, Draft, Notes, State
from lowmem_drf.questions.english.nounphrase import NounPhrase
from lowmem_drf.questions.english.prepositions import prepositional
from lowmem_drf.questions.english.verbs import CAUSATIVE, INANIMATE, MANNER_TO, PHRASAL, UNSEEN

ALONGSIDE = {"each other", "one another", "overhead", "underwater", "downhill", "nearby"}
"""Adverbs that belong to what is done; others say how."""


def read(n: Notes, items: list[Chunk]) -> None:
    """Writes down one sentence."""
    previous = n.s.subject
    n.s, n.items, n.number = State(), items, n.number + 1
    negated = False
    for i, item in enumerate(items):
        negated = negated and item.kind not in {"VERB", "COMMA", "CONJ", "SUB"}
        if negated:
            continue
        negated = item.verb is not None and item.verb.negated
        _read(n, i, item, previous)
        for entity, word in n.cast.described:
            n.attribute([entity], word)
        n.cast.described.clear()
        n.s.conj = item.kind == "CONJ" or n.s.conj and item.kind == "ADV"
        if not (item.kind == "PREP" and not n.s.prep):  # a preposition that was part of its verb
            n.s.before = item.kind


def _read(n: Notes, i: int, item: Chunk, previous: list[int]) -> None:
    s = n.s
    if item.kind == "NP" and item.phrase:
        _noun(n, i, item.phrase)
    elif item.kind == "VERB" and item.verb:
        _verb(n, item.verb, previous)
    elif item.kind == "ADJ":
        _adjectives(n, i, item.adjectives)
    elif item.kind == "PREP":
        if s.verb and s.before == "VERB" and f"{s.verb.base} {item.low}" in PHRASAL:
            s.verb.parts.append(item.low)
        else:
            s.prep = item.low
    elif item.kind == "SUB" and item.low == "as" and s.verb and n.next_kind(i) == "NP" and not n.clause_at(i + 1):
        s.prep = "as"
    elif item.kind == "ADV":
        _adverb(n, item.low)
    elif item.kind in {"SUB", "COMMA"}:
        s.prep, s.copula = "", False
        s.verb = None if item.kind == "SUB" else s.verb
    elif item.kind == "REL":
        s.relative = True


def _noun(n: Notes, i: int, phrase: NounPhrase) -> None:
    s = n.s
    if phrase.last.lower() in lx.COLORS and phrase.count == 1 and not s.prep:  # "one black, one white"
        return
    if s.prep:
        prep, s.prep = s.prep, ""
        prepositional(n, i, prep, phrase)
    elif s.copula and s.before in {"VERB", "ADV"}:
        _complement(n, phrase)
    elif s.verb and not s.verb.has_object and s.before in {"VERB", "ADV", "TO"} and s.verb.shape != "part":
        _object(n, s.verb, phrase)
    elif s.extend and (s.conj or s.before == "COMMA" and _list_goes_on(n, i)) and not _starts_afresh(n, i, phrase):
        ref = n.cast.add(phrase)
        s.last = ref.entity
        s.extend(ref)
    else:
        n.subject(i, phrase)


def _list_goes_on(n: Notes, i: int) -> bool:
    """A conjunction ends the list that the comma at ``i - 1`` stands in, with no verb on the way."""
    kinds = [item.kind for item in n.items[i:]]
    end = kinds.index("CONJ") if "CONJ" in kinds else -1
    return end > 0 and all(kind in {"NP", "COMMA"} for kind in kinds[:end]) and kinds[end + 1 : end + 2] == ["NP"]


def _starts_afresh(n: Notes, i: int, phrase: NounPhrase) -> bool:
    """Whether the phrase opens a clause rather than going on with a list. A subject still without its verb lays claim
    to the next one."""
    s = n.s
    if s.verb is None and not s.copula:
        fragment = s.before == "CONJ" and n.next_kind(i) == "PREP" or n.clause_at(i) and not n.clause_at(i, finite=True)
        return s.last not in s.subject and fragment
    held = s.verb is not None and s.verb.shape == "ing" and s.verb.base in {"wear", "hold", "carry"} and not s.finite
    return n.clause_at(i) and not held or phrase.pronoun in {"he", "she", "they"}


def _object(n: Notes, draft: Draft, phrase: NounPhrase) -> None:
    s = n.s
    draft.has_object = True
    if draft.shape == "have":
        draft.dropped = True
        owners = list(draft.subjects)
        s.extend = lambda more: n.have(owners, more)
        ref = n.cast.add(phrase, ask=False, describe=phrase.key not in nouns.BODY)
        s.last = ref.entity
        s.extend(ref)
        return
    ref = n.cast.add(phrase)
    doer = tuple(draft.subjects)
    if phrase.pronoun in {"it", "them"}:
        ref.entity = n.objects.get(doer)
        if ref.entity is None or n.cast.entities[ref.entity].plural != (phrase.pronoun == "them"):
            draft.dropped = True
            return
    elif ref.entity is not None:
        n.objects[doer] = ref.entity
    s.last = ref.entity
    if phrase.key in {"times", "time", "day", "moment", "while", "place"}:  # "spins three times", "takes place"
        draft.dropped = phrase.key == "place"
        return
    wearing = draft.base == "wear"
    if wearing and ref.entity is not None:
        n.cast.entities[ref.entity].ask = False
    bare = list(draft.parts)
    draft.parts.append(ref)

    def also(more: Ref) -> None:
        if wearing:
            n.draft("attribute", draft.subjects, draft.form, *bare, more)
        else:
            draft.parts += ["and", more]

    s.extend = also


def _complement(n: Notes, phrase: NounPhrase) -> None:
    """``is a chef``, ``there is a dog``."""
    s = n.s
    if not s.subject:
        ref = n.cast.add(phrase, subject=True)
        if ref.entity is not None:
            s.subject, s.last, s.copula = [ref.entity], ref.entity, False
    elif not phrase.pronoun:
        n.draft("attribute", s.subject, "be", phrase.short(True))
        s.copula = False


def _verb(n: Notes, verb: Verb, previous: list[int]) -> None:
    s = n.s
    if s.before == "TO" and s.verb:
        if s.verb.base in MANNER_TO and not s.verb.has_object:  # "begins to dance"
            s.verb.parts += ["to", verb.base]
            s.verb.base = verb.base
        else:
            s.verb = Draft("action", s.verb.subjects, "do", [verb.base], verb.base, "base")
            n.drafts.append(s.verb)
        s.verb.has_object, s.extend = False, None
        return
    if s.verb and s.verb.base in CAUSATIVE and s.verb.has_object and s.before == "NP" and verb.shape == "base":
        s.verb.parts.append(verb.base)
        return
    there = s.before == "THERE"
    subjects = [] if there else _who(n, verb)
    if (
        not subjects
        and not there
        and not s.subject
        and s.before in {"START", "SUB", "COMMA"}
        and not s.scene
        and verb.finite
    ):
        subjects = previous
    s.relative, s.extend, s.prep, s.finite = False, None, "", s.finite or verb.finite
    s.copula = verb.shape == "copula" and not verb.negated
    if verb.shape == "copula":
        s.verb, s.subject = None, [] if there else subjects
        return
    kind: ClaimKind = "attribute" if verb.base in {"wear", "have"} or verb.shape == "part" else "action"
    s.verb = Draft(kind, list(subjects), verb.form, [verb.words], verb.base, verb.shape)
    if subjects and not verb.negated and verb.base and verb.base not in UNSEEN:
        n.drafts.append(s.verb)
        for word in verb.manner:
            n.draft("action", subjects, verb.form, verb.words, word, topic="manner")


def _who(n: Notes, verb: Verb) -> list[int]:
    """The subject of a verb: the clause's, or what a participle or a relative clause stands behind."""
    s = n.s
    if s.relative and s.last is not None:
        return [s.last]
    if verb.finite:
        joint, s.joint = s.joint, []
        return s.subject if verb.singular else [*joint, *s.subject]
    near = s.last
    if s.before not in {"NP", "ADV"} or near is None or near in s.subject:
        return s.subject or ([near] if near is not None and not s.silent else [])
    entity = n.cast.entities[near]
    if entity.inner is not None:  # "the window of a train passing", "a statue of a man riding"
        moving = n.cast.entities[entity.inner].animate and not entity.animate and entity.key not in nouns.BODY
        if entity.key in nouns.PARTS or moving:
            return [entity.inner]
    watched = s.verb is not None and s.verb.has_object and s.finite
    lifeless = not entity.animate and verb.shape == "ing" and verb.base not in INANIMATE
    if lifeless and not watched and not s.copula and s.subject and n.cast.entities[s.subject[0]].animate:
        return s.subject
    return [near]


def _adjectives(n: Notes, i: int, words: list[str]) -> None:
    """After ``is`` or ``looks``, put behind a noun, or alone at the end."""
    s = n.s
    if s.copula and s.subject:
        for word in words:
            n.attribute(s.subject, word)
    elif s.verb and s.before in {"VERB", "ADV"} and not s.verb.has_object:
        s.verb.parts.append(" and ".join(words))
        s.verb.has_object = True
    elif s.prep:
        s.prep = ""
    elif s.last is not None and s.before in {"NP", "COMMA", "CONJ"} and n.next_kind(i) in {"COMMA", "VERB", "PREP"}:
        for word in words:
            n.attribute([s.last], word)
    elif s.before == "COMMA" and n.next_kind(i) == "STOP":
        n.moods += [Cue("style", "the video", "be", word.lower()) for word in words]


def _adverb(n: Notes, low: str) -> None:
    s = n.s
    if s.verb is None:
        return
    if low in lx.PARTICLES or low in ALONGSIDE:
        if s.before in {"VERB", "ADV"} or s.verb.has_object and s.before == "NP":
            s.verb.parts.append(low)
    elif (low.endswith("ly") or low in {"alone", "together", "fast"}) and s.verb in n.drafts:
        n.draft("action", s.verb.subjects, s.verb.form, *s.verb.parts, low, topic="manner")
