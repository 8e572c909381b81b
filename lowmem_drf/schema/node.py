"""What all sections are, and the kinds of numbers that several have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

# counts that cost no memory are bounded so that a slip of the keyboard is seen; sizes have bounds of their own, and
# assembly/sizes.py has those that depend on the model and the memory
MANY = 1_000_000
Positive = Annotated[int, Field(ge=1, le=MANY)]
NonNegative = Annotated[int, Field(ge=0, le=MANY)]
Thousand = Annotated[int, Field(ge=1, le=1000)]
# beyond its bounds a number, or what it is multiplied by, would become 0 or infinity in fp32
Scale = Annotated[float, Field(ge=1e-6, le=1e6)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
Name = Annotated[str, Field(min_length=1)]


class Node(BaseModel):
    """A section. ``problems`` yields (field, message) for errors that the type of one field cannot express."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from ()
