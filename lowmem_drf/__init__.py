"""lowmem-drf: Diffusion-DRF (arXiv 2601.04153) on consumer GPUs.

The top-level folders ``kernels/``, ``presets/`` and the file ``cli.py`` are part of this package: a wheel holds them
inside it (``pyproject.toml``, force-include); in a checkout the line below finds them beside it.
"""

import os  # and nothing that takes time: Ctrl-C is caught in __main__

__version__ = "0.1.0"

_root = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
if all(os.path.isfile(os.path.join(_root, name)) for name in ("pyproject.toml", "cli.py")):
    __path__.append(_root)
