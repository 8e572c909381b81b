"""Camera, style and quoted text: fixed phrases that are found by pattern and cut out, so that what is left is about the
world."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from lowmem_drf.questions.english import film_words as fw
from lowmem_drf.questions.english.facts import Cue, Form
from lowmem_drf.questions.english.verbs import FORMS

START, STOP = r"(?:^|(?<=[,.;]))\s*", r"\s*(?=[,.;]|$)"
"""The edges of a segment between commas."""
MANNER = re.compile(r"\b(?:slowly|smoothly|gently|gradually|steadily|quickly|swiftly|gracefully|subtly|then)\b\s*")
PURPOSE = re.compile(
    r",.*$|\s+to (?:follow|reveal|show|capture|track|keep|focus)\b.*$|\s+at an? \w+ (?:pace|speed)\b.*$"
)
NEW_THING = re.compile(r"\b(an? [^,]+?)(?=\s+(?:to|at|from|across|through|along)\b|,|$)")
NO_THING = re.compile(r"\b(?:pace|speed|angle|distance|shot|view|circle|moment|direction)\b")
CUT = " \x02 "
"""Stands where a camera or style word was, until what hung on it is cut too."""
MARKS = str.maketrans(
    {
        "“": '"',
        "”": '"',
        "„": '"',
        "«": '"',
        "»": '"',
        "‘": "'",
        "’": "'",
        "`": "'",
        "…": "...",
        "\u00a0": " ",
        "‑": "-",
    }
)


@dataclass(slots=True)
class Filming:
    """What the patterns took out of a prompt, and the text without it."""

    text: str
    camera: list[Cue] = field(default_factory=list)
    styles: list[Cue] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def add(self, kind: Literal["camera", "style"], words: str, subject: str = "the video", form: Form = "be") -> None:
        cues = self.camera if kind == "camera" else self.styles
        if all(cue.words != words for cue in cues):
            cues.append(Cue(kind, subject, form, words))


def clean(prompt: str) -> str:
    """One line, single spaces, plain quotation marks, no markup of weights, no addresses, no control characters."""
    text = re.sub(r"https?://\S+|[\x00-\x1f\x7f\u200b-\u200f\ufeff]+", " ", prompt).translate(MARKS)
    text = re.sub(r"(?<!\w)'([^']{2,80})'(?!\w)", r'"\1"', text)
    if re.search(r":\d\.\d|\(\(|\[\[", text):
        text = re.sub(r"[()\[\]{}]+|:\d+(?:\.\d+)?(?=[)\s,]|$)", " ", text)
    return re.sub(r"\s+", " ", text).strip()


def read_filming(prompt: str) -> Filming:
    """Takes quoted text, camera and style out of a cleaned prompt."""
    found = Filming(prompt)
    text = fw.QUOTED.sub(lambda m: _quote(found, m), prompt)
    text = re.sub(r"\s*\x01\d+", "", fw.SAYS.sub(" ", text))
    text = fw.NARRATION.sub(" ", fw.COMMENT.sub("", text))
    text = fw.CAMERA.sub(lambda m: _camera(found, m), text)
    text = _styles(found, text)
    text = _shots(found, text)
    text = fw.DIRECTIONAL.sub(lambda m: _directional(found, m), text)
    text = _segments(found, text)
    text = fw.OF_IT.sub(r"\1 ", text).replace("\x02", " ")
    found.text = _tidy(fw.META.sub(" ", fw.TAKES_PLACE.sub(" ", text)))
    return found


def _sub(pattern: str, replace: object, text: str) -> str:
    return re.sub(pattern, replace, text, flags=re.IGNORECASE)  # type: ignore[call-overload]


def _quote(found: Filming, match: re.Match[str]) -> str:
    words = match[1].strip(" ,.")
    if not words or fw.SPOKEN.search(match.string[: match.start()]):
        return " "
    found.texts.append(words)
    return f" \x01{len(found.texts)} "


def _camera(found: Filming, match: re.Match[str]) -> str:
    """``camera slowly pans left and zooms in on the ball`` -> two claims about the camera. Things that it follows stay
    in the text."""
    lead, verb, rest = match[1].lower(), match[2].lower(), match[3]
    base = _move(verb)
    if base is None:
        if re.search(r"\b(?:is|stays?|remains?)\b", lead) and verb in {
            "static",
            "still",
            "fixed",
            "stationary",
            "steady",
            "handheld",
        }:
            found.add("camera", verb, "the camera")
            _shots(found, rest, inner=True)
            return ", "
        return match[0]
    kept = ""
    pieces = re.split(r",?\s+(?:and|then|before|,)\s+(?:then\s+)?(?=(?:\w+ly\s+)?\w+)", f"{base}{rest}")
    for i, piece in enumerate(pieces):
        words = re.sub(r"^(?!dolly)\w+ly ", "", piece.strip(" ,")).split()
        move = base if i == 0 else _move(words[0]) if words else None
        if move is None:
            continue
        tail = _shots(found, " " + " ".join(words[1:]), inner=True)
        thing = NEW_THING.search(tail)
        kept += f", {thing[1]}" if thing and not NO_THING.search(thing[1]) else ""
        tail = MANNER.sub("", PURPOSE.sub("", tail).strip()).strip()
        found.add("camera", f"{move} {tail}".strip(), "the camera", "do")
    return f",{kept} "


def _move(word: str) -> str | None:
    """The base of a verb that a camera can do."""
    base = next((b for b in FORMS.get(word.lower(), {}).values() if b in fw.MOVES), None)
    return base or fw.MOVE_FORMS.get(word.lower())


def _shots(found: Filming, text: str, inner: bool = False) -> str:
    """inner: within a clause about the camera, where a shot is what it moves to or from."""
    for pattern, words in fw.SHOTS:
        lead = (
            r"(?:,?\s*\b(?:moving|going|transitioning|shifting|starting|changing)\b)?(?:\s*\b(?:from|to|in|into|with)\s+)*"
            if inner
            else ""
        )

        def take(match: re.Match[str], words: str = words) -> str:
            found.add("camera", words)
            return ", " if inner else CUT

        text = _sub(rf"{lead}{fw.LEAD}(?<![\w-])(?:{pattern})(?![\w-]){fw.TAIL}", take, text)
    return text


def _styles(found: Filming, text: str) -> str:
    def of_artist(match: re.Match[str]) -> str:
        found.add("style", f"in the style of {match[1].strip()}")
        return ""

    def picture(match: re.Match[str]) -> str:
        found.add("style", f"in the style of a {match[2].lower()}")
        return ""

    text = _sub(rf",?\s*\bby ((?:{fw.ARTISTS})\b)", of_artist, text)
    name = r"((?:an? |the )?[\w'-]+(?: (?!with|in|at|on|and|while|as)[\w'-]+){0,3})"
    text = _sub(rf",?\s*\b(?:in|with)?\s*(?:the )?style of {name}", of_artist, text)
    text = fw.PICTURE.sub(picture, text)
    lead, tail = (
        r"(?:\b(?:in|as|an?|the|with|shot on)\s+)*",
        r"(?:[- ](?:styled?|aesthetics?|look|effect|feel|vibe|grade|film|footage|camera))*",
    )
    for pattern, words in fw.STYLES:

        def take(match: re.Match[str], words: str = words) -> str:
            low = match[1].lower()
            found.add("style", words.format(fw.SPELLINGS.get(low, low)))
            return CUT

        text = _sub(rf"{lead}(?<![\w-])({pattern})(?![\w-]){tail}", take, text)
    return text


def _segments(found: Filming, text: str) -> str:
    """Styles and wishes for quality that stand alone between commas."""

    def take(match: re.Match[str]) -> str:
        words = match[1].strip()
        name = sum(word[0].isupper() for word in words.split()) > 1 and not words.isupper()
        found.add(
            "style", words.lower() if words.lower() in fw.PLAIN else f"in {words if name else words.lower()} style"
        )
        return " "

    lead = r"(?:in |with )?(?:(?:a|an|the) )?"
    text = _sub(rf"{START}{lead}({fw.SEGMENT_STYLES})(?: (?:styled?|aesthetic|look|mood|vibe))?{STOP}", take, text)
    text = _sub(rf"{START}{lead}((?:[\w-]+ ){{1,3}})(?:style|aesthetic){STOP}", take, text)
    return _sub(rf"{START}(?:in |with |shot in )?(?:{fw.QUALITY}[\s-]*)+(?=[,.;]|$)", "", text)


def _directional(found: Filming, match: re.Match[str]) -> str:
    move = _move(match[1])
    if move:
        found.add("camera", f"{move} {(match[2] or '').lower()}".strip(), "the camera", "do")
    return " "


def _tidy(text: str) -> str:
    """No article, preposition or comma is left hanging."""
    text = _sub(r"\b(?:an?|the|in|with|as|as in an?|as in|nature)\s*(?=[,.;]|$)", "", text)
    nouns = r"(?:scene|shot|view|video|footage|style|look|animation|painting|drawing|film|movie|render|lens|camera)?"
    text = _sub(rf"(^|[,.;])\s*(?:(?:an?|the)\s+)?{nouns}\s*\b(?:of|showing|featuring|depicting)\s+", r"\1 ", text)
    text = re.sub(r"\s+([,.;])", r"\1", text)
    text = re.sub(r"([,;])(?:\s*(?:and\b\s*)?[,;])+", r"\1", text)
    text = re.sub(r"[,;]\s*\.|\.(?:\s*(?:and\b|[,.;]))+", ".", text)
    return re.sub(r"\s+", " ", re.sub(r"^[\s,;.]+", "", text)).strip()
