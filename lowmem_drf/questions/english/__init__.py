"""Questions from any English prompt, by rules: no network, no model."""

from lowmem_drf.questions.english.ask import questions
from lowmem_drf.questions.english.parse import parse

__all__ = ["parse", "questions"]
