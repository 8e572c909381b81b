"""Versions of the software that a result was measured with."""

from __future__ import annotations

import platform
from importlib import metadata

import lowmem_drf


def versions(*libraries: str) -> dict[str, str]:
    """Versions of Python, lowmem-drf and these libraries."""
    own = {"python": platform.python_version(), "lowmem-drf": lowmem_drf.__version__}
    return own | {name: metadata.version(name) for name in libraries}
