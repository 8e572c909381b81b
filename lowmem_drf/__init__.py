"""lowmem-drf: Diffusion-DRF (arXiv 2601.04153) on consumer GPUs.

The top-level folders ``kernels/``, ``presets/`` and the file ``cli.py`` are part of this package: a wheel holds them
inside it (``pyproject.toml``, force-include); in a checkout the line below finds them beside it.
"""

from pathlib import Path

__version__ = "0.1.0"

_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "cli.py").is_file():
    __path__.append(str(_root))
