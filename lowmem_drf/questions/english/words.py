"""Text -> words: capitals settled, compounds joined; which words are plural, which are adjectives."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lowmem_drf.questions.english import lexicon as lx
from lowmem_drf.questions.english import nouns
from lowmem_drf.questions.english.verbs import FORMS

WORD = re.compile(r"\u0001\d+|[^\W_]+(?:[-/.'&][^\W_]+)*(?:'(?![^\W_]))?|[.,;:!?()—–&-]")

CONTRACTED = {"it's", "that's", "there's", "he's", "she's"}
UNNAMED = (
    lx.DETERMINERS | lx.PREPOSITIONS | lx.NUMBERS.keys() | lx.QUANTIFIERS | lx.ADJECTIVES | nouns.PERSON | nouns.ANIMALS
)
"""Words that begin a sentence before a name without being part of it."""
HYPHENATED = ("ed", "old", "shaped", "sized", "like", "free", "year", "story", "storey", "air", "lit", "foot")


@dataclass(slots=True)
class Token:
    text: str
    """As it is to be written in a question: names keep their capital, a sentence's first word does not."""
    low: str
    tag: str = ""
    """DET POSS NUM QUANT ADJ N GEN ADV PRON BE HAVE MODAL TO PREP CONJ SUB REL THERE NOT COMMA END QUOTE, or V for
    verbs."""
    name: bool = False
    """Written with a capital inside a sentence, or the first of several such words."""
    form: str = ""
    """V: ``base``, ``s``, ``ing``, ``past`` or ``part``."""
    base: str = ""


def plural(noun: str) -> bool:
    """``dogs``, ``people`` -> True; ``grass``, ``bus`` -> False."""
    word = re.split(r"[ -]", noun.lower())[-1]
    if word in nouns.IRREGULAR_PLURALS or word in nouns.PLURAL_ONLY:
        return True
    return (
        word.endswith("s")
        and not word.endswith(("ss", "us", "is", "'s"))
        and word not in nouns.SINGULAR_S
        and len(word) > 2
    )


def tokens(text: str) -> list[Token]:
    """Words and punctuation, compounds joined, capitals settled. Quoted text arrives as ``\\x01`` and a number."""
    raw = WORD.findall(text)
    words = [word for word in raw if word[0].isalpha()]
    capital = sum(word[0].isupper() for word in words)
    loud = (
        len(words) > 1
        and len(text) > 4
        and all(word.isupper() for word in words)
        or len(words) > 3
        and capital > 0.7 * len(words)
    )
    pairs = zip(raw, raw[1:], strict=False)
    names = set() if loud else {word.lower() for before, word in pairs if word[0].isupper() and before not in ".!?:;"}
    out: list[Token] = []
    for i, word in enumerate(raw):
        low = word.lower()
        first = i == 0 or raw[i - 1] in ".!?"
        if low in CONTRACTED:
            out += [Token(low[:-2], low[:-2]), Token("is", "is")]
            continue
        mark = "'s" if low.endswith("'s") else "'" if low.endswith("'") and len(low) > 2 else ""
        followed = not mark and i + 1 < len(raw) and raw[i + 1][0].isupper()
        out.append(
            _word(word.removesuffix(word[len(word) - len(mark) :]) if mark else word, names, loud, first, followed)
        )
        if mark:
            out.append(Token(mark, mark, "GEN"))
    return _join(out)


def _word(word: str, names: set[str], loud: bool, first: bool, capital_next: bool) -> Token:
    """loud: all capitals or title case tell nothing; first: of its sentence; names: written with a capital
    elsewhere."""
    low = word.lower()
    if loud:
        return Token(low.capitalize() if low in lx.PROPER else low, low)
    verb = low in FORMS and low not in nouns.MATERIALS
    if first and word[0].isupper() and capital_next and low not in UNNAMED and not verb:  # "Iron Man"
        return Token(word, low, name=True)
    acronym = word.isupper() and len(word) > 1
    if first and low not in names and low not in lx.PROPER and not acronym:
        return Token(low if word[:1].isalpha() and word[1:].islower() or len(word) == 1 else word, low)
    return Token(
        word.capitalize() if low in lx.PROPER and word.islower() else word, low, name=word[0].isupper() and not first
    )


def _join(items: list[Token]) -> list[Token]:
    out: list[Token] = []
    i = 0
    while i < len(items):
        for n in (5, 4, 3, 2):
            key = "_".join(t.low for t in items[i : i + n])
            if i + n <= len(items) and (
                key in lx.PREPOSITIONS or key in nouns.COMPOUNDS or key in lx.ADVERBS or key in nouns.CLOTHES
            ):
                tag = "PREP" if key in lx.PREPOSITIONS else "ADV" if key in lx.ADVERBS else "N"
                out.append(Token(" ".join(t.text for t in items[i : i + n]), key.replace("_", " "), tag))
                i += n
                break
        else:
            out.append(items[i])
            i += 1
    return out


def comparative(low: str) -> bool:
    """``smaller``, ``biggest``: compares, so nobody can say yes or no to it alone."""
    stem = low.removesuffix("er") if low.endswith("er") else low.removesuffix("est")
    if stem == low or len(stem) < 3:
        return False
    bases = {stem, stem + "e"}
    if stem[-1] == stem[-2]:
        bases.add(stem[:-1])
    if stem[-1] == "i":
        bases.add(stem[:-1] + "y")
    return bool(bases & lx.ADJECTIVES)


def adjective(low: str) -> bool:
    """By the list, else by its ending."""
    if low in lx.ADJECTIVES or comparative(low):
        return True
    if low in lx.NOT_ADJECTIVES or "base" in FORMS.get(low, {}):
        return False
    if "-" in low:
        last = low.rsplit("-", 1)[1]
        return last.endswith(HYPHENATED) or last in lx.ADJECTIVES or "ing" in FORMS.get(last, {})
    participle = low.endswith("ed") and len(low) > 4 and low not in FORMS and low not in nouns.ED_NOUNS
    return participle or len(low) > 5 and low.endswith(lx.ADJECTIVE_ENDINGS)
