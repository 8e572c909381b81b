"""The values of a step that are NaN or infinite: raised, or handed to a caller that wants the step to go on.

In a run of several processes a step must go on: the others wait for this process in collectives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lowmem_drf.errors import NonFiniteError

if TYPE_CHECKING:
    from torch import Tensor

Found = Callable[[NonFiniteError], None]
"""Called with every such value, in the order in which the step makes them."""


def refuse(error: NonFiniteError) -> None:
    raise error


def look_at(tensor: Tensor, what: str, stage: str, found: Found) -> None:
    if not bool(tensor.isfinite().all()):
        found(NonFiniteError(f"{what} are NaN or infinite", stage))
