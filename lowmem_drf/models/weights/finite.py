"""Looks for NaN and infinity in weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lowmem_drf.errors import BadInputError
from lowmem_drf.texts import one_line

if TYPE_CHECKING:
    from torch import Tensor, nn

_PART = 2**20
"""Numbers looked at together."""


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity. Integer ones hold none.

    A sum that is finite has only finite terms. Only where it is not (it may have overflowed) is every number looked at,
    which takes a CPU much longer.
    """
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.is_meta}
    return [name for name, tensor in floats.items() if not _is_finite(tensor)]


def _is_finite(tensor: Tensor) -> bool:
    if tensor.element_size() == 1:  # there is no sum of 8-bit numbers; bf16 holds each of them
        return all(_is_finite(part.bfloat16()) for part in tensor.flatten().split(_PART))
    return math.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())


def refuse_weights(tensors: Mapping[str, Tensor], where: object) -> None:
    """Raises BadInputError if one of the tensors that were read from ``where`` holds NaN or infinity."""
    if lost := not_finite(tensors):
        raise BadInputError(
            f"{len(lost)} tensors of {where} hold NaN or infinity (the first: {one_line(lost[0], 80)}). Get it anew; "
            "in bf16 an infinity may also be an fp32 number that is too large."
        )


def refuse_model(model: nn.Module, where: object) -> None:
    """``refuse_weights`` for a loaded model."""
    refuse_weights(dict(model.state_dict()), where)
