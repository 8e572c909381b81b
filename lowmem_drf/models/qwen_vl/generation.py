"""Greedy decoding of a batch with a key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor, Tensor | None, Any], tuple[Tensor, Any]]
"""(new token ids (B, L), positions (3, B, L), mask or ``None``, cache or ``None``) -> (logits (B, V) of the next token,
cache). The mask is bool (B, 1, L, keys so far), True where a token may attend; ``None``: causal."""


def greedy(
    step: Step,
    ids_BL: Tensor,
    positions_3BL: Tensor,
    ends: Collection[int],
    limit: int,
    padding_B: Sequence[int] = (),
) -> list[list[int]]:
    """At most ``limit`` tokens that follow each row, up to the first of ``ends``, which is left out.

    As in transformers, positions continue from the prompt's last token even if a video's time positions reach further.

    Args:
        padding_B: number of padding tokens at the beginning of each row. Empty: none.
    """
    mask = _mask(ids_BL.shape[1], padding_B) if any(padding_B) else None
    ids, positions, cache = ids_BL, positions_3BL, None
    made: list[list[int]] = [[] for _ in ids_BL]
    going = [True] * len(made)
    start_B = positions_3BL[0, :, -1] + 1
    for count in range(limit):
        logits_BV, cache = step(ids, positions, mask, cache)
        tokens = logits_BV.argmax(-1).tolist()
        for row, token in enumerate(tokens):
            going[row] = going[row] and token not in ends
            if going[row]:
                made[row].append(token)
        if not any(going):
            break
        positions = (start_B + count).expand(3, -1)[..., None]
        ids = torch.tensor(tokens)[:, None]
        if mask is not None:
            mask = torch.cat([mask[:, :, -1:], torch.ones(len(made), 1, 1, 1, dtype=torch.bool)], dim=-1)
    return made


def left_padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, list[int]]:
    """Token ids (B, L), positions (3, B, L) and the padding of each row, for ``greedy``."""
    longest = max(len(row) for row in rows)
    padding = [longest - len(row) for row in rows]
    ids = torch.tensor([[0] * pad + list(row) for pad, row in zip(padding, rows, strict=True)])
    positions = (torch.arange(longest) - torch.tensor(padding)[:, None]).clamp(min=0)
    return ids, positions.expand(3, -1, -1), padding


def _mask(length: int, padding_B: Sequence[int]) -> Tensor:
    """Causal, without the padding. Padding attends to itself: a row that attends to nothing would be NaN, and NaN times
    a weight of zero is NaN."""
    place = torch.arange(length)
    real_BL = place >= torch.tensor(padding_B)[:, None]
    visible = (place[:, None] >= place) & (real_BL[:, None, :] | (place[:, None] == place))
    return visible[:, None]
