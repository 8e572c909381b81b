"""Greedy decoding with a key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor, Any], tuple[Tensor, Any]]
"""(new token ids (1, L), positions (3, 1, L), cache or ``None``) -> (logits (1, V) of the next token, cache)."""


def greedy(step: Step, ids_L: Tensor, positions_3L: Tensor, ends: Collection[int], limit: int) -> list[int]:
    """At most ``limit`` tokens that follow ``ids_L``, up to the first of ``ends``, which is left out.

    As in transformers, positions continue from the prompt's last token even if a video's time positions reach further.
    """
    ids, positions, cache = ids_L[None], positions_3L[:, None], None
    made: list[int] = []
    start = int(positions_3L[0, -1]) + 1
    while len(made) < limit:
        logits_1V, cache = step(ids, positions, cache)
        token = int(logits_1V.argmax())
        if token in ends:
            break
        positions = torch.full((3, 1, 1), start + len(made))
        made.append(token)
        ids = torch.tensor([[token]])
    return made
