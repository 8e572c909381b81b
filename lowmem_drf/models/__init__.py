"""Adapters to the model libraries: the only rooms that import diffusers, transformers, peft and bitsandbytes.

Not here: what is computed with them (``method/``), and how they are put together (``assembly/``).
"""

import logging

# diffusers imports bitsandbytes, which warns on processors with AVX512-BF16 that it lacks the package of a kernel that
# is not used here (models/weights/quant.py)
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
