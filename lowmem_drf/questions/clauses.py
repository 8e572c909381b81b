"""Cuts a prompt in any language into clauses, without markup and quality words.

There is no parser: the text is only cut. If a cut could leave half a phrase ("a tall" of "a tall, dark stranger") or
lose a negation ("people" of "without cars or people"), the pieces stay together: a long clause is still true.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

LONGEST = 40
"""Words of a shortened prompt or a reference answer, at most."""
UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
"""Thai, Japanese, Chinese and Korean characters. Two of them count as a word."""
WORD = re.compile(rf"[{UNSPACED}]{{1,2}}|[^\s{UNSPACED}]+")


def either(words: str) -> str:
    """A pattern for one of the space-separated words. "_" stands for a space, "_" or "-"; "$" for the end of a word."""
    return "|".join(words.split()).replace("_", "[ _-]").replace("$", r"\b")


NEGATION = re.compile(
    r"\b(?:no|not|without|never|none|nobody|nothing|neither|nor|cannot|kein\w*|nicht|ohne|nie|sans|pas|jamais|aucune?|ni|"
    r"sin|nunca|senza|non|sem|não|без|не|нет)\b|n['’]t\b|[没不无未沒無]|ない|なし|なく|ません|ずに",
    re.IGNORECASE,
)
DETERMINERS = frozenset(
    either(
        """
        a an the his her its their my our your this that these those some one two three four five six seven
        eight nine ten several many another he she it they there ein eine einen einem einer der die das den dem
        sein seine ihr ihre zwei drei un une le la les des deux trois son sa ses il elle una unos unas el los
        las su sus dos tres uno gli lo i due um uma os as dois
        """
    ).split("|")
)
"""Words that can open a new subject. English first; then German, French, Spanish, Italian, Portuguese."""

_MARKUP = re.compile(
    r"<[^<>\s:]+:[^<>]*>"  # <lora:name:0.8>
    r"|(?<!\S)--[a-z]+(?:\s+[\d.:]+)?"  # --ar 16:9
    r"|\[[\d\s.:s–-]+\]"  # [0-2s]
    r"|\*\*|\\(?=[()\[\]])|(?is:\bnegative prompt:.*)"
    r"|(?m:^\s*(?:[-*•#]+|\d+[.)])\s+)"  # marks of a list
)
_WEIGHT = re.compile(r"(?<=\D):\d*\.?\d+(?=\s*[)\]])")
"""The weight in ``(word:1.2)``."""
_DEGREE = either("very ultra highly extremely super hyper insanely intricate fine absurdly")
_QUALITY_WORDS = either(
    r"""
    masterpiece (?:best|high|highest|top|amazing|great|good|premium|excellent|ultra)_quality detail(?:s|ed)?
    aesthetic (?:full_?)?[uf]?hdr? \d{1,2}k(?:_uhd|_hdr|_resolution)? (?:1080|720|2160)p hires highres
    absurdres octane_render newest (?:high|highest)_?resolution award_winning(?:_photo\w*)? trending_on_\w+
    artstation raw_photo score_\d\w* rating_\w+ unreal_engine(?:_5)? 杰作 傑作
    (?:最佳|最高|高)(?:质量|品质|画质|品質|画質) 超?高?清 meisterwerk (?:beste|hohe)_qualität chef-d'œuvre
    (?:meilleure|haute)_qualité obra_maestra (?:mejor|alta)_calidad
    """
)
_QUALITY = re.compile(rf"(?:an? )?(?:(?:(?:{_DEGREE})[- ]?)?(?:{_QUALITY_WORDS})[ ,]*)+", re.IGNORECASE)
_QUOTED = re.compile(r'"[^"\n]{1,200}"|“[^”\n]{1,200}”|«[^»\n]{1,200}»|「[^」\n]{1,200}」|『[^』\n]{1,200}』')
_OPENERS = either("and_then und_dann et_puis y_luego e_poi während wobei puis tandis_que pendant_que mientras mentre")
_SEPARATOR = re.compile(
    r"(?<!\b[A-Z\d])(?<!\b(?:Mr|Dr|St|vs))(?<!\b(?:Mrs|e\.g|i\.e|z\.B))[.!?…]+(?=\s|$)"
    r"|(?-i:(?<=[a-z]{2})\.(?=[A-Z]))|[。！？]+|\n+|[;；؛]|(?<!\d),|,(?!\d)|[，،]|:(?=\s)|：|\s[–—-]+\s|—|\s*\|\s*"
    r"|(?<!\ba)(?<!\bfor)\s+(?=while\s)|(?<!\ball)(?<!\bnothing)\s+(?=but\s)|\s+(?=as (?:he|she|it|they)\s)"
    r"|(?<!\bsince)(?<!\bby)(?<!\band)\s+(?=then\s)|(?<!\beven)\s+(?=(?:until|when|whereas)\s)"
    rf"|\s+(?=(?:{_OPENERS})\s)|(?=然后|接着|随后|同时|与此同时)",
    re.IGNORECASE,
)
_JAPANESE = re.compile(r"[\u3040-\u30ff]")
_AND = re.compile(r"\s+(?=(?:and|und|et|y|e|и)\s)", re.IGNORECASE)
_VERB = re.compile(r"\w{2,}(?<!s)s|\w{2,}ing|\w{3,}ed|\w{2,}ly", re.IGNORECASE)
"""Form of an English word that can start the subject's next action."""
_PAIR = re.compile(r"\b(?:between|both|either|zwischen|entre|tra)\b", re.IGNORECASE)
_LEADING = either(
    """
    and then while but next(?!_to) finally afterwards? meanwhile also until when whereas after_that
    at_the_same_time as(?=_(?:he|she|it|they)_) und dann während danach et puis ensuite pendant_que
    tandis_que y luego mientras e poi mentre então enquanto и затем потом пока
    """
)
_LEADING_UNSPACED = either("然后 接着 随后 同时 与此同时 并且 そして それから 同時に")
_CONNECTIVE = re.compile(rf"(?:(?:{_LEADING})(?:\s*,\s*|\s+)|(?:{_LEADING_UNSPACED})[，、]?)+", re.IGNORECASE)
_RELATIVE = re.compile(r"(?:which|who|whose|whom|where|or|nor|oder|ou|ni)\b", re.IGNORECASE)
_OR = re.compile(r"\b(?:or|nor|oder|noch|ou|ni|или)\b", re.IGNORECASE)
_VAGUE = either(
    r"""
    in on at behind before beside above below under near around with to of from him her them it me us first
    second last once now later here there then next soon again \w{4,}ly
    """
)
_EMPTY = re.compile(rf"(?:(?:{_VAGUE})\b\W*)+", re.IGNORECASE)
"""A piece without meaning alone: "Behind him", "Slowly"."""
_ADJECTIVE = either(
    """
    tall short long small big large little huge tiny old young new dark light bright pale deep wide narrow
    thin thick wet dry warm cold hot cool soft hard quiet calm lone slow fast red black white blue green
    yellow brown gr[ae]y pink purple orange golden silver heavy low high wild strong cute worn round
    """
)
_ATTRIBUTE = rf"(?:{_ADJECTIVE}|\w+(?:[ndzgwf]y|sty|ful|ous|less|ish))"
_ENDS, _BEGINS = re.compile(rf"\b{_ATTRIBUTE}$", re.IGNORECASE), re.compile(rf"(?:and )?{_ATTRIBUTE}\b", re.IGNORECASE)
"""Pieces that end or begin with an adjective: "chopping red", "green and yellow peppers"."""
_OPEN = re.compile(rf"\b(?:a|an|the|his|her|its|their|two|three) {_ATTRIBUTE}$", re.IGNORECASE)
"""A piece that ends inside a noun phrase: "walks through a long"."""


@dataclass(slots=True)
class Piece:
    text: str
    end: str
    """The separator after it."""

    def closes(self) -> bool:
        """True if a sentence, or a part before a semicolon, ends here."""
        return bool(re.search(r"[.!?…。！？\n;；]", self.end))


@dataclass(frozen=True, slots=True)
class Clauses:
    """A prompt's clauses and whole, cleaned, in its words."""

    clauses: tuple[str, ...]
    whole: str
    short: str
    """``whole`` up to the last clause that fits in ``LONGEST`` words."""


def cut(prompt: str) -> Clauses:
    """A prompt's clauses, in order, without duplicates. Everything is empty if the prompt describes nothing."""
    pieces = _without_labels(_pieces(_plain(prompt)))
    pieces = _together([piece for piece in pieces if not _QUALITY.fullmatch(tidy(piece.text))])
    clauses: dict[str, str] = {}
    for piece in pieces:
        text = tidy(piece.text)
        found = _CONNECTIVE.match(text)
        text = tidy(re.sub(r"(?:^|\s)(?:and|but|und|et|y)$", "", text[found.end() :] if found else text))
        if text:
            clauses.setdefault(_same(text), text)
    short = ""
    for piece in pieces:
        if size(short + piece.text) > LONGEST:
            break
        short += piece.text + piece.end
    whole = tidy("".join(piece.text + piece.end for piece in pieces))
    return Clauses(tuple(clauses.values()), whole, tidy(short) or shorten(whole))


def size(text: str) -> int:
    """Number of words."""
    return len(WORD.findall(text))


def shorten(text: str) -> str:
    """The first ``LONGEST`` words."""
    found = re.match(rf"(?:\s*(?:{WORD.pattern})){{1,{LONGEST}}}", text)
    return tidy(found[0]) if found else text


def tidy(text: str) -> str:
    """One line without unbalanced brackets, separators at the ends, or double quotes, which would end a quotation."""
    text = " ".join(re.sub(r"(?<=\w)\s*\n\s*", ", ", re.sub(r'["“”„]', "'", text)).split())
    text = text.strip(" ,;:.!…|/·•–—-_=，；：。！、")
    if text.startswith(("(", "[", "{")) or any(text.count(a) != text.count(b) for a, b in ("()", "[]", "{}")):
        text = " ".join(re.sub(r"[()\[\]{}]", " ", text).split()).strip(" ,;:.")
    return re.sub(r"\s+(?=[,)\]])", "", text) if re.search(r"\w", text) else ""


def _same(text: str) -> str:
    """Equal for near-duplicates: "a red ball" and "The red balls"."""
    words = re.findall(r"\w+", text.casefold())
    return " ".join(word.rstrip("s") for word in words if word not in {"a", "an", "the", "very"}) or text.casefold()


def _plain(prompt: str) -> str:
    text = "".join(char if char.isprintable() or char == "\n" else " " for char in prompt)
    text = re.sub(r'^\s*["“]([^"“”]*)["”]\s*$', r"\1", text)
    if re.search(r"[a-z]", text):  # in an all-capitals prompt, BREAK may be a word
        text = re.sub(r'(?<!["“])\bBREAK\b', ", ", text)
    return _WEIGHT.sub("", _MARKUP.sub(" ", text))


def _pieces(text: str) -> list[Piece]:
    """Cuts at connectives and at punctuation outside quotation marks; at 、 only in Japanese (lists in Chinese)."""
    quoted = [match.span() for match in _QUOTED.finditer(text)]
    ends = list(_SEPARATOR.finditer(text))
    if _JAPANESE.search(text):
        ends = sorted([*ends, *re.finditer("、", text)], key=lambda match: match.start())
    pieces, at = [], 0
    for end in ends:
        if any(start < end.start() < stop for start, stop in quoted):
            continue
        if re.search(r"\w", text[at : end.start()]):
            pieces.append(Piece(text[at : end.start()], end[0]))
        elif pieces:  # two marks in a row
            pieces[-1].end += text[at : end.end()]
        at = end.end()
    if re.search(r"\w", text[at:]):
        pieces.append(Piece(text[at:], ""))
    return [part for piece in pieces for part in _at_and(piece)]


def _at_and(piece: Piece) -> list[Piece]:
    """Cuts at "and" before a verb ("falls off a table and shatters on the tiles") or a subject, but not in a pair."""
    parts, at = [], 0
    for found in _AND.finditer(piece.text):
        before, after = piece.text[at : found.start()], piece.text[found.end() :].split()[1:]
        if not after or NEGATION.search(before) or _PAIR.search(before) or before.count('"') % 2:
            continue
        determined = after[0].lower() in DETERMINERS
        verb = not determined and _VERB.fullmatch(after[0]) and size(before) >= 3 and after[1:2] not in ([], ["and"])
        if verb or determined and size(before) >= 5 and len(after) >= 3:
            parts.append(Piece(before, found[0]))
            at = found.end()
    return [*parts, Piece(piece.text[at:], piece.end)]


def _without_labels(pieces: list[Piece]) -> list[Piece]:
    """``Style: anime. Action: she runs`` -> ``anime. she runs``; after commas only if a label opens the prompt."""
    kept: list[Piece] = []
    labelled, opens, joins = bool(pieces and _is_label(pieces[0])), True, False
    for i, piece in enumerate(pieces):
        label = _is_label(piece) and i + 1 < len(pieces)
        if label and (opens or labelled):
            joins = False
            continue
        if joins:
            kept[-1] = Piece(kept[-1].text + kept[-1].end + piece.text, piece.end)
        else:
            kept.append(piece)
        joins, opens = label, piece.closes()
    return kept


def _is_label(piece: Piece) -> bool:
    return piece.end[:1] in {":", "："} and 0 < size(piece.text) <= 2


def _together(pieces: list[Piece]) -> list[Piece]:
    """Joins pieces that lose or reverse their meaning without their neighbour."""
    made: list[Piece] = []
    until = 0
    for i, piece in enumerate(pieces):
        if made and (i < until or not made[-1].closes() and _belong(made[-1].text.strip(), piece.text.strip())):
            made[-1] = Piece(made[-1].text + made[-1].end + piece.text, piece.end)
        else:
            made.append(piece)
        if NEGATION.search(piece.text) and i >= until:
            until = _end_of_list(pieces, i)
    return made


def _belong(before: str, text: str) -> bool:
    if _OPEN.search(before):
        first = text.split()[0].lower()
        clause = first in DETERMINERS or _CONNECTIVE.match(text) or re.fullmatch(r"\w+(?<!s)s", first)
        return first == "and" or not clause
    adjectives = _ENDS.search(before) and _BEGINS.match(text)
    return bool(adjectives or _RELATIVE.match(text) or _EMPTY.fullmatch(before))


def _end_of_list(pieces: list[Piece], start: int) -> int:
    """End (exclusive) of the pieces under the negation at ``start``: ``without cars, people or dogs``."""
    for i in range(start, len(pieces) - 1):
        if pieces[i].closes():
            break
        first = re.match(r"\s*(?:\S+\s*){1,4}", pieces[i + 1].text)
        if first and _OR.search(first[0]):
            return i + 2
        if size(pieces[i + 1].text) > 4:
            break
    return start
