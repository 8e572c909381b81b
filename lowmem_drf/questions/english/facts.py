"""What a prompt says, as plain data: entities, claims about them, the setting and how the clip is filmed.

A claim is half a sentence, kept so that both the question and the statement can be made from it::

    Claim("action", (0,), "do", "chase a ball")       Do the dogs chase a ball?     The dogs chase a ball.
    Claim("attribute", (1,), "be", "red")             Is the ball red?              The ball is red.

So everything that is asked is a piece of the prompt, put into another order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lowmem_drf.questions.english import nouns

Form = Literal["do", "be"]


@dataclass(slots=True)
class Entity:
    """A person, an animal or a thing. Filled while the prompt is read, frozen in meaning once it is in ``Facts``."""

    head: str
    """Noun without its adjectives, with what belongs to it: ``hot air balloons``, ``cup of coffee``."""
    plural: bool
    determiner: str = ""
    """``a``, ``the``, a possessive or empty, as in the prompt."""
    count: int | None = None
    quantity: str = ""
    """The words of the count: ``two``, ``several``, ``a flock of``."""
    adjectives: tuple[str, ...] = ()
    """As they stand before the noun, for naming it in full: ``old wooden``."""
    animate: bool = False
    person: bool = False
    owner: int | None = None
    """Index of the entity that a possessive pointed to."""
    inner: int | None = None
    """Index of what stands after its ``of``."""
    ask: bool = True
    """Whether its presence is worth a question (not for moods, sides, body parts, places)."""
    lead: bool = False
    """Named first in its sentence, where captions leave the article out."""
    label: str = ""
    """What tells it from another one with the same head: ``red`` in ``the red car``. Empty where the head is unique."""
    ambiguous: bool = False
    """Nothing tells it from another one with the same head."""

    @property
    def key(self) -> str:
        """The head noun in lower case, for the word lists: ``cup`` of ``tea cup of coffee``."""
        return self.head.lower().split(" of ")[0].rsplit(" ", 1)[-1]

    @property
    def fleeting(self) -> bool:
        """Light, weather, stuff: hardly what "it" means."""
        return self.key in nouns.TIMES or self.key in nouns.MASS


@dataclass(frozen=True, slots=True)
class Claim:
    """Something said about entities: ``words`` follow ``do`` (base verb first) or ``be``."""

    kind: Literal["attribute", "action", "relation"]
    subjects: tuple[int, ...]
    form: Form
    words: str
    """Objects without their adjectives, which are claims of their own."""
    full: str = ""
    """The same with the adjectives."""
    topic: str = ""
    """``color`` and ``material`` are known, so that dense questions can name them."""
    order: int = 0
    """Its place in the prompt."""


@dataclass(frozen=True, slots=True)
class Cue:
    """How the clip looks or is filmed: ``subject`` is ``the video`` or ``the camera``, the rest as in ``Claim``."""

    kind: Literal["camera", "style", "time", "place"]
    subject: str
    form: Form
    words: str


@dataclass(frozen=True, slots=True)
class Facts:
    """A prompt, taken apart."""

    prompt: str
    """Cleaned: one line, single spaces, plain quotation marks."""
    subjects: tuple[Entity, ...] = ()
    names: tuple[str, ...] = ()
    """How each subject is called in a question: ``the dogs``, ``the woman's hair``."""
    attributes: tuple[Claim, ...] = ()
    actions: tuple[Claim, ...] = ()
    relations: tuple[Claim, ...] = ()
    places: tuple[Cue, ...] = ()
    times: tuple[Cue, ...] = ()
    camera: tuple[Cue, ...] = ()
    styles: tuple[Cue, ...] = ()
    texts: tuple[str, ...] = ()
    """Quoted words that shall be readable in the picture."""
