"""All questions about a clip in one sequence: [prefix with the video][question 1][question 2]…

A token attends causally to the prefix and to its own question, and the positions of every question start right after
the prefix. So each question gets the same answer as alone, while the prefix, nearly all of the tokens, is computed
once. There is no model here, only token ids, masks, positions and rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowmem_drf.errors import BadInputError
from lowmem_drf.ops import packed_ranges
from lowmem_drf.types import Question

_SENTINEL = "lowmemdrfquestion"
_VIDEO_TOKEN = "<|video_pad|>"


@dataclass(frozen=True, slots=True)
class QuestionTokens:
    """A question, tokenised."""

    ids: tuple[int, ...]
    """Question, end of turn, generation prompt, and, for ``dense``, the reference answer without its last token."""
    target: tuple[int, ...]
    """The wanted answer, predicted by the last ``len(target)`` positions of ``ids``."""


@dataclass(frozen=True)
class Packed:
    """The questions of B clips, padded to S tokens, to follow prefixes of P tokens. Integers are int64."""

    ids_BS: Tensor
    mask: Tensor
    """With L = P + S: bool (B, 1, L, L), True where a row may attend to a column, or int32 ranges (B, 1, L, 3)
    (``attention``). The first dimension is 1 if all clips have the same layout. Nothing attends to padding."""
    offset_BS: Tensor
    """Index of a token in its question."""
    clip_R: Tensor
    place_R: Tensor
    """Clip and index in S of each of the R scored rows, ordered by clip, question, answer token."""
    sizes: list[int]
    """Answer tokens of each question, flat over clips; their sum is R."""


@dataclass
class Conversation:
    """The chat template of a critic, split around the question, and its answer words."""

    tokenizer: Any
    video_token_id: int
    lead: str = ""
    """Text between the clip and a question."""
    says: str = ""
    """Text between the generation prompt and an answer."""
    yes: tuple[int, ...] = field(init=False)
    no: tuple[int, ...] = field(init=False)
    """Every single-token spelling in the vocabulary (``yes``, ``Yes``, ``YES``, with and without a leading space), the
    plain one first."""

    def __post_init__(self) -> None:
        before, self._after = _split_template(self.tokenizer)
        placed = self._encode(before).count(self.video_token_id)
        if placed != 1:
            raise BadInputError(self._misplaced(placed))
        self._video_token: str = self.tokenizer.convert_ids_to_tokens(self.video_token_id)
        self._around_video = before.split(self._video_token)
        self.yes, self.no = (_casings(self.tokenizer, word) for word in ("yes", "no"))
        self._tokens: dict[tuple[str, str, str], QuestionTokens] = {}
        self._last_layout: tuple[Any, tuple[Tensor, Tensor, Tensor, Tensor]] | None = None

    def prefix(self, placeholder: Callable[[str], str]) -> list[int]:
        """Tokens before the question, one video token per block. ``placeholder``: video token -> text for the clip."""
        before, after = self._around_video
        return self._encode(before + placeholder(self._video_token) + after)

    def text_prefix(self, text: str) -> list[int]:
        """Tokens before the question, with a text in the video's place."""
        before, _ = _split(_rendered(self.tokenizer, [{"type": "text", "text": f"{text}\n{_SENTINEL}"}]))
        return self._encode(before)

    def prompt(self, text: str) -> list[int]:
        """Tokens of a user's message without a video, with end of turn and generation prompt."""
        return self._encode(_rendered(self.tokenizer, [{"type": "text", "text": text}]))

    def tail(self, text: str) -> list[int]:
        """Tokens of a user's text behind the prefix, with end of turn and generation prompt."""
        return self._encode(self.lead + text + self._after)

    def tokens(self, question: Question) -> QuestionTokens:
        """Tokens of a question, cached: a training run asks the same few thousand repeatedly."""
        key = (question.text, question.kind, question.answer)
        if key not in self._tokens:
            self._tokens[key] = self._tokenise(question)
        return self._tokens[key]

    def pack(self, prefix: int, questions: Sequence[Sequence[Question]], ranges: bool = False) -> Packed:
        """The questions of each clip behind prefixes of ``prefix`` tokens, on the CPU. ``ranges``: the mask's form."""
        tokens = [[self.tokens(question) for question in clip] for clip in questions]
        ids = [[token for q in clip for token in q.ids] for clip in tokens]
        longest = max(len(row) for row in ids)
        ids_BS = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        layout = tuple(tuple((len(q.ids), len(q.target)) for q in clip) for clip in tokens)
        key = (prefix, layout, longest, ranges)
        if self._last_layout is None or self._last_layout[0] != key:  # within a run the same one often repeats
            self._last_layout = key, _lay_out(*key)
        return Packed(ids_BS, *self._last_layout[1], [len(q.target) for clip in tokens for q in clip])

    def _tokenise(self, question: Question) -> QuestionTokens:
        prompt = self.tail(question.text)
        if question.kind == "dense":
            words = question.answer.strip()
            answer = self._encode(self.says + words) if words else []
            if not answer:
                raise BadInputError(f"The dense question {question.text!r} has no reference answer.")
            return QuestionTokens((*prompt, *answer[:-1]), tuple(answer))
        return QuestionTokens(tuple(prompt), (self.no if question.answer.strip().lower() == "no" else self.yes)[:1])

    def _misplaced(self, placed: int) -> str:
        known = self.tokenizer.get_vocab().get(_VIDEO_TOKEN)
        if known is not None and known != self.video_token_id:
            return (
                f"The critic's tokenizer and model do not belong together: the model's video token is "
                f"{self.video_token_id} (video_token_id in config.json), and {_VIDEO_TOKEN} is {known} in the "
                "tokenizer. Take config.json and the tokenizer's files from one model."
            )
        return f"The critic's chat template must place exactly one video token for a clip; it placed {placed}."

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def _lay_out(
    prefix: int, layout: tuple[tuple[tuple[int, int], ...], ...], longest: int, ranges: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``mask``, ``offset_BS``, ``clip_R`` and ``place_R`` of ``Packed``, which depend on lengths alone. ``layout``:
    (tokens, answer tokens) of each question of each clip."""
    same = all(clip == layout[0] for clip in layout)
    rows = layout[:1] if same else layout
    segment = torch.full((len(rows), prefix + longest), -1)  # 0: prefix, 1, 2, …: questions, -1: padding
    segment[:, :prefix] = 0
    offset = torch.zeros(len(rows), longest, dtype=torch.int64)
    places: list[list[int]] = []
    for b, clip in enumerate(rows):
        start = 0
        scored: list[int] = []
        for number, (length, answer) in enumerate(clip, start=1):
            segment[b, prefix + start : prefix + start + length] = number
            offset[b, start : start + length] = torch.arange(length)
            start += length
            scored.extend(range(start - answer, start))
        places.append(scored)
    lengths = [[length for length, _ in clip] for clip in rows]
    spans = [packed_ranges(prefix, clip, prefix + longest) for clip in lengths] if ranges else []
    mask = torch.stack(spans) if ranges else _mask(segment)
    if same:
        offset, places = offset.expand(len(layout), -1), places * len(layout)
    clip_R = torch.tensor([b for b, scored in enumerate(places) for _ in scored])
    return mask, offset, clip_R, torch.tensor([place for scored in places for place in scored])


def _mask(segment_BL: Tensor) -> Tensor:
    order, key_B1L = torch.arange(segment_BL.shape[1]), segment_BL[:, None, :]
    visible_BLL = (key_B1L == 0) | (key_B1L == segment_BL[:, :, None])
    return (visible_BLL & (order[:, None] >= order))[:, None]


def _split_template(tokenizer: Any) -> tuple[str, str]:
    """The chat template's text before and after the question."""
    if not getattr(tokenizer, "chat_template", None):
        raise BadInputError(
            "The critic's tokenizer has no chat template. Use an instruction-tuned model whose folder holds "
            "chat_template.jinja or chat_template.json."
        )
    return _split(_rendered(tokenizer, [{"type": "video"}, {"type": "text", "text": _SENTINEL}]))


def _split(text: str) -> tuple[str, str]:
    if text.count(_SENTINEL) != 1:
        raise BadInputError(
            "The critic's chat template must show the user's text exactly once to place questions in it."
        )
    before, after = text.split(_SENTINEL)
    return before, after


def _rendered(tokenizer: Any, content: list[dict[str, str]]) -> str:
    message = [{"role": "user", "content": content}]
    return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))


def _casings(tokenizer: Any, word: str) -> tuple[int, ...]:
    # Ġ and ▁ stand for a leading space in byte-level BPE and in SentencePiece vocabularies
    found = [(token, index) for token, index in tokenizer.get_vocab().items() if token.lstrip("Ġ▁ ").lower() == word]
    if not found:
        raise BadInputError(
            f"The critic's vocabulary has no single token for {word!r}: it cannot score yes/no questions."
        )
    rank = {word: 0, word.capitalize(): 1, word.upper(): 2}
    return tuple(index for _, index in sorted(found, key=lambda pair: (rank.get(pair[0], 3), pair[1])))
