"""What a result was made with."""

from __future__ import annotations

import platform
from importlib import metadata

import lowmem_drf


def versions(*libraries: str) -> dict[str, str]:
    """Of Python, lowmem-drf and these libraries."""
    return {
        "python": platform.python_version(),
        "lowmem-drf": lowmem_drf.__version__,
        **{name: metadata.version(name) for name in libraries},
    }
