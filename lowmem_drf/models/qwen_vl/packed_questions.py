"""All questions about a clip in one sequence: [prefix with the video][question 1][question 2]…

A token sees the prefix and its own question, causally; every question's positions start right after the prefix. So each
question gets exactly what it would get alone, and the prefix, nearly all of the tokens, is computed once. No model
here: token ids, masks, positions, rows.
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
class Asked:
    """A question as tokens."""

    ids: tuple[int, ...]
    """Question, end of turn, generation prompt, and, for ``dense``, the reference answer without its last token."""
    target: tuple[int, ...]
    """The tokens of the wanted answer; they are predicted by the last ``len(target)`` positions of ``ids``."""


@dataclass(frozen=True)
class Packed:
    """The questions of B clips after their prefixes of P tokens, padded to S tokens."""

    ids_BS: Tensor
    """int64."""
    mask: Tensor
    """L = P + S: bool (B, 1, L, L), True where a row may attend to a column, or int32 ranges (B, 1, L, 3) of what it
    may attend to (``critic_attention``). First dimension 1 where all clips have the same layout. Padding is never
    attended."""
    offset_BS: Tensor
    """int64: a token's place in its question."""
    clip_R: Tensor
    place_R: Tensor
    """int64: clip and place in S of each of the R rows whose logits are scored, in the order of clips, questions,
    answer tokens."""
    sizes: list[int]
    """Answer tokens of each question, flat over the clips: they sum to R."""


@dataclass
class Conversation:
    """The chat template of a critic, taken apart around the question, and its answer words."""

    tokenizer: Any
    video_token_id: int
    yes: tuple[int, ...] = field(init=False)
    no: tuple[int, ...] = field(init=False)
    """Every single-token casing of the answer in the vocabulary (``yes``, ``Yes``, ``YES``, with and without a space
    before), the plain one first."""

    def __post_init__(self) -> None:
        before, self._after = _split_template(self.tokenizer)
        placed = self._encode(before).count(self.video_token_id)
        if placed != 1:
            raise BadInputError(self._misplaced(placed))
        self._video_token: str = self.tokenizer.convert_ids_to_tokens(self.video_token_id)
        self._around_video = before.split(self._video_token)
        self.yes, self.no = (_casings(self.tokenizer, word) for word in ("yes", "no"))
        self._asked: dict[tuple[str, str, str], Asked] = {}
        self._layouts: dict[tuple[tuple[tuple[int, int], ...], ...], tuple[Tensor, ...]] = {}

    def prefix(self, spell: Callable[[str], str]) -> list[int]:
        """Tokens up to the question, one video token for each block of the video's tokens. ``spell``: the video token
        -> the text that stands for the clip in its place."""
        before, after = self._around_video
        return self._encode(before + spell(self._video_token) + after)

    def prompt(self, text: str) -> list[int]:
        """Tokens of a user's message without a video, end of turn and generation prompt included."""
        return self._encode(_rendered(self.tokenizer, [{"type": "text", "text": text}]))

    def tail(self, text: str) -> list[int]:
        """Tokens of a user's text behind the prefix, end of turn and generation prompt included."""
        return self._encode(text + self._after)

    def ask(self, question: Question) -> Asked:
        """Tokens of a question; remembered, since a training run asks the same few thousand again and again."""
        key = (question.text, question.kind, question.answer)
        if key not in self._asked:
            self._asked[key] = self._tokenise(question)
        return self._asked[key]

    def pack(self, prefix: int, questions: Sequence[Sequence[Question]], ranges: bool = False) -> Packed:
        """The questions of each clip, behind prefixes of ``prefix`` tokens, on the CPU. ``ranges``: the form of the
        mask."""
        asked = [[self.ask(question) for question in clip] for clip in questions]
        layout = tuple(tuple((len(a.ids), len(a.target)) for a in clip) for clip in asked)
        longest = max(sum(len(a.ids) for a in clip) for clip in asked)
        ids = [[token for a in clip for token in a.ids] for clip in asked]
        ids_BS = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        mask, offset, clip_R, place_R = self._layout(prefix, layout, longest, ranges)
        return Packed(ids_BS, mask, offset, clip_R, place_R, [len(a.target) for clip in asked for a in clip])

    def _tokenise(self, question: Question) -> Asked:
        prompt = self.tail(question.text)
        if question.kind == "dense":
            answer = self._encode(question.answer.strip())
            if not answer:
                raise BadInputError(f"The dense question {question.text!r} has no reference answer.")
            return Asked((*prompt, *answer[:-1]), tuple(answer))
        return Asked(tuple(prompt), (self.no if question.answer.strip().lower() == "no" else self.yes)[:1])

    def _layout(
        self, prefix: int, layout: tuple[tuple[tuple[int, int], ...], ...], longest: int, ranges: bool
    ) -> tuple[Tensor, ...]:
        """Mask, offsets and scored rows depend on lengths alone. The last layout is kept: within a run the same one
        often comes again."""
        key = (((prefix, longest), (int(ranges), 0)), *layout)
        if key not in self._layouts:
            self._layouts = {key: _lay_out(prefix, layout, longest, ranges)}
        return self._layouts[key]

    def _misplaced(self, placed: int) -> str:
        known = self.tokenizer.get_vocab().get(_VIDEO_TOKEN)
        if known is not None and known != self.video_token_id:
            return (
                f"The critic's tokenizer and model do not belong together: the model's video token is {self.video_token_id} (video_token_id in "
                f"config.json), and {_VIDEO_TOKEN} is {known} in the tokenizer. Take config.json and the tokenizer's files from one model."
            )
        return f"The critic's chat template must place exactly one video token for a clip; it placed {placed}."

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def _lay_out(
    prefix: int, layout: tuple[tuple[tuple[int, int], ...], ...], longest: int, ranges: bool
) -> tuple[Tensor, ...]:
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
    mask = _ranges(prefix, rows, longest) if ranges else _mask(segment)
    if same:
        offset, places = offset.expand(len(layout), -1), places * len(layout)
    clip_R = torch.tensor([b for b, scored in enumerate(places) for _ in scored])
    return mask, offset, clip_R, torch.tensor([place for scored in places for place in scored])


def _ranges(prefix: int, rows: Sequence[tuple[tuple[int, int], ...]], longest: int) -> Tensor:
    return torch.stack([packed_ranges(prefix, [length for length, _ in clip], prefix + longest) for clip in rows])


def _mask(segment_BL: Tensor) -> Tensor:
    order = torch.arange(segment_BL.shape[1])
    mask = ((segment_BL[:, None, :] == 0) | (segment_BL[:, None, :] == segment_BL[:, :, None])) & (
        order[:, None] >= order
    )
    return mask[:, None]


def _split_template(tokenizer: Any) -> tuple[str, str]:
    """The chat template's text before and after the question."""
    if not getattr(tokenizer, "chat_template", None):
        raise BadInputError(
            "The critic's tokenizer has no chat template. Use an instruction-tuned model whose folder holds chat_template.jinja or chat_template.json."
        )
    text = _rendered(tokenizer, [{"type": "video"}, {"type": "text", "text": _SENTINEL}])
    if text.count(_SENTINEL) != 1:
        raise BadInputError(
            "The critic's chat template does not show the user's text exactly once, so questions cannot be placed in it."
        )
    before, after = text.split(_SENTINEL)
    return before, after


def _rendered(tokenizer: Any, content: list[dict[str, str]]) -> str:
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return text


def _casings(tokenizer: Any, word: str) -> tuple[int, ...]:
    # Ġ and ▁ stand for a leading space in byte-level BPE and in SentencePiece vocabularies
    found = [(token, index) for token, index in tokenizer.get_vocab().items() if token.lstrip("Ġ▁ ").lower() == word]
    if not found:
        raise BadInputError(
            f"The critic's vocabulary has no single token for {word!r}, so yes/no questions cannot be scored with it."
        )
    rank = {word: 0, word.capitalize(): 1, word.upper(): 2}
    return tuple(index for _, index in sorted(found, key=lambda pair: (rank.get(pair[0], 3), pair[1])))
