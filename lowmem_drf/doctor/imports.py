"""Child process of ``doctor``: imports every package that is needed or that one of those imports by itself."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator

from lowmem_drf.doctor.checks import Check, looked_at, say, tell
from lowmem_drf.libraries import requirements

LAST = ("transformers", "accelerate", "diffusers", "peft")
"""They import others: of one that crashes the process, the name must be known first."""
PULLED_IN = ("torchvision", "torchaudio", "flash_attn", "sageattention")
"""Packages that transformers, diffusers or peft import where they are installed, so that a broken one breaks them."""
ELSEWHERE = {"torch", "triton"}
"""``card.py`` imports them."""


def imported() -> Iterator[Check]:
    """Failures of packages that cannot be imported, and their number otherwise."""
    packages = [package.module for package in requirements()[1] if package.module not in ELSEWHERE]
    optional = [package.module for package in requirements()[1] if package.optional]
    try:
        import torch

        # bitsandbytes decorates with it, and importing what it needs takes a second
        torch.compile = lambda function=None, **_: function or (lambda inner: inner)  # type: ignore[assignment]
    except BaseException:  # card.py says why
        return
    good = 0
    for name in sorted((*packages, *PULLED_IN), key=LAST.__contains__):
        if importlib.util.find_spec(name) is None and (name in optional or name in PULLED_IN):
            continue
        found = list(looked_at(name, lambda name=name: _import(name)))  # type: ignore[misc]
        good += not found
        yield from found
    yield Check("imports", "ok", f"{good} packages can be imported")


def _import(name: str) -> Iterator[Check]:
    say(begins=name)
    importlib.import_module(name)
    yield from ()


if __name__ == "__main__":
    tell({"imports": imported})
    sys.exit(0)
