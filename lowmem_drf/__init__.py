"""lowmem-drf: Diffusion-DRF (arXiv 2601.04153) on consumer GPUs.

The top-level folders ``kernels/``, ``presets/`` and the file ``cli.py`` are part of this package: a wheel holds them
inside it (``pyproject.toml``, force-include); in a checkout the line below finds them beside it.
"""

import os  # and nothing that takes time: Ctrl-C is caught in __main__

__version__ = "0.1.0"

API = ("evaluate", "export_lora", "plan", "report", "sample", "score", "train")
"""The functions of ``lowmem_drf.api``, which ``from lowmem_drf import train`` finds without an import of it before."""

_root = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
if all(os.path.isfile(os.path.join(_root, name)) for name in ("pyproject.toml", "cli.py")):
    __path__.append(_root)

TYPE_CHECKING = False  # what typing has, without its import
if TYPE_CHECKING:
    from lowmem_drf.api import evaluate, export_lora, plan, report, sample, score, train  # noqa: F401


def __getattr__(name: str) -> object:
    if name not in API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.api"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *API])
