"""Greedy decoding with a key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor, Any], tuple[Tensor, Any]]
"""(new token ids (1, L), their positions (3, 1, L), cache or ``None``) -> (logits (1, V) after the last of them,
cache)."""


def greedy(step: Step, ids_L: Tensor, positions_3L: Tensor, ends: Collection[int], limit: int) -> list[int]:
    """The tokens that follow ``ids_L``, at most ``limit``, up to and without one of ``ends``.

    Positions count on from the prompt's last, even where a video's times reach further, as transformers does it.
    """
    ids, positions, cache = ids_L[None], positions_3L[:, None], None
    said: list[int] = []
    start = int(positions_3L[0, -1]) + 1
    while len(said) < limit:
        logits_1V, cache = step(ids, positions, cache)
        token = int(logits_1V.argmax())
        if token in ends:
            break
        positions = torch.full((3, 1, 1), start + len(said))
        said.append(token)
        ids = torch.tensor([[token]])
    return said
