"""Adapters to the model libraries: the only rooms that import diffusers, transformers, peft and bitsandbytes.

Not here: what is computed with them (``method/``), and how they are put together (``assembly/``).
"""

import functools
import importlib
import logging
from typing import Any

# diffusers imports bitsandbytes, which warns on processors with AVX512-BF16 that it lacks the package of a kernel that
# is not used here (models/weights/quant.py)
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def import_models() -> None:
    """Imports the model libraries without PyTorch's compiler. bitsandbytes decorates fallbacks of its operators with
    ``torch.compile``, which is imported when one is called."""
    import torch

    compiler = torch.compile

    def later(function: Any = None, **options: Any) -> Any:
        if function is None:
            return functools.partial(later, **options)
        compiled = functools.cache(lambda: compiler(function, **options))
        return functools.wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    torch.compile = later  # type: ignore[assignment]
    try:
        importlib.import_module("diffusers.models.transformers")
    finally:
        torch.compile = compiler
