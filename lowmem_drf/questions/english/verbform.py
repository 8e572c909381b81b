"""Whether a word is a verb here, and in which form."""

from __future__ import annotations

from lowmem_drf.questions.english import lexicon as lx
from lowmem_drf.questions.english import nouns
from lowmem_drf.questions.english.context import Context, nounlike, object_follows
from lowmem_drf.questions.english.verbs import FORMS, INANIMATE, INTRANSITIVE, NOUNY
from lowmem_drf.questions.english.words import adjective, plural

SAME_PAST = {"set", "cut", "split", "spread"}
"""Verbs whose participle looks like their base."""


def verb_form(c: Context, i: int, inside: bool) -> str:
    """``base``, ``s``, ``ing``, ``past``, ``part``; ``ADJ`` for a participle before its noun; empty for no verb.

    inside: a noun phrase has begun and waits for its noun.
    """
    low, before = c.at(i).low, c.at(i - 1)
    forms = FORMS.get(low, {})
    if low.endswith("ing") and low not in nouns.ING_NOUNS and (forms or len(low) > 5) and "-" not in low:
        return _ing(c, i, inside)
    if forms.keys() & {"past", "part"}:
        found = _past(c, i, inside)
        if found or not forms.keys() & {"s", "base"}:
            return found
    determined = before.tag == "ADV" and c.at(i - 2).tag in {"DET", "POSS"}
    if not forms or inside or determined or before.tag in {"PREP", "GEN", "BE", "HAVE"}:
        return ""
    if "base" in forms and before.tag in {"TO", "MODAL", "NOT"}:
        return "base"
    return _finite(c, i, "s" if "s" in forms else "base")


def _finite(c: Context, i: int, form: str) -> str:
    low, before, after = c.at(i).low, c.at(i - 1), c.at(i + 1)
    follows = object_follows(after)
    if before.tag in {"CONJ", "COMMA"} or before.tag == "ADV" and c.at(i - 2).tag in {"CONJ", "COMMA", "PRON"}:
        if before.tag == "COMMA" and after.tag == "" and not follows and low in NOUNY:
            return ""
        if c.finite == form or c.finite in {"BE", "HAVE"} and form == "s":  # "runs and jumps"
            noun = low in NOUNY and after.tag in {"COMMA", "STOP", "CONJ"} or adjective(low) and not follows
            return "" if noun else form
        if c.finite or before.tag == "CONJ":
            return ""
    if before.tag == "COMMA" and follows:  # after an inserted phrase: "The cubs, small and fluffy, stumble"
        first = next((token for token in c.items[:i] if token.tag == "N"), None)
        return form if first is not None and plural(first.low) == (form == "base") and low not in NOUNY else ""
    number, numbers = c.subject_plural(i), c.numbers(i)
    if number is None and before.tag not in {"N", "REL"} and not c.waiting:
        return ""
    if c.finite and not c.new_clause(i) and not c.cause:
        if not c.waiting:
            return ""
        c.waiting = False
    if low in nouns.MASS:
        return ""
    if form == "base":
        caused = c.cause and before.tag == "N" and bool(c.finite)
        plain = (True in numbers or number is None and plural(before.low)) and not (
            adjective(low) and not follows and after.tag == ""
        )
        return "base" if caused or plain else ""
    if False not in numbers and number is not None:
        return ""
    group = number is None and (follows or after.tag == "COMMA")  # "a flock of gulls flies over"
    unclear = number is None or not c.clear_subject(i) or c.verb_follows(i)
    return "" if low in NOUNY and not group and unclear else "s"


def _ing(c: Context, i: int, inside: bool) -> str:
    before, after = c.at(i - 1), c.at(i + 1)
    verb_next = (
        FORMS.get(after.low, {}).keys() & {"s", "past"} and after.low not in NOUNY and c.subject_plural(i) is False
    )
    noun_next = nounlike(after) and after.low not in lx.PARTICLES and not verb_next
    if inside or before.tag == "GEN":
        return "ADJ" if noun_next else ""
    if before.tag == "PREP":
        if noun_next and before.low not in {"by", "without", "for"} and c.at(i + 2).low != "the":
            return "ADJ"  # "over rolling hills"
        return "ing" if before.low in {"by", "without", "while", "of", "for", "from"} else ""
    if (
        noun_next
        and before.tag in {"COMMA", "CONJ"}
        and FORMS.get(c.at(i).low, {}).get("ing") in INTRANSITIVE | INANIMATE
    ):
        return "ADJ"  # ", flickering lights"
    if noun_next and before.tag == "START":
        return "ADJ" if plural(after.low) else "ing"  # "running horses", "riding a horse"
    if noun_next and before.tag == "ADV" and c.at(i - 2).tag in {"DET", "POSS"}:
        return "ADJ"
    return "ing"


def _past(c: Context, i: int, inside: bool) -> str:
    low, before, after = c.at(i).low, c.at(i - 1), c.at(i + 1)
    forms = FORMS[low]
    participle = "part" if "part" in forms else ""
    noun_next = nounlike(after)
    if inside and "base" not in forms or before.tag == "GEN":
        return "ADJ" if noun_next or after.tag in {"CONJ", "COMMA"} else ""
    if inside:
        return ""
    if before.tag in {"BE", "HAVE"} or before.tag == "ADV" and c.at(i - 2).tag in {"BE", "HAVE"}:
        return participle
    if "base" in forms:
        agent = after.low in {"by", "in", "with", "on", "against", "into"} and c.finite
        if not agent and not (low in SAME_PAST and after.tag == "PREP" and c.subject_plural(i) is False):
            return ""
    if before.tag == "PREP" or noun_next and (before.tag == "START" or before.tag == "V" and not object_follows(after)):
        return "ADJ" if noun_next else ""  # "with fallen leaves", "pours steamed milk"
    if "past" in forms and before.tag in {"N", "PRON", "REL", "ADV", "CONJ"}:
        goes_on = c.finite == "past" and before.tag == "CONJ"
        takes_object = after.tag in {"DET", "POSS", "PRON", "NUM", "QUANT"}
        active = (takes_object or forms["past"] in INTRANSITIVE) and (not c.finite or c.new_clause(i))
        if goes_on or active or before.tag == "PRON":
            return "past"
    if before.tag in {"CONJ", "COMMA"} and noun_next and not object_follows(after):
        return "ADJ"
    return participle
