"""Tagged words -> noun phrases: determiner, count, adjectives, head, and what follows ``of``."""

from __future__ import annotations

from dataclasses import dataclass, field

from lowmem_drf.questions.english import lexicon as lx
from lowmem_drf.questions.english import nouns
from lowmem_drf.questions.english.verbs import FORMS
from lowmem_drf.questions.english.words import Token, plural

STARTS = {"DET", "POSS", "NUM", "QUANT", "ADJ", "N", "PRON"}
CARDINALS = {value: word for word, value in lx.NUMBERS.items() if word not in {"single", "lone", "solitary"}}


@dataclass(slots=True)
class NounPhrase:
    determiner: str = ""
    count: int | None = None
    quantity: str = ""
    adjectives: list[str] = field(default_factory=list)
    nouns: list[str] = field(default_factory=list)
    pronoun: str = ""
    possessor: NounPhrase | None = None
    """``the woman`` in "the woman's hat"."""
    of: NounPhrase | None = None
    also: NounPhrase | None = None
    """``red poppies`` and its ``also``, ``yellow daisies``, after one ``of``."""

    @property
    def last(self) -> str:
        return self.nouns[-1] if self.nouns else ""

    @property
    def key(self) -> str:
        """The head noun in lower case, for the word lists."""
        return self.last.lower().rsplit(" ", 1)[-1]

    @property
    def plural(self) -> bool:
        if self.count is not None:
            return self.count != 1
        if self.determiner in {"a", "an", "this", "that", "each", "every", "another"}:
            return False
        return bool(self.quantity) or self.determiner in {"these", "those", "all", "both"} or plural(self.last)

    def head(self) -> str:
        """The noun with what belongs to it: ``cup of coffee``, ``statue of a lion``."""
        return " ".join(self.nouns) + (f" of {self.of.short()}" if self.of else "")

    def short(self, adjectives: bool = False, count: bool = False) -> str:
        """With its own determiner, and without adjectives and count unless they are wanted."""
        noun = f"{' '.join(self.nouns)} of {self.of.short(True, True)}" if adjectives and self.of else self.head()
        text = " ".join([*(self.adjectives if adjectives else ()), noun])
        if self.also:
            text += f" and {self.also.short(adjectives, count)}"
        if (count or self.count == 1 and not self.determiner) and self.quantity:
            return f"{self.determiner + ' ' if self.determiner not in {'', 'a', 'an'} else ''}{self.quantity} {text}".strip()
        if self.determiner in {"a", "an"}:
            return f"{article(text)} {text}"
        if self.determiner in {
            "each",
            "every",
            "another",
            "some",
            "any",
            "all",
            "both",
            "no",
            "this",
            "that",
            "these",
            "those",
        }:
            return text if self.determiner in {"some", "any"} else f"{self.determiner} {text}"
        return f"{self.determiner} {text}" if self.determiner else text


def article(text: str) -> str:
    """``an`` before a vowel that is heard."""
    word = text.lower()
    first = text.split(" ", 1)[0]
    if len(first) > 1 and first.isupper() and first.isalpha() and first not in {"UFO", "UK", "US"}:  # spelt out: an SUV
        return "an" if first[0] in "AEFHILMNORSX" else "a"
    if word.startswith(("hour", "honest", "heir", "8", "11-", "18", "x-ray", "mri", "fpv", "h-")):
        return "an"
    if word.startswith(
        ("uni", "use", "usu", "euro", "one-", "once", "ufo", "uto", "ura", "ewe", "ukulele", "u-")
    ) and not word.startswith(("unin", "unim", "unid")):
        return "a"
    return "an" if word[:1] in "aeiou" else "a"


def noun_phrase(items: list[Token], i: int) -> tuple[NounPhrase | list[str], int]:
    """Reads one phrase that starts at ``i``. Adjectives without a noun come back as a list of texts.

    Returns:
        the phrase (or its adjectives) and the index behind it
    """
    phrase = NounPhrase()
    if items[i].tag == "PRON":
        phrase.pronoun = items[i].low
        return phrase, i + 1
    i = _opening(items, i, phrase)
    i = _middle(items, i, phrase)
    _used_for(phrase)
    if i < len(items) and items[i].tag == "GEN" and phrase.nouns:
        phrase = NounPhrase(determiner=phrase.short() + items[i].low, possessor=phrase)
        i = _middle(items, _opening(items, i + 1, phrase), phrase)
    if not phrase.nouns:
        partitive = i + 1 < len(items) and items[i].low == "of" and items[i + 1].tag in {"PRON", "DET", "POSS"}
        if phrase.count == 1 and not phrase.adjectives or partitive and (phrase.determiner or phrase.quantity):
            phrase.nouns = ["one"]  # "one sinks", "some of them fall"
        elif phrase.adjectives or not phrase.determiner:
            return phrase.adjectives, max(i, 1)
    if i + 1 < len(items) and items[i].low == "of" and items[i + 1].tag in STARTS:
        inner, end = noun_phrase(items, i + 1)
        if isinstance(inner, NounPhrase) and (inner.nouns or inner.pronoun):
            if (
                inner.key
                and phrase.key not in nouns.GROUPS
                and not inner.determiner
                and end + 1 < len(items)
                and items[end].low == "and"
                and items[end + 1].tag in {"ADJ", "N", "NUM"}
            ):
                second, behind = noun_phrase(items, end + 1)
                if (
                    isinstance(second, NounPhrase)
                    and second.nouns
                    and not second.of
                    and (
                        behind == len(items)
                        or items[behind].tag not in {"BE", "HAVE"}
                        and items[behind].form not in {"s", "base", "past"}
                    )
                ):
                    inner.also, end = second, behind
            return _with_of(phrase, inner), end
    return phrase, i


def _used_for(phrase: NounPhrase) -> None:
    """``a welding torch`` is a kind of torch, ``a spinning top`` is a top that spins."""
    last = phrase.adjectives[-1].lower() if phrase.adjectives and phrase.nouns else ""
    base = FORMS.get(last, {}).get("ing", "")
    if base and base not in nouns.MOVING and phrase.key not in nouns.PERSON | nouns.ANIMALS:
        phrase.nouns.insert(0, phrase.adjectives.pop())


def _opening(items: list[Token], i: int, phrase: NounPhrase) -> int:
    while i < len(items) and items[i].tag in {"DET", "POSS", "NUM", "QUANT"}:
        token = items[i]
        if token.tag in {"DET", "POSS"}:
            phrase.determiner = phrase.determiner or token.low
        elif token.tag == "NUM":
            phrase.count = lx.NUMBERS.get(token.low) or (
                int(token.low) if token.low.isdigit() and len(token.low) < 7 else None
            )
            phrase.quantity = token.low
        else:
            phrase.quantity = f"{phrase.determiner} {token.low}" if phrase.determiner == "a" else token.low
            phrase.determiner = "" if phrase.determiner == "a" else phrase.determiner
        i += 1
    return i


def _middle(items: list[Token], i: int, phrase: NounPhrase) -> int:
    """Adjectives (``bright red``, ``black and white``, ``large, fluffy``) and nouns."""
    join = ""
    while i < len(items):
        token, after = items[i], items[i + 1] if i + 1 < len(items) else Token("", "", "STOP")
        if token.tag == "ADJ" and not phrase.nouns:
            if token.low in {"single", "lone", "solitary"} and phrase.count is None:
                phrase.count, phrase.quantity = 1, "one"
            elif join or phrase.adjectives and _one_color(phrase.adjectives[-1], token.low, items[i - 1]):
                phrase.adjectives[-1] += f"{join or ' '}{token.text}"
            else:
                phrase.adjectives.append(token.text)
            join = ""
        elif (
            token.tag == "ADV"
            and after.tag == "ADJ"
            and not phrase.nouns
            and (phrase.determiner or phrase.quantity or phrase.adjectives)
        ):
            if token.low.endswith("ly"):
                phrase.adjectives.append(token.low)
                join = " "
        elif (
            token.tag == "COMMA"
            and token.low == ","
            and after.tag == "ADJ"
            and phrase.adjectives
            and not phrase.nouns
            and _noun_ahead(items, i + 1)
        ):
            pass
        elif token.low in {"and", "&", "or"} and after.tag == "ADJ" and phrase.adjectives and not phrase.nouns:
            same = after.low in lx.COLORS or _noun_ahead(items, i + 1) or not phrase.determiner
            if not same:
                break
            colors = phrase.adjectives[-1].split()[-1].lower() in lx.COLORS and after.low in lx.COLORS
            join = " and " if colors else ""
        elif (
            token.tag == "COMMA"
            and token.low == ","
            and phrase.adjectives
            and not phrase.nouns
            and after.low == "and"
            and i + 2 < len(items)
            and items[i + 2].tag == "ADJ"
            and _noun_ahead(items, i + 2)
        ):
            pass
        elif token.tag == "N" or token.tag == "NUM" and (phrase.nouns or token.low == "one"):
            phrase.nouns.append(token.text)
        else:
            break
        i += 1
    return i


def _noun_ahead(items: list[Token], i: int) -> bool:
    while i < len(items) and (items[i].tag in {"ADJ", "ADV"} or items[i].low in {",", "and"}):
        i += 1
    return i < len(items) and items[i].tag == "N"


def _one_color(before: str, low: str, previous: Token) -> bool:
    """``pale pink``, ``bright red``, ``golden brown``."""
    word = before.split()[-1].lower()
    return (
        low in lx.COLORS
        and previous.tag == "ADJ"
        and (word in lx.SHADES or word in lx.COLORS)
        and low not in nouns.MATERIALS
    )


def _with_of(outer: NounPhrase, inner: NounPhrase) -> NounPhrase:
    """``a flock of birds`` counts birds; ``a cup of coffee`` is a cup."""
    if outer.key in nouns.GROUPS and inner.nouns and not inner.possessor:
        exact = (
            {"pair": 2, "couple": 2, "trio": 3, "dozen": 12}.get(outer.key)
            if outer.determiner in {"a", "an"} and inner.key not in nouns.PLURAL_ONLY
            else None
        )
        inner.count = exact
        words = f"{outer.determiner if outer.determiner in {'a', 'an'} else ''} {outer.quantity} {' '.join([*outer.adjectives, *outer.nouns])}".strip()
        inner.quantity = CARDINALS[exact] if exact and exact < 13 else " ".join(f"{words} of".split())
        if outer.key == "trio":
            inner.quantity = "three"
        return inner
    outer.of = inner
    return outer
