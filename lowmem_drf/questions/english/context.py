"""What stands around a word while a sentence is tagged from left to right."""

from __future__ import annotations

from lowmem_drf.questions.english import lexicon as lx
from lowmem_drf.questions.english import nouns
from lowmem_drf.questions.english.verbs import CAUSATIVE, FORMS
from lowmem_drf.questions.english.words import Token, plural

BOUNDARY = {"CONJ", "COMMA", "SUB", "REL"}
FINITE = {"s", "base", "past"}


def object_follows(after: Token) -> bool:
    """What stands here may follow a verb: an object with its determiner, a phrase, the end."""
    opens = after.tag in {"DET", "POSS", "PRON", "NUM", "QUANT", "ADV", "STOP", "PREP"}
    return opens or after.low in lx.PREPOSITIONS or after.low in lx.ADVERBS


def nounlike(token: Token) -> bool:
    """The word may be a noun (or an adjective before one): it is not tagged otherwise and is no small word."""
    if token.tag:
        return token.tag == "N"
    low = token.low
    manner = low.endswith("ly") and low not in lx.NOT_ADVERBS
    return bool(low) and low not in lx.PREPOSITIONS and low not in lx.ADVERBS and not manner


class Context:
    """A sentence whose words before the current one are tagged."""

    def __init__(self, items: list[Token]) -> None:
        self.items = items
        self.finite = ""
        """The form of the clause's verb once it has one: ``s``, ``base``, ``past``, or the tag of its helper."""
        self.cause = False
        """It is one like ``makes``, which takes another verb."""
        self.waiting = False
        """A relative clause has begun before the main clause had its verb."""

    def at(self, i: int) -> Token:
        """The word at ``i``; an empty one tagged START or STOP beyond the edges."""
        if i < 0:
            return Token("", "", "START")
        return self.items[i] if i < len(self.items) else Token("", "", "STOP")

    def seen(self, i: int) -> None:
        """The word at ``i`` has its tag: what it changes for those behind."""
        token = self.items[i]
        if token.tag == "REL":
            self.waiting = self.waiting or not self.finite
        if token.tag in {"SUB", "REL"}:
            self.finite = ""
        elif token.tag in {"BE", "HAVE", "MODAL"} and token.low not in {"being", "been", "having"}:
            self.finite = token.tag
        elif token.tag == "V" and token.form in FINITE and self.at(i - 1).tag != "TO":
            self.finite, self.cause = token.form, token.base in CAUSATIVE

    def predicate(self, i: int) -> bool:
        """The adjectives before ``i`` belong to ``is``, not to a noun that would follow."""
        j = i - 1
        while j > 0 and self.items[j].tag in {"ADJ", "ADV", "NOT", "CONJ"}:
            j -= 1
        return self.items[i - 1].tag == "ADJ" and self.items[j].tag == "BE"

    def numbers(self, i: int) -> set[bool | None]:
        """Whether plural, of all noun phrases from the clause's start to ``i``: the verb may belong to the last or to
        an earlier one (``a glass of lemonade with two slices of lemon stands``)."""
        found = {self.subject_plural(i)}
        for j in range(i - 1, -1, -1):
            token = self.items[j]
            edge = token.tag in {"SUB", "COMMA"} or token.tag == "REL" and not self.waiting
            if edge or token.tag == "V" and token.form in FINITE:
                break
            if token.tag in {"PREP", "V", "REL"} and j:
                found.add(self.subject_plural(j))
        return found

    def subject_plural(self, i: int) -> bool | None:
        """Whether the noun phrase that ends before ``i`` is plural; ``None`` if nothing tells."""
        j = i - 1
        while j >= 0 and self.items[j].tag in {"ADV", "NOT"}:
            j -= 1
        if j < 0 or self.items[j].tag not in {"N", "PRON", "REL", "ADJ", "QUOTE", "NUM"}:
            return None
        if self.items[j].tag == "PRON":
            return self.items[j].low in {"they", "them"}
        if self.items[j].tag == "REL":
            j -= 1
            while j > 0 and self.items[j].tag == "COMMA":
                j -= 1
        noun, k = self.items[j].low, j
        while k > 0 and self.items[k - 1].tag in {"N", "ADJ"}:
            k -= 1
        opener, second = self.at(k - 1), self.at(k - 2)
        if opener.low == "of" and k > 1:
            return None if second.low in nouns.GROUPS else plural(second.low)
        one = opener.low in {"one", "1"}
        joined = not self.finite and (opener.tag == "CONJ" or opener.tag in {"DET", "POSS"} and second.tag == "CONJ")
        if opener.tag == "NUM" and not one or opener.tag == "QUANT" or joined:
            return True
        if one or opener.low in {"a", "an", "this", "each", "every", "another"}:
            return False
        if noun in nouns.COLLECTIVE:
            return None
        return plural(noun) or (None if noun in nouns.INVARIANT else False)

    def singular(self, i: int) -> bool:
        """The noun phrase before ``i`` opens with ``a``."""
        j = i - 1
        while j > 0 and self.items[j].tag in {"N", "ADJ"}:
            j -= 1
        return self.at(j).low in {"a", "an"} and self.items[i - 1].tag == "N"

    def new_clause(self, i: int) -> bool:
        """Since the last verb came an ``and``, a comma or a subordinator."""
        j = i - 1
        while j >= 0 and self.items[j].tag not in BOUNDARY | {"V", "BE", "HAVE", "MODAL"}:
            j -= 1
        return j >= 0 and self.items[j].tag in BOUNDARY

    def clear_subject(self, i: int) -> bool:
        """The noun before ``i`` is a head: a/an/one/he… before it, or somebody."""
        j = i - 1
        while j > 0 and self.items[j].tag == "ADV":
            j -= 1
        low = self.items[j].low
        somebody = low.endswith(("er", "or", "ist", "man", "ian")) and low not in nouns.NOT_A_PERSON
        if (
            somebody
            or self.items[j].tag in {"PRON", "REL"}
            or low in nouns.PERSON | nouns.ANIMALS | nouns.MASS | nouns.SKY
        ):
            return True
        while j > 0 and self.items[j - 1].tag in {"N", "ADJ"}:
            j -= 1
        return self.at(j - 1).low in {"a", "an", "one", "this", "each"}

    def verb_follows(self, i: int) -> bool:
        """The next word is a verb of a plural subject: this word is its noun (``ocean waves crash``)."""
        after = self.at(i + 1)
        forms = FORMS.get(after.low, {})
        return (
            after.tag == "BE"
            or "base" in forms
            and after.tag == ""
            and after.low not in lx.PREPOSITIONS
            or "ing" in forms
        )
