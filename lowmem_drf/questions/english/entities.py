"""Who and what is in the picture: noun phrases become entities, pronouns and "the dog" find theirs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lowmem_drf.questions.english import lexicon as lx
from lowmem_drf.questions.english import nouns
from lowmem_drf.questions.english.facts import Entity
from lowmem_drf.questions.english.nounphrase import NounPhrase, article


@dataclass(slots=True)
class Ref:
    """A noun phrase in a claim, and the entity that it means (``None``: nothing that could be pointed at)."""

    entity: int | None
    phrase: NounPhrase | None = None
    counted: bool = False
    """Its number is part of the claim: ``has four arms``."""


SINGULARS = {
    "people": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse", "geese": "goose", "wolves": "wolf",
    "calves": "calf", "elves": "elf",
}  # fmt: skip
PERSON_ENDINGS = ("er", "or", "ist", "man", "woman", "ician", "eer")


def singular(word: str) -> str:
    """``puppies`` -> ``puppy``. For the word lists only, so rare plurals do not matter."""
    low = word.lower()
    if low in SINGULARS:
        return SINGULARS[low]
    if low.endswith("ies") and len(low) > 4:
        return low[:-3] + "y"
    if low.endswith(("ches", "shes", "xes", "sses")):
        return low[:-2]
    return low[:-1] if low.endswith("s") and not low.endswith("ss") else low


def is_animal(word: str) -> bool:
    return bool({singular(word), word.lower()} & nouns.ANIMALS)


def is_person(word: str) -> bool:
    """By the list, else by its ending: ``skateboarder``, ``violinist``."""
    low = singular(word)
    if {low, word.lower()} & nouns.PERSON:
        return True
    other = nouns.NOT_A_PERSON | nouns.ANIMALS | nouns.PLACES
    return len(low) > 4 and low.endswith(PERSON_ENDINGS) and low not in other


class Cast:
    """All entities of a prompt in the order of their mention."""

    def __init__(self) -> None:
        self.entities: list[Entity] = []
        self.described: list[tuple[int, str]] = []
        self.subjects: list[int] = []

    def add(
        self,
        phrase: NounPhrase,
        subject: bool = False,
        ask: bool = True,
        describe: bool = True,
        besides: Sequence[int] = (),
    ) -> Ref:
        """besides: entities that a pronoun cannot mean; describe: the adjectives before the noun are worth questions of
        their own."""
        if phrase.pronoun:
            kind = lx.PRONOUNS.get(phrase.pronoun, "")
            found = self.resolve(kind, subject, besides)
            if found is None and kind in {"he", "she"} and subject:
                found = len(self.entities)
                self.entities.append(Entity("person", False, "a", animate=True, person=True))
                self.subjects.append(found)
            return Ref(found, phrase)
        if (
            phrase.pronoun == ""
            and phrase.last.lower() in lx.COLORS
            and phrase.count == 1
            or phrase.last[:1].isdigit()
            or not phrase.nouns
            or phrase.determiner == "no"
            or phrase.key in {"one", "ones"}
        ):
            return Ref(None, phrase)
        owner = (
            self.resolve(lx.POSSESSIVES[phrase.determiner])
            if phrase.determiner in lx.POSSESSIVES
            else self.add(phrase.possessor, ask=phrase.key in nouns.BODY).entity
            if phrase.possessor
            else None
        )
        known = (
            self.mentioned(phrase.last, phrase)
            if phrase.determiner in {"the", "this", "that", "these", "those"} or phrase.determiner in lx.POSSESSIVES
            else None
        )
        if known is None:
            known = len(self.entities)
            body = phrase.key in nouns.BODY and not (
                subject and (phrase.possessor or not phrase.adjectives) and phrase.determiner not in lx.POSSESSIVES
            )
            person = is_person(phrase.key)
            self.entities.append(
                Entity(
                    phrase.head(),
                    phrase.plural,
                    phrase.determiner,
                    phrase.count,
                    phrase.quantity,
                    tuple(phrase.adjectives),
                    person or is_animal(phrase.key),
                    person,
                    owner,
                    ask=ask and phrase.key not in nouns.VAGUE | nouns.IGNORED and not body,
                )  # fmt: skip
            )
        if subject:
            self.subjects.append(known)
        if describe:
            self.described += [(known, word) for word in phrase.adjectives]
        if phrase.of and not phrase.of.pronoun:
            self.entities[known].inner = self.add(replace(phrase.of, also=None), ask=False, describe=describe).entity
            if phrase.of.also:
                self.add(phrase.of.also, ask=False, describe=describe)
        return Ref(known, phrase)

    def mentioned(self, noun: str, phrase: NounPhrase | None = None) -> int | None:
        """The last entity with this head, unless the adjectives tell them apart."""
        for i in range(len(self.entities) - 1, -1, -1):
            entity = self.entities[i]
            same = entity.key == noun.lower().rsplit(" ", 1)[-1]
            clash = (
                phrase
                and phrase.adjectives
                and entity.adjectives
                and not set(phrase.adjectives) & set(entity.adjectives)
            )
            if same and not clash:
                return i
        return None

    def resolve(self, kind: str, subject: bool = True, besides: Sequence[int] = ()) -> int | None:
        """``he``, ``she``, ``it`` or ``they`` -> the last subject that it can mean, else the last mention; people
        before animals.

        subject: the pronoun is a subject or a possessive. Another ``it`` or ``them`` rather means what was mentioned
        last.
        """
        if not kind:
            return None
        order = (
            [*reversed(self.subjects), *reversed(range(len(self.entities)))]
            if subject or kind in {"he", "she"}
            else [*reversed(range(len(self.entities)))]
        )
        if kind in {"he", "she"}:
            order = [i for i in order if self.entities[i].person] + [i for i in order if not self.entities[i].person]
        if kind == "it":
            order = [i for i in order if not self.entities[i].fleeting] + [
                i for i in order if self.entities[i].fleeting
            ]
        for i in order:
            if i in besides:
                continue
            entity = self.entities[i]
            noun = singular(entity.key)
            if kind in {"it", "they"} and not entity.ask:
                continue
            if kind == "they" and entity.plural and (entity.animate or i in self.subjects):
                return i
            if (
                kind in {"he", "she"}
                and entity.animate
                and not entity.plural
                and noun not in (nouns.FEMALE if kind == "he" else nouns.MALE)
            ):
                return i
            if kind == "it" and not entity.plural and not entity.person:
                return i
        return None

    def settle(self) -> None:
        """Entities with the same head get a label that tells them apart."""
        heads: dict[str, list[int]] = {}
        for i, entity in enumerate(self.entities):
            heads.setdefault(entity.head.lower(), []).append(i)
        for same in heads.values():
            for i in same if len(same) > 1 else ():
                entity = self.entities[i]
                others = {word for k in same if k != i for word in self.entities[k].adjectives}
                own = [word for word in entity.adjectives if word not in others and word.lower() not in lx.NO_QUESTION]
                self.entities[i] = replace(entity, label=own[0] if own else "")
                self.entities[i].ambiguous = not own

    def name(self, i: int) -> str:
        """``the dogs``, ``the red car``, ``the woman's hair``, ``Tokyo``; ``a man`` where nothing tells two men
        apart."""
        entity = self.entities[i]
        if entity.ambiguous:
            return entity.head if entity.plural else f"{article(entity.head)} {entity.head}"
        words = f"{entity.label} {entity.head}".strip()
        if entity.determiner.endswith(("'s", "s'")) and entity.owner is not None:
            return f"{possessive(self.name(entity.owner))} {words}"
        noun = entity.key
        if entity.owner is not None and entity.owner != i and noun in nouns.BODY | nouns.CLOTHES:
            return f"{possessive(self.name(entity.owner))} {words}"
        if entity.head[:1].isupper() and not entity.determiner and not entity.plural and not entity.adjectives:
            return words
        return f"the {words}"

    def written(self, ref: Ref, subjects: list[int], full: bool) -> str:
        """A noun phrase as part of a claim about ``subjects``; ``full`` keeps adjectives and count."""
        phrase = ref.phrase
        if phrase is None or phrase.pronoun:
            return self.name(ref.entity) if ref.entity is not None else phrase.pronoun if phrase else ""
        entity = self.entities[ref.entity] if ref.entity is not None else None
        if entity and entity.label and not full:
            phrase = replace(phrase, adjectives=[entity.label])
            full = True
        elif entity and entity.ambiguous:
            full = True
        if not phrase.determiner and not phrase.adjectives and phrase.last.lower() in nouns.THE:
            phrase = replace(phrase, determiner="the")
        if phrase.determiner in lx.POSSESSIVES:
            owner = entity.owner if entity else None
            if owner is None and phrase.determiner in {"my", "our", "your"} or owner is None:
                phrase = replace(phrase, determiner="the")
            elif owner not in subjects:
                phrase = replace(phrase, determiner=possessive(self.name(owner)))
        return phrase.short(full, full or ref.counted)

    def named(self, words: str) -> str:
        """Pronouns in a clause about the camera -> names."""

        def swap(match: re.Match[str]) -> str:
            low = match[0].lower()
            found = self.resolve(lx.PRONOUNS.get(low, lx.POSSESSIVES.get(low, "")))
            if found is None:
                return low
            return possessive(self.name(found)) if match[1] else self.name(found)

        return re.sub(r"\b(?:him|them|she|he|they|it|(?:his|her|its|their)(?=( \w))|her)\b", swap, words)


def possessive(name: str) -> str:
    return name + ("'" if name.endswith("s") else "'s")
