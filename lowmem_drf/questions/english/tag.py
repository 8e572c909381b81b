"""Words -> parts of speech, by word lists and by what stands to the left and right."""

from __future__ import annotations

from lowmem_drf.questions.english import lexicon as lx
from lowmem_drf.questions.english import nouns
from lowmem_drf.questions.english.context import Context, nounlike
from lowmem_drf.questions.english.verbform import verb_form
from lowmem_drf.questions.english.verbs import FORMS, NOUNY
from lowmem_drf.questions.english.words import Token, adjective, comparative, plural

OPENERS = {"DET", "POSS", "NUM", "QUANT", "ADJ"}
"""After these a noun phrase waits for its noun."""
CLOSED = (
    ("END", frozenset(".!?;")),
    ("COMMA", frozenset(",:()—–-")),
    ("NOT", frozenset({"not", "never", "n't"})),
    ("BE", lx.BE),
    ("HAVE", lx.HAVE),
    ("MODAL", lx.MODALS),
    ("CONJ", lx.CONJUNCTIONS),
    ("SUB", lx.SUBORDINATORS),
    ("REL", lx.RELATIVES),
    ("PRON", lx.PRONOUNS.keys() - {"her"}),
    ("POSS", lx.POSSESSIVES.keys()),
    ("DET", lx.DETERMINERS),
    ("QUANT", lx.QUANTIFIERS),
    ("NUM", lx.NUMBERS.keys() - lx.ALONE),
    ("THERE", frozenset({"there"})),
    ("TO", frozenset({"to"})),
)
"""Tags of words that need no context; the first that holds the word wins."""


def tagged(items: list[Token]) -> list[list[Token]]:
    """Tokens of a text -> sentences of tagged tokens (without the full stops)."""
    sentences: list[list[Token]] = [[]]
    for token in items:
        token.tag = token.tag or _closed_class(token.low)
        if token.tag == "END":
            sentences.append([])
        else:
            sentences[-1].append(token)
    for sentence in sentences:
        context = Context(sentence)
        for i, token in enumerate(sentence):
            token.tag = _resolved(context, i) if token.tag else _open_class(context, i)
            context.seen(i)
    return [sentence for sentence in sentences if sentence]


def _closed_class(low: str) -> str:
    if low.startswith("\x01"):
        return "QUOTE"
    if low.isdigit():
        return "NUM"
    return next((tag for tag, words in CLOSED if low in words), "")


def _resolved(c: Context, i: int) -> str:
    """``to``, ``one``, ``that`` and ``her`` have two tags."""
    token, before, after = c.at(i), c.at(i - 1), c.at(i + 1)
    if token.tag == "TO":
        return "TO" if "base" in FORMS.get(after.low, {}) and not after.tag else "PREP"
    if token.low == "one" and before.tag in {"ADJ", "DET"}:
        return "N"  # "the last one"
    if token.low in {"that", "who", "which"}:
        return (
            "REL" if token.low != "that" or before.tag in {"N", "COMMA", "ADV", "PREP"} and after.tag != "N" else "DET"
        )
    if token.low == "her" and (
        after.tag in {"PREP", "COMMA", "STOP", "CONJ", "SUB", "ADV"} or after.low in lx.PREPOSITIONS
    ):
        return "PRON"
    return token.tag


def _open_class(c: Context, i: int) -> str:
    token, before, after = c.at(i), c.at(i - 1), c.at(i + 1)
    low, forms = token.low, FORMS.get(token.low, {})
    listed = before.tag == "CONJ" and c.at(i - 2).tag == "ADJ" and adjective(low)
    inside = before.tag in OPENERS and not c.predicate(i) or listed
    if low == "round" and after.tag not in {"DET", "POSS"}:
        return "ADJ"
    if low in lx.PREPOSITIONS and not (inside and low in {"past", "opposite", "inside", "round", "like", "outside"}):
        return _preposition(low, after)
    if low in {"get", "gets", "got"}:
        token.form, token.base = {"get": "base", "gets": "s", "got": "past"}[low], "get"
        return "V"
    if token.name and (after.name or before.name or not forms and not adjective(low)):
        return "N"
    form = "" if token.name and inside else verb_form(c, i, inside)
    if form == "ADJ":
        return "ADJ"
    if form:
        token.form, token.base = form, forms.get(form) or low[:-3]
        return "V"
    if (low in lx.ADVERBS or low in lx.PARTICLES) and not inside:
        return "ADV"
    if low.endswith("ly") and (low not in lx.NOT_ADVERBS or before.tag == "V") and len(low) > 4:
        return "ADV"
    # "pine forest", "mint leaves": no material, no colour
    grown = after.low in nouns.PLACES or after.low in nouns.NATURAL
    if low in lx.PLANT_COLORS and grown:
        return "N"
    if adjective(low):
        return _adjective_or_noun(c, i)
    if low in lx.ALONE or low in nouns.MATERIALS and nounlike(after) and not grown:
        return "ADJ"
    if before.tag == "N" and not token.name and not c.finite:
        return _unknown_verb(c, i)
    return "N"


def _preposition(low: str, after: Token) -> str:
    """``looks up`` has no noun behind ``up``."""
    adverbial = (
        after.tag in {"COMMA", "STOP", "PREP", "CONJ", "SUB", "ADV"}
        or after.low in lx.PREPOSITIONS
        and after.low != "of"
    )
    if low in lx.PARTICLES and adverbial:
        return "ADV"
    return "SUB" if low == "as" else "PREP"


def _adjective_or_noun(c: Context, i: int) -> str:
    """``an orange`` is a noun, ``an orange cat`` is not."""
    low, before, after = c.at(i).low, c.at(i - 1), c.at(i + 1)
    second = adjective(c.at(i + 2).low)
    if before.tag == "N" and (low in lx.ALSO_NOUNS or comparative(low)):
        return "N"
    if (
        after.low
        and after.tag in {"", "N", "NUM"}
        and after.low not in lx.PREPOSITIONS
        or after.tag == "CONJ"
        and second
    ):
        verb_next = "s" in FORMS.get(after.low, {}) and after.low not in NOUNY
        return "N" if verb_next and before.tag in {"DET", "POSS", "ADJ"} and low in lx.ALSO_NOUNS else "ADJ"
    if after.tag == "COMMA" and second and before.tag in {"DET", "ADJ", "POSS"}:
        return "ADJ"
    inside = (
        before.tag in {"DET", "POSS", "NUM", "QUANT"}
        or before.tag == "ADJ"
        and c.at(i - 2).tag in {"DET", "POSS", "NUM", "PREP"}
    )
    return "N" if inside or before.tag == "PREP" and low in lx.COLORS | lx.ALSO_NOUNS else "ADJ"


def _unknown_verb(c: Context, i: int) -> str:
    """Two nouns do not stand before ``the``, and no plural behind ``a``: in "a tailor hems the skirt" the second one is
    a verb that no list has."""
    token, after = c.at(i), c.at(i + 1)
    low, many = token.low, c.subject_plural(i)
    object_next = after.tag in {"DET", "POSS"}
    third = low.endswith("s") and not low.endswith("ss")
    if third and (many is not True and object_next or c.singular(i)):
        token.form, token.base = "s", _stem(low)
    elif (
        many is True
        and not third
        and plural(c.at(i - 1).low)
        and (object_next or after.low in lx.PREPOSITIONS - {"of"} or after.low in lx.ADVERBS)
    ):
        token.form, token.base = "base", low
    return "V" if token.form else "N"


def _stem(low: str) -> str:
    """The base of an unknown verb in -s."""
    if low.endswith("ies"):
        return low[:-3] + "y"
    return low[:-2] if low.endswith(("ches", "shes", "sses", "xes", "zes", "oes")) else low[:-1]
