"""Claims -> grammatical questions and statements. Two wordings of each question: training asks the first, evaluation
the second."""

from __future__ import annotations

from lowmem_drf.questions.english import nouns
from lowmem_drf.questions.english.facts import Claim, Cue, Entity, Form
from lowmem_drf.questions.english.nounphrase import CARDINALS, article
from lowmem_drf.questions.english.verbs import third

ANSWER = " Answer yes or no."
"""Ends every yes/no question: it moves the critic's probability onto the two words that are scored, as VQAScore (arXiv
2404.01291) does."""


def ask(subject: str, plural: bool, form: Form, words: str) -> str:
    """``Do the dogs chase a ball?``"""
    verb = {"be": ("Is", "Are"), "do": ("Does", "Do")}[form][plural]
    return f"{verb} {subject} {words}?"


def state(subject: str, plural: bool, form: Form, words: str) -> str:
    """``the dogs chase a ball``"""
    if form == "be":
        return f"{subject} {'are' if plural else 'is'} {words}"
    if plural:
        return f"{subject} {words}"
    verb, _, rest = words.partition(" ")
    return f"{subject} {third(verb)} {rest}".strip()


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def said(statement: str) -> str:
    """The second wording of any claim."""
    return f"Would you say that {statement}?"


def listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def uncounted(noun: str) -> bool:
    return noun.endswith(
        ("tion", "ness", "ity", "ence", "ance", "ery", "ment", "ware", "cream", "water", "light", "ice")
    )


class Speaker:
    """Knows the entities' names."""

    def __init__(self, entities: tuple[Entity, ...], names: list[str]) -> None:
        self.entities, self.names = entities, names

    def subject(self, claim: Claim) -> tuple[str, bool]:
        return listed([self.names[i] for i in claim.subjects]), len(claim.subjects) > 1 or self.entities[
            claim.subjects[0]
        ].plural

    def claim(self, claim: Claim) -> tuple[str, str]:
        """Both wordings."""
        name, plural = self.subject(claim)
        return ask(name, plural, claim.form, claim.words), said(state(name, plural, claim.form, claim.words))

    def statement(self, claim: Claim, full: bool = True) -> str:
        name, plural = self.subject(claim)
        return capital(state(name, plural, claim.form, claim.full if full else claim.words)) + "."

    def named(self, i: int) -> bool:
        """Whether its presence can be asked for in good English: not where a caption left the article out of an object
        (``plays piano``)."""
        entity = self.entities[i]
        last = entity.key
        return (
            entity.plural
            or bool(entity.determiner or entity.quantity)
            or entity.animate
            or entity.lead
            or last in nouns.MASS
            or last in nouns.CLOTHES
            or entity.head[:1].isupper()
            or uncounted(last)
        )

    def noun(self, i: int) -> tuple[str, bool]:
        """``a dog``, ``dogs``, ``snow``, ``the ocean`` and whether "there is" suits it."""
        entity = self.entities[i]
        head = f"{entity.label} {entity.head}".strip()
        last = entity.key
        if entity.head[:1].isupper() and not entity.determiner:
            return head, False
        if entity.determiner == "the" and (entity.head[:1].isupper() or not entity.animate) and not entity.plural:
            return f"the {head}", False
        if entity.determiner.endswith("'s"):
            return f"{entity.determiner} {head}", False
        if entity.plural:
            return head, True
        mass = (
            entity.determiner == ""
            and not entity.animate
            and last not in nouns.CLOTHES
            and (last in nouns.MASS or uncounted(last) or not entity.lead)
        )
        return head if mass else f"{article(head)} {head}", True

    def existence(self, i: int) -> tuple[str, str]:
        noun, there = self.noun(i)
        be = "Are" if self.entities[i].plural else "Is"
        return (
            f"{be} there {noun} in the video?" if there else f"Does the video show {noun}?",
            f"Can you see {noun} in this clip?",
        )

    def count(self, i: int, number: int | None = None) -> tuple[str, str]:
        """``Are there exactly two dogs in the video?``, ``Is there a flock of birds in the video?``"""
        entity = self.entities[i]
        head = f"{entity.label} {entity.head}".strip()
        exact = number or entity.count
        if exact is None:
            be = "Is" if entity.quantity.startswith(("a ", "an ")) and entity.quantity.endswith(" of") else "Are"
            return (
                f"{be} there {entity.quantity} {head} in the video?",
                f"Can you see {entity.quantity} {head} in this clip?",
            )
        word = (CARDINALS.get(exact, str(exact)) if number else entity.quantity) or str(exact)
        be = "Is" if exact == 1 else "Are"
        return f"{be} there exactly {word} {head} in the video?", f"Does this clip show exactly {word} {head}?"


def cue(item: Cue) -> tuple[str, str]:
    """Camera, style, place and time, both wordings."""
    return ask(item.subject, False, item.form, item.words), said(
        state(item.subject.replace("video", "clip"), False, item.form, item.words)
    )


def text(quoted: str) -> tuple[str, str]:
    return f'Does the text "{quoted}" appear in the video?', f'Can you read "{quoted}" in this clip?'


def globally(prompt: str, heldout: bool = False) -> str:
    """Vanilla-DRF's single question; the prompt's own quotation marks give way to single ones."""
    quoted = prompt.replace('"', "'").rstrip(" .")
    if not quoted:
        return "Can you tell what this clip shows?" if heldout else "Does the video show a recognizable scene?"
    return f'Is this a clip of "{quoted}"?' if heldout else f'Does this video show "{quoted}"?'
